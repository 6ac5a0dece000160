from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tsae.config.run import Counted
from tsae.runtime.errors import TsaeError
from tsae.store import pools
from tsae.store.pairs import PairStream
from tsae.store.pools import GpuPools, Pools, StagedPools
from tsae.store.reader import Store

WriteStore = Callable[..., Store]
RULES = ["previous", "random", "within:3", "none"]
SKIP = 1


@pytest.fixture(scope="session")
def store(write_store: WriteStore, ragged: np.ndarray) -> Store:
    """1003 sequences of 32 positions, 100 of them held out."""
    return write_store(ragged, heldout=100)


def stream_of(store: Store, rule: str = "previous", batch_size: int = 24, seed: int = 3, **more: Any) -> PairStream:
    return PairStream(store, rule, batch_size, seed, **{"counted": Counted(SKIP), "pool_sequences": 200, **more})


def places(batch: torch.Tensor) -> np.ndarray:
    """[B, slots, 3]: sequence, position and document that each row of a batch says it comes from."""
    return batch.view(len(batch), -1, batch.shape[-1])[..., :3].numpy().astype(int)


def partners_of(document: np.ndarray, rule: str, skip: int) -> dict[tuple[int, int], set[int]]:
    """(sequence, position) of every current token → the positions its partner may have."""
    allowed = {}
    for sequence, row in enumerate(document):
        for position in range(skip, len(row)):
            if row[position] < 0:
                continue
            back = []
            while position - len(back) - 1 >= skip and row[position - len(back) - 1] == row[position]:
                back.append(position - len(back) - 1)
            reach = {"previous": 1, "random": len(back), "within:3": 3, "none": 0}[rule]
            if back or rule == "none":
                allowed[sequence, position] = set(back[:reach])
    return allowed


def check_epoch(stream: PairStream, document: np.ndarray, rule: str, skip: int, batch_size: int) -> dict[int, set[int]]:
    """Every pair of an epoch is allowed, none comes twice, fewer than a batch are left out; how far partners were back."""
    allowed, seen, distances = partners_of(document, rule, skip), set(), {}
    for step in range(stream.steps_per_epoch):
        for slots in places(stream[step]):
            sequence, position, _ = map(int, slots[0])
            assert (sequence, position) not in seen
            seen.add((sequence, position))
            if rule != "none":
                assert int(slots[1, 0]) == sequence
                assert int(slots[1, 1]) in allowed[sequence, position]
                distances.setdefault(len(allowed[sequence, position]), set()).add(position - int(slots[1, 1]))
    assert seen <= set(allowed)
    assert len(allowed) - len(seen) < batch_size
    return distances


@pytest.mark.parametrize("rule", RULES)
def test_an_epoch_has_every_pair_of_the_training_part_once(store: Store, ragged: np.ndarray, rule: str) -> None:
    distances = check_epoch(stream_of(store, rule), ragged[:903], rule, SKIP, 24)
    if rule == "random":
        assert distances[10] == set(range(1, 11))
    if rule == "within:3":
        assert distances[3] == {1, 2, 3}


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    document=st.lists(st.lists(st.integers(-1, 2), min_size=6, max_size=6), min_size=9, max_size=30),
    rule=st.sampled_from(RULES),
    skip=st.integers(0, 2),
    heldout=st.integers(0, 4),
    batch_size=st.integers(1, 9),
    pool=st.integers(1, 40),
)
def test_partners_are_right_for_any_documents(
    write_store: WriteStore,
    document: list[list[int]],
    rule: str,
    skip: int,
    heldout: int,
    batch_size: int,
    pool: int,
) -> None:
    documents = np.array(document, np.int32)
    documents[0] = 0
    store = write_store(documents, heldout=heldout, dim=6000)  # two sequences a block
    trained = documents[: len(documents) - heldout]
    stream = stream_of(store, rule, min(batch_size, 3), counted=Counted(skip), pool_sequences=pool)
    check_epoch(stream, trained, rule, skip, min(batch_size, 3))


