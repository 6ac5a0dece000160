"""Pairs of tokens for training, in an order that is a pure function of (store, rule, batch size, seed, step).

An epoch is a permutation of blocks of consecutive sequences; the pairs of its blocks, in that order, are cut into pools
that fit in memory, and a pool's pairs are permuted among its batches. Every pair comes once an epoch, but for the
remainder of less than one batch. A pool and each of its batches are cut alike into lanes that mix within
themselves, so that a process reads only the lanes that its part of the batch touches.

An example: 1,000 training sequences of 128 positions, of which position 0 is BOS, each sequence one document; batches
of B = 1,024 pairs. The first real token has no earlier one to be paired with, so a sequence gives 126 pairs (positions
2 to 127) and the epoch 126,000: 123 steps, and a remainder of 48 pairs.
    block    with 10 sequences a block, 100 blocks of 1,260 pairs; the epoch's order of blocks is drawn from (seed, epoch)
    pool     with `pool_sequences` 250, at most 250 · 126,000 / (1,000 · 1,024) = 30 steps: 5 pools of 24 or 25 steps
    lane     B is cut into 8 lanes of 128; a pool of 24 steps has 24,576 pairs, of which each lane mixes 3,072
    step 30  lies in pool 1 (which begins at step 24), at its offset 6: rows 768 to 895 of each of the 8 lanes
Of 2 processes, process 0 takes rows 0 to 511 of each batch, which are lanes 0 to 3, and reads only their blocks. The
current token at position 5, with 4 earlier tokens of its document, is paired with position 4 by `previous`, with one
of 1 to 4 by `random`, and with one of 3 and 4 by `within:2`; `none` pairs it with nothing and takes position 1 too.
"""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from functools import partial
from threading import Event
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tsae.config.run import Counted
from tsae.config.sections import parse_pair_rule
from tsae.runtime.errors import TsaeError
from tsae.store.geometry import block_sequences
from tsae.store.norms import of as norms_of
from tsae.store.pools import pools_for
from tsae.store.reader import Store

MOST_LANES = 8
WAIT_SECONDS = 10.0
SEQUENCES_AT_A_TIME = 4096
BLOCK_ORDER, PAIR_ORDER = 1, 2  # keep the two kinds of random streams apart

log = logging.getLogger("tsae")


class PairRule(NamedTuple):
    """Which earlier token of its document is the partner of a token."""

    partners: Callable[[np.ndarray, np.ndarray, int, np.random.Generator], np.ndarray] | None
    """Partners [n] of the tokens `rows` [n], given `earlier`, the rule's number, and where to draw from. Tokens go by
    their rows in a buffer, where `row - 1` is the token before; `earlier[row]` of its document stand directly before
    it, and its partner must be one of those. None: no token has a partner."""
    fewest: Callable[[int], int] = lambda _: 1
    """How many must stand before a token, given the rule's number; tokens with fewer are left out."""