def test_rows_are_the_activations_and_slot_1_is_the_partner(store: Store) -> None:
    everything = store.read(range(1003))
    batch = stream_of(store)[5]
    assert batch.shape == (24, 2, 64)
    assert batch.dtype == torch.float32
    said = places(batch)
    for slot in (0, 1):
        assert torch.equal(batch[:, slot], everything[said[:, slot, 0], said[:, slot, 1]])
    np.testing.assert_array_equal(said[:, 1, 1], said[:, 0, 1] - 1)
    assert stream_of(store, "none")[0].shape == (24, 64)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_batches_are_float32_of_what_is_stored(write_store: WriteStore, ragged: np.ndarray, dtype: str) -> None:
    store = write_store(ragged[:60], dtype=dtype)
    everything = store.read(range(60)).float()
    batch = stream_of(store)[0]
    assert batch.dtype == torch.float32
    said = places(batch)[:, 0]
    assert torch.equal(batch[:, 0], everything[said[:, 0], said[:, 1]])


@pytest.mark.parametrize("rule", RULES)
def test_a_batch_follows_from_the_step_alone(store: Store, rule: str) -> None:
    steps = stream_of(store, rule).steps_per_epoch
    asked = [steps + 3, 0, 2 * steps - 1, 7, 8, steps - 1, steps]
    one, other = stream_of(store, rule), stream_of(store, rule)
    forward = {step: one[step] for step in sorted(asked)}
    for step in asked:
        assert torch.equal(other[step], forward[step])