def _drawn(reach: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """[n]: one of 1 to `reach` [n], each as likely."""
    return 1 + (random.random(len(reach)) * reach).astype(reach.dtype)


PAIR_RULES = {
    "previous": PairRule(lambda rows, *_: rows - 1),
    "random": PairRule(lambda rows, earlier, _, random: rows - _drawn(earlier[rows], random)),
    "within": PairRule(lambda rows, earlier, most, random: rows - _drawn(np.minimum(earlier[rows], most), random)),
    "none": PairRule(None, fewest=lambda _: 0),
}
"""What each rule of `tsae.config.sections.PAIR_RULE_SETTINGS` does."""


class Abandoned(Exception):
    """Nobody wants any more what was being read."""


class Pool(NamedTuple):
    """The part of an epoch that is in memory."""

    key: tuple[int, int]  # epoch, number of the pool in it
    blocks: np.ndarray  # in file order
    buffer: Tensor  # [sequences, L, D]: the blocks, one after the other
    norms: np.ndarray | None  # [sequences, L], where they decide which pairs are left out
    document: Tensor  # [sequences·L]
    pairs: Tensor  # [lanes, n, 2 or 1] rows of the buffer seen as [sequences·L, D]: current, partner


class Part(NamedTuple):
    """What one rank reads of a pool."""

    order: np.ndarray  # all blocks, in the epoch's order
    first: int  # the place in it of the first block that is read
    last: int  # the place after the last one
    skipped: int  # pairs of the first block that are not this rank's
    per_lane: int
    begins: int  # the place where the pool begins, for all ranks


class Waited(NamedTuple):
    """Of a pool of a rolling store, when training comes to it."""

    step: int
    """The first step that it serves."""
    seconds: float
    """Since the training began."""
    training_waited: float
    """Seconds in which training waited for it."""
    harvest_waited: float
    """Seconds for which it lay ready."""
    held_bytes: int
    """What is on disk of the training part."""


class Waits:
    """Seconds in which training waited for pools to be read, and in which they lay ready; `ready`: since when the last did."""

    def __init__(self) -> None:
        self.began = self.ready = time.monotonic()
        self.training = self.reading = 0.0
        self.pools: list[Waited] = []

    def line(self) -> str:
        """Which of the two was the limit."""
        whole = time.monotonic() - self.began
        if not self.training and not self.reading:
            return f"all that was trained on was harvested before the first step; {whole:.3g} s"
        limit = "the harvest" if self.training > self.reading else "training"
        return (
            f"{limit} was the limit: of {whole:.3g} s training waited {self.training:.3g} s for the harvest, and the "
            f"harvest {self.reading:.3g} s for training"
        )


class PairStream:
    """Batches of pairs from the training part of a store.

    `stream[step]` is [B / world, 2, D] (slot 0 the current token, slot 1 its partner), or [B / world, D] for the rule
    `none`: float32, or on `device`, where that is a GPU, in the store's dtype. The batches of all ranks, put together in order, are the batch of a single process. Positions that
    are not `counted` (see `Store.valid`) never enter, and part what stands before them from what follows; a partner is
    an earlier token of the same document in the same context. `pool_sequences` contexts are mixed at a time, over all ranks, and
    twice as many are in memory; of a GPU's free memory `spoken_for` bytes are for something else.
    """

    def __init__(
        self,
        store: Store,
        rule: str,
        batch_size: int,
        seed: int,
        *,
        counted: Counted,
        pool_sequences: int,
        rank: int = 0,
        world: int = 1,
        device: torch.device | None = None,
        spoken_for: int = 0,
    ) -> None:
        if batch_size % world or not 0 <= rank < world:
            raise TsaeError(f"training.batch_size: {batch_size} cannot be shared by {world} processes; use a multiple")
        self._store, self._batch_size, self._seed = store, batch_size, seed % 2**64
        name, number = parse_pair_rule(rule)
        self._rule = PAIR_RULES[name]
        # Of any greater number, too, no token has as many before it.
        self._number = min(number, store.context_length)
        self._fewest = self._rule.fewest(self._number)
        # Norms of a rolling store are known once its activations are there, which is too late to count pairs.
        self._limited = counted if store.layout.rolling and counted.max_norm_multiple is not None else None
        self._counted = counted._replace(max_norm_multiple=None) if self._limited else counted
        self._block = block_sequences(store.layout.geometry, len(store.train))
        self._pairs = self._pairs_per_block()
        total = int(self._pairs.sum())
        self.steps_per_epoch = total // batch_size
        if self.steps_per_epoch == 0:
            raise TsaeError(
                f"training.batch_size: {batch_size} is impossible; the training part of {store.path} has only {total} "
                f"pairs for the rule {rule!r}"
                + (
                    ""
                    if counted.all_tokens
                    else " without what data.max_norm_multiple and data.exclude_tokens leave out"
                )
            )
        steps_per_pool = max(1, pool_sequences * total // (len(store.train) * batch_size))
        # While one pool is used the next is read, so two are in memory: what fits there is read once and stays.
        pools = 1 if len(store.train) <= 2 * pool_sequences else -(-self.steps_per_epoch // steps_per_pool)
        self._pool_starts = np.arange(pools + 1) * self.steps_per_epoch // pools
        self._lanes = max(lanes for lanes in range(1, MOST_LANES + 1) if batch_size % lanes == 0)
        share, lane = batch_size // world, batch_size // self._lanes
        self._lane_rows = lane
        self._my_lanes = range(rank * share // lane, -(-(rank + 1) * share // lane))
        begin = rank * share - self._my_lanes.start * lane
        self._my_rows = slice(begin, begin + share)
        self._pool: Pool | None = None
        # Where there is but one pool it stays, unless each epoch gives a process others of its blocks.
        self._stays = pools == 1 and world == 1
        # A pool begins and ends within a block.
        blocks = min(-(-len(store.train) // (pools * world * self._block)) + 2, len(self._pairs))
        self._pools = pools_for(device, store, blocks * self._block, 1 if self._stays else 2, spoken_for)
        self._orders: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self.waits = Waits()

    def __getitem__(self, step: int) -> Tensor:
        """The batch of `step`; cheap when steps follow each other, since the current pool is kept."""
        if step < 0:
            raise IndexError(f"step {step}: steps are counted from 0")
        key, offset = self._place(step)
        if self._pool is None or self._pool.key != key:
            # Forgotten first: should reading fail, its buffer is half overwritten.
            before, self._pool = self._pool, None
            self._pool = self._load(key, before, None if before is None else before.buffer)
        return self._pools.received(*self._batch(self._pool, offset))[0]

    def read_first(self, step: int, leaving: Callable[[], bool]) -> None:
        """Read what iterating from `step` begins with, which may take long; given up once `leaving` says so."""
        with suppress(Abandoned):
            self._pool = self._load(self._place(step)[0], None, None, leaving)

    def iterate(self, start: int, stop: int) -> Iterator[Tensor]:
        """The batches of steps `start` to `stop`, made ahead of need by one thread while another reads the next pool."""
        return (batch for batch, _ in self.with_documents(start, stop))

    def with_documents(self, start: int, stop: int) -> Iterator[tuple[Tensor, Tensor]]:
        """As `iterate`, each batch with the number of each of its pairs' document [B / world], int32."""
        loader, gatherer, over = ThreadPoolExecutor(1, "pool"), ThreadPoolExecutor(1, "batch"), Event()
        ahead = _Ahead(self, stop, loader, over.is_set)
        waiting: deque[Future[tuple[Tensor, Tensor]]] = deque()
        try:
            for step in range(start, stop):
                if not self._pools.ahead:
                    yield ahead.batch(step)
                    continue
                waiting.append(gatherer.submit(ahead.batch, step))
                if len(waiting) > self._pools.ahead:
                    yield self._pools.received(*waiting.popleft().result())
            while waiting:
                yield self._pools.received(*waiting.popleft().result())
        finally:
            # The process could not end before its threads do.
            over.set()

    def _place(self, step: int) -> tuple[tuple[int, int], int]:
        """Epoch and pool of a step, and the step's number within the pool."""
        epoch, within = divmod(step, self.steps_per_epoch)
        pool = int(np.searchsorted(self._pool_starts, within, side="right")) - 1
        return (epoch, pool), within - int(self._pool_starts[pool])

    def _after(self, key: tuple[int, int]) -> tuple[int, int]:
        epoch, pool = key
        return (epoch, pool + 1) if pool + 2 < len(self._pool_starts) else (epoch + 1, 0)

    def _begins(self, key: tuple[int, int]) -> int:
        """The first step of a pool."""
        return key[0] * self.steps_per_epoch + int(self._pool_starts[key[1]])

    def _batch(self, pool: Pool, offset: int) -> tuple[Tensor, Tensor]:
        """The batch at a place of a pool, and the documents of its pairs [B / world]."""
        n = self._lane_rows
        rows = pool.pairs[:, offset * n : (offset + 1) * n].flatten(0, 1)[self._my_rows]
        batch, document = self._pools.batch(pool.buffer.flatten(0, 1), pool.document, rows)
        return batch.squeeze(1), document

    def _load(
        self,
        key: tuple[int, int],
        resident: Pool | None,
        spare: Tensor | None,
        leaving: Callable[[], bool] = lambda: False,
    ) -> Pool:
        """Pool `key`; the rows of `resident` serve again if they are the same blocks, else `spare` is filled."""
        part = self._part(key)
        blocks = np.sort(part.order[part.first : part.last])
        if resident is not None and np.array_equal(resident.blocks, blocks):
            buffer, norms, document = resident.buffer, resident.norms, resident.document
        else:
            buffer, norms = self._read(key, part, blocks, spare, leaving)
            document = self._pools.table(self._store.document[self._sequences(blocks)].reshape(-1))
        pairs = self._pools.table(self._pairs_of(key, part, blocks, norms))
        self.waits.ready = time.monotonic()
        return Pool(key, blocks, buffer, norms, document, pairs)

    def _order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """All blocks in the order of an epoch, and the place of each in it."""
        if epoch not in self._orders:
            order = np.random.default_rng([self._seed, epoch, BLOCK_ORDER]).permutation(len(self._pairs))
            self._orders = {kept: orders for kept, orders in self._orders.items() if kept == epoch - 1}
            self._orders[epoch] = order, np.argsort(order)
        return self._orders[epoch]

    def _part(self, key: tuple[int, int]) -> Part:
        """What this rank reads of a pool: the blocks that hold the pairs of its lanes."""
        epoch, pool = key
        order, _ = self._order(epoch)
        ends = np.cumsum(self._pairs[order])
        first, last = (int(start) * self._batch_size for start in self._pool_starts[pool : pool + 2])
        per_lane = (last - first) // self._lanes
        begin, end = (first + lane * per_lane for lane in (self._my_lanes.start, self._my_lanes.stop))
        begins, low = (int(np.searchsorted(ends, pair, side="right")) for pair in (first, begin))
        high = int(np.searchsorted(ends, end, side="left")) + 1
        if self._stays and self._store.maker is None:
            high = len(order)  # with the blocks of the remainder, which are others in each epoch, it is always the same
        return Part(order, low, high, begin - (int(ends[low - 1]) if low else 0), per_lane, begins)

    def _pairs_of(self, key: tuple[int, int], part: Part, blocks: np.ndarray, norms: np.ndarray | None) -> np.ndarray:
        """[lanes, n, 2 or 1] rows of the buffer that a pool's `blocks`, in file order, fill."""
        order = part.order[part.first : part.last]
        earlier, rows = self._rows_of(order, np.searchsorted(blocks, order))
        if norms is not None:
            earlier = self._earlier(self._sequences(blocks), norms).reshape(-1)
        every = rows[part.skipped : part.skipped + len(self._my_lanes) * part.per_lane].reshape(-1, part.per_lane)
        lanes = []
        for lane, mine in zip(self._my_lanes, every, strict=True):
            random = np.random.default_rng([self._seed, key[0], PAIR_ORDER, key[1], lane])
            mine = random.permutation(mine)
            left_out = earlier[mine] < self._fewest
            if left_out.any():
                mine[left_out] = self._drawn_again(mine[~left_out], int(left_out.sum()), random)
            slots = [mine]
            if self._rule.partners is not None:
                slots.append(self._rule.partners(mine, earlier, self._number, random))
            lanes.append(np.stack(slots, axis=1))
        return np.stack(lanes)

    def _drawn_again(self, rows: np.ndarray, count: int, random: np.random.Generator) -> np.ndarray:
        """[count] of the pairs of a lane that count, in place of those whose norm, once it is known, leaves them out."""
        if not len(rows):
            raise TsaeError(
                f"{self._store.path}: data.max_norm_multiple leaves out all tokens of a part of a pool; it must be "
                "larger, or training.pool_sequences"
            )
        return random.choice(rows, count)

    def _sequences(self, blocks: np.ndarray) -> np.ndarray:
        """[n] the sequences of the places in a buffer that `blocks` fill; -1 where there is none to train on."""
        sequences = (blocks[:, None] * self._block + np.arange(self._block)).reshape(-1)
        sequences[sequences >= len(self._store.train)] = -1
        return sequences

    def _rows_of(self, order: np.ndarray, slots: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For a buffer with block `order[i]` in slot `slots[i]`: `earlier` of all its rows, and the current rows of the
        blocks' pairs, blocks in the order given."""
        places = np.empty_like(order)
        places[slots] = order
        earlier = self._earlier(self._sequences(places)).reshape(len(order), -1)
        per_block = earlier.shape[1]
        kind = np.int32 if earlier.size < 2**31 else np.int64
        found = np.flatnonzero(earlier[slots] >= self._fewest).astype(kind)
        shift = ((slots - np.arange(len(order))) * per_block).astype(kind)
        return earlier.reshape(-1), found + np.repeat(shift, self._pairs[order])

    def _earlier(self, sequences: np.ndarray, norms: np.ndarray | None = None) -> np.ndarray:
        """[n, L]: how many tokens of its document that count stand directly before each position; -1: not a token to train on.

        A sequence number of -1 stands for a place without a sequence. `norms` [n, L] of a rolling store count where given.
        """
        document = self._store.document[sequences]
        counted = self._counted if norms is None or self._limited is None else self._limited
        valid = self._store.valid(counted, sequences, norms=norms)
        valid[sequences < 0] = False
        positions = np.arange(document.shape[1], dtype=np.int32)
        begins = np.ones_like(valid)
        begins[:, 1:] = ~valid[:, :-1] | (document[:, 1:] != document[:, :-1])
        start = np.maximum.accumulate(np.where(begins, positions, 0), axis=1)
        return np.where(valid, positions - start, -1)

    def _pairs_per_block(self) -> np.ndarray:
        """[blocks] int64: pairs in each block of the training part."""
        train, counts = len(self._store.train), []
        at_a_time = -(-SEQUENCES_AT_A_TIME // self._block) * self._block
        for first in range(0, train, at_a_time):
            found = (self._earlier(np.arange(first, min(first + at_a_time, train))) >= self._fewest).sum(1)
            counts.append(np.add.reduceat(found, np.arange(0, len(found), self._block)))
        return np.concatenate(counts or [np.zeros(0, np.int64)]).astype(np.int64)

    def _take_first(self, key: tuple[int, int], leaving: Callable[[], bool]) -> Pool:
        """Pool `key` as `read_first` left it, else read now; its buffer is the caller's."""
        pool, self._pool = self._pool, None
        return pool if pool is not None and pool.key == key else self._load(key, None, None, leaving)

    def _read(
        self,
        key: tuple[int, int],
        part: Part,
        blocks: np.ndarray,
        spare: Tensor | None,
        leaving: Callable[[], bool],
    ) -> tuple[Tensor, np.ndarray | None]:
        """[sequences, L, D]: the activations of `blocks`, in a buffer that is `spare` where that is large enough; and
        their norms [sequences, L] where they decide what is left out.

        Raises Abandoned once `leaving` says so.
        """
        store = self._store
        per_chunk, last_chunk = store.chunk_sequences, -(-len(store.train) // store.chunk_sequences)
        needed = len(blocks) * self._block
        buffer = self._pools.buffer(needed, spare)
        norms = np.zeros((needed, store.context_length), np.float32) if self._limited else None
        for block in blocks.tolist() if store.maker is None else self._provided(key, part, leaving):
            if leaving():
                raise Abandoned
            slot = int(np.searchsorted(blocks, block))
            place = slice(slot * self._block, (slot + 1) * self._block)
            first = block * self._block // per_chunk
            count = min(self._block // per_chunk, last_chunk - first)
            read = self._pools.fill(buffer[place], partial(store.read_chunks, first, count))
            if norms is not None:
                norms[place] = norms_of(read)
        if leaving():
            raise Abandoned
        return buffer, norms

    def _provided(self, key: tuple[int, int], part: Part, leaving: Callable[[], bool]) -> Iterator[int]:
        """The blocks that a part needs of a rolling store, each once it is on disk; those that come last go for them."""
        assert self._store.maker is not None
        (_, places), (_, later) = self._order(key[0]), self._order(key[0] + 1)

        def need(shard: int) -> float:
            if shard >= len(places):
                return math.inf
            place = int(places[shard])
            return place if place >= part.begins else len(places) + int(later[shard])

        return self._store.maker.provide(part.order, part.first, part.last, need, leaving)


class _Ahead:
    """Makes batches in order, reading each pool while the one before it is used. All state belongs to one thread."""

    def __init__(self, stream: PairStream, stop: int, loader: ThreadPoolExecutor, leaving: Callable[[], bool]) -> None:
        self._stream, self._stop, self._loader, self._leaving = stream, stop, loader, leaving
        self._pool: Pool | None = None
        self._next: Future[Pool] | None = None

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        key, offset = self._stream._place(step)
        if self._pool is None or self._pool.key != key:
            self._advance(key)
        assert self._pool is not None
        return self._stream._batch(self._pool, offset)

    def _advance(self, key: tuple[int, int]) -> None:
        before = self._pool
        self._pool = self._stream._take_first(key, self._leaving) if self._next is None else self._awaited(self._next)
        following = self._stream._after(key)
        if self._stream._begins(following) < self._stop:
            spare = None if before is None or before.buffer is self._pool.buffer else before.buffer
            self._next = self._loader.submit(self._stream._load, following, self._pool, spare, self._leaving)

    def _awaited(self, pool: Future[Pool]) -> Pool:
        began, waits, told = time.monotonic(), self._stream.waits, WAIT_SECONDS
        while not wait([pool], timeout=WAIT_SECONDS).done:
            log.warning("training waits for activations since %.0f s", told)
            told += WAIT_SECONDS
        found = pool.result()
        training, reading = max(0.0, waits.ready - began), max(0.0, began - waits.ready)
        waits.training += training
        waits.reading += reading
        maker = self._stream._store.maker
        if maker is not None:
            step, since = self._stream._begins(found.key), time.monotonic() - waits.began
            waits.pools.append(Waited(step, since, training, reading, maker.window.held_bytes()))
        return found