def test_iterating_gives_the_same_batches_across_epochs_and_from_any_step(store: Store) -> None:
    stream = stream_of(store, "random", 96)
    steps = stream.steps_per_epoch
    expected = [stream[step] for step in range(2 * steps + 5)]
    for start in (0, 1, steps - 1, steps, steps + steps // 2):
        # All are kept, so that memory used twice would show.
        batches = list(stream_of(store, "random", 96).iterate(start, len(expected)))
        assert len(batches) == len(expected) - start
        assert all(map(torch.equal, batches, expected[start:]))


@pytest.mark.parametrize("way", [StagedPools, GpuPools])
@pytest.mark.parametrize(("rule", "world", "dtype"), [("random", 1, "float32"), ("none", 4, "bfloat16")])
def test_pools_beside_a_gpu_and_on_it_give_the_same_batches_as_those_in_memory(
    way: Any,
    rule: str,
    world: int,
    dtype: str,
    write_store: WriteStore,
    ragged: np.ndarray,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store, share = write_store(ragged, heldout=100, dtype=dtype), {"rank": world // 2, "world": world}
    here = stream_of(store, rule, 96, **share)
    # No GPU is needed to see that they are the same; the memory of this machine stands for a GPU's.
    monkeypatch.setattr("tsae.store.pairs.pools_for", lambda _, store, n, *__: way(store, n, torch.device("cpu")))
    there = stream_of(store, rule, 96, **share)
    assert there[0].dtype == store.dtype
    check_same(here, there)
    assert torch.equal(there[here.steps_per_epoch + 1].float(), here[here.steps_per_epoch + 1])


def check_same(here: PairStream, there: PairStream, work: Callable[[], object] = lambda: None) -> None:
    """Batches of several pools and epochs are the same, `there` in the store's dtype; `work` is done before each.

    Once all are kept, so that memory used twice would show; once each is dropped, so that its memory is.
    """
    steps = here.steps_per_epoch
    assert len(here._pool_starts) > 3
    for start, keep in ((0, True), (steps - 1, False), (steps + 7, True)):
        kept: list[Any] = []
        both = zip(there.with_documents(start, 2 * steps + 3), here.with_documents(start, 2 * steps + 3), strict=True)
        for batches in both:
            work()
            kept = [*kept, batches] if keep else [batches]
            if not keep:
                compare(*batches)
        for batches in kept:
            compare(*batches)


def compare(found: tuple[torch.Tensor, torch.Tensor], wanted: tuple[torch.Tensor, torch.Tensor]) -> None:
    assert torch.equal(found[0].float().cpu(), wanted[0])
    assert torch.equal(found[1].cpu(), wanted[1])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("free", "way"), [(pools.MOST_OF_FREE, GpuPools), (0.0, StagedPools)])
def test_a_gpu_gets_the_same_batches_while_it_is_busy(
    store: Store, free: float, way: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pools, "MOST_OF_FREE", free)
    here, there = (stream_of(store, "random", 96, device=device) for device in (None, torch.device("cuda")))
    assert type(there._pools) is way
    big = torch.randn(4096, 4096, device="cuda")
    check_same(here, there, lambda: big @ big)  # what is copied meanwhile must not be what a step still reads


def test_pools_are_on_the_gpu_where_half_of_what_is_free_there_holds_them(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pools, "stream_for", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: None)
    gpu, wanted = (
        torch.device("cuda"),
        2 * (320 + 20) * 32 * (store.activation_dim * store.dtype.itemsize + pools.BESIDE),
    )
    for free, way in ((2 * wanted, GpuPools), (2 * wanted - 1, StagedPools)):
        monkeypatch.setattr(pools, "free_on_gpu", lambda _, free=free: free)
        assert type(pools.pools_for(gpu, store, 320, 2)) is way
        assert type(pools.pools_for(gpu, store, 320, 2, spoken_for=2)) is StagedPools
    assert type(pools.pools_for(torch.device("cpu"), store, 320, 2)) is Pools


@pytest.mark.parametrize(
    ("world", "pool_sequences", "batch_size", "held"),
    # Of batches of 4,096 so many pairs are left over that an epoch does without whole blocks.
    [(1, 10_000, 96, 1), (1, 10_000, 4096, 1), (1, 200, 96, 2), (2, 10_000, 96, 2), (2, 200, 96, 2)],
)
def test_no_more_pools_are_in_memory_than_a_gpu_is_asked_for(
    store: Store, world: int, pool_sequences: int, batch_size: int, held: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
    most, asked = 0, 0

    class Counting(Pools):
        def _empty(self, sequences: int) -> torch.Tensor:
            nonlocal most
            buffer = super()._empty(sequences)
            made.add(buffer)
            most = max(most, sum(map(len, made)))
            return buffer

    def counting(_: object, store: Store, sequences: int, number: int, _spoken_for: int) -> Pools:
        nonlocal asked
        assert number == held
        asked = number * pools.with_spare(sequences)
        return Counting(store, sequences)

    monkeypatch.setattr("tsae.store.pairs.pools_for", counting)
    stream = stream_of(store, "random", batch_size, pool_sequences=pool_sequences, world=world)
    for _ in stream.iterate(0, 5 * stream.steps_per_epoch):
        pass
    assert 0 < most <= asked


@pytest.mark.parametrize("rule", ["random", "none"])
def test_each_pair_comes_with_its_document(store: Store, rule: str) -> None:
    for world, rank in ((1, 0), (4, 2)):
        stream = stream_of(store, rule, rank=rank, world=world)
        for batch, document in stream.with_documents(3, 12):
            np.testing.assert_array_equal(document.numpy(), places(batch)[:, 0, 2])


def test_a_store_that_fits_in_one_pool_gives_a_new_order_every_epoch(store: Store) -> None:
    stream = stream_of(store, pool_sequences=10_000)
    steps = stream.steps_per_epoch
    first, second = (
        np.concatenate([places(batch)[:, 0] for batch in stream.iterate(epoch * steps, (epoch + 1) * steps)])
        for epoch in (0, 1)
    )
    assert not np.array_equal(first, second)
    assert len(np.unique(second, axis=0)) == len(second)
    assert all(
        map(torch.equal, stream.iterate(steps - 2, steps + 2), (stream[step] for step in range(steps - 2, steps + 2)))
    )


def test_every_epoch_puts_other_sequences_into_its_first_pool(store: Store) -> None:
    stream = stream_of(store)
    first, second = (
        set(np.concatenate([places(stream[epoch * stream.steps_per_epoch + step])[:, 0, 0] for step in range(50)]))
        for epoch in (0, 1)
    )
    assert min(len(first), len(second)) > 150
    assert len(first & second) < 100


def test_batches_mix_the_sequences_of_a_pool(store: Store) -> None:
    for step in (0, 100, 300):
        assert len(np.unique(places(stream_of(store)[step])[:, 0, 0])) > 18


@pytest.mark.parametrize(("batch_size", "worlds"), [(24, (2, 3, 4, 8, 24)), (21, (3, 7)), (11, (11,))])
def test_the_batches_of_all_ranks_make_the_batch_of_one(store: Store, batch_size: int, worlds: tuple[int, ...]) -> None:
    alone = stream_of(store, "within:3", batch_size)
    for world in worlds:
        ranks = [stream_of(store, "within:3", batch_size, rank=rank, world=world) for rank in range(world)]
        for step in (0, 1, alone.steps_per_epoch - 1, alone.steps_per_epoch + 50):
            assert torch.equal(torch.cat([rank[step] for rank in ranks]), alone[step])


def test_a_rank_reads_only_its_share(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    real = Store.read_chunks
    monkeypatch.setattr(
        Store, "read_chunks", lambda self, first, count, out: (read.append(count), real(self, first, count, out))[1]
    )
    stream_of(store, pool_sequences=10_000)[0]
    whole = sum(read)
    read.clear()
    stream_of(store, pool_sequences=10_000, rank=1, world=4)[0]
    assert sum(read) <= whole / 4 + 2


def test_seeds_give_different_orders(store: Store) -> None:
    assert not torch.equal(stream_of(store, seed=0)[0], stream_of(store, seed=1)[0])
    assert torch.equal(stream_of(store, seed=-1)[0], stream_of(store, seed=-1)[0])


def test_what_is_read_ahead_is_given_up_when_the_loop_ends(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    stream, first, before = stream_of(store), stream_of(store)[0], set(threading.enumerate())
    stream.read_first(0, lambda: False)
    read, reading, over, chunks = Store.read_chunks, threading.Event(), threading.Event(), list[object]()

    def held(*arguments: Any) -> None:
        chunks.append(arguments)
        reading.set()
        over.wait()
        read(*arguments)

    monkeypatch.setattr(Store, "read_chunks", held)
    batches = stream.with_documents(0, 10_000)
    assert torch.equal(next(batches)[0], first)
    threads = set(threading.enumerate()) - before
    reading.wait()
    batches.close()
    del batches
    over.set()
    for thread in threads:
        thread.join()
    assert len(chunks) == 1


def test_damage_found_while_reading_ahead_reaches_the_loop(write_store: WriteStore, ragged: np.ndarray) -> None:
    store = write_store(ragged)
    batches = stream_of(store).iterate(0, 10_000)
    next(batches)
    for shard in range(store.layout.geometry.shards):
        store.layout.shard(shard).unlink()
    with pytest.raises(TsaeError, match=r"shard \d+ .* cannot be opened"):
        list(batches)


def test_batches_that_cannot_be_are_refused(store: Store) -> None:
    with pytest.raises(TsaeError, match=r"10000000 is impossible; .* has only"):
        stream_of(store, batch_size=10_000_000)
    with pytest.raises(TsaeError, match="cannot be shared by 5 processes"):
        stream_of(store, rank=0, world=5)
    with pytest.raises(IndexError):
        stream_of(store)[-1]
