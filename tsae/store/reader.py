"""Reading a store: every chunk is checked against its checksum, and no hole, swap or flipped byte passes for data."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from tsae.config.run import Counted, RunConfig
from tsae.runtime.errors import TsaeError
from tsae.runtime.rows import Rows, parts
from tsae.store import norms
from tsae.store.geometry import CRC_BYTES, crc32c
from tsae.store.layout import StoreLayout, decode
from tsae.store.window import Window
from tsae.store.writer import TORCH_DTYPE

if TYPE_CHECKING:
    from tsae.data.synthetic import Truth

SCRATCH_BYTES = 8_000_000


class Maker(Protocol):
    """What makes shards of a rolling store again (see `tsae.store.rolling`)."""

    window: Window
    """How much of them may be on disk."""

    def make(self, shard: int) -> None:
        """Put `shard` on disk, and others away for it."""

    def provide(
        self, order: np.ndarray, first: int, last: int, need: Callable[[int], float], leaving: Callable[[], bool]
    ) -> Iterator[int]:
        """The shards in places `first` to `last` of `order`, each as soon as it is on disk."""


class Store:
    """A complete activation store, open for reading: N sequences, L positions, D activation_dim.

    Shards of a rolling store that are not on disk are made by `maker`, where it is given.
    """

    def __init__(self, layout: StoreLayout, maker: Maker | None = None) -> None:
        self.layout, self.path, self.maker = layout, layout.path, maker
        self.attributes: dict[str, Any] = layout.attributes
        geometry = layout.geometry
        self.activation_dim, self.context_length = geometry.activation_dim, geometry.context_length
        self.n_sequences, self.heldout = geometry.sequences, layout.heldout
        self.chunk_sequences = geometry.chunk_sequences
        self.dtype: torch.dtype = TORCH_DTYPE[geometry.dtype]
        self.train = range(self.n_sequences - self.heldout)
        self.sample = range(layout.sample)
        self.heldout_range = range(self.n_sequences - self.heldout, self.n_sequences)
        self.label_names = tuple(self.attributes["label_names"])
        self.mean = torch.tensor(self.attributes["statistics"]["mean"], dtype=torch.float32)
        layout.check_frame("activations")
        self._checksums = layout.read_checksums()
        self._medians: dict[int, float] = {}
        self._sound: set[int] = set()

    def __repr__(self) -> str:
        """Two lines: where it is and whether it is complete, and what is in it."""
        about = self.layout.attributes
        model = about.get("model") or {}
        return (
            f"Store {self.path}: {'complete' if about['complete'] else 'not finished'}\n"
            f"{model.get('name', 'unknown model')}, {model.get('hook_path', 'no layer')}: {about['tokens']:,} tokens in "
            f"{self.n_sequences:,} contexts of {self.context_length} ({self.heldout:,} held out), "
            f"{self.activation_dim:,} dimensions, {self.layout.geometry.dtype}"
        )

    @classmethod
    def open(cls, path: str | Path, config: RunConfig | None = None) -> Store:
        """The store at `path`. Raises TsaeError if it is incomplete, damaged, or not the one `config` describes."""
        layout = StoreLayout(path)
        if config is not None:
            layout.require(config)
        if not layout.attributes["complete"]:
            missing = [shard for shard in layout.measured if not layout.is_settled(shard)]
            listed = ", ".join(map(str, missing[:8])) + (", …" if len(missing) > 8 else "")
            raise TsaeError(
                f"{layout.path}: the harvest is not finished: {len(missing)} of {len(layout.measured)} shards are "
                f"missing ({listed or 'none, only its end'}); run the same harvest again"
            )
        return cls(layout)

    @property
    def tokens(self) -> Rows:
        """[N, L] int32, right-padded."""
        return self.layout.tokens

    @property
    def lengths(self) -> np.ndarray:
        """[N] int32: real tokens of each sequence."""
        return self.layout.lengths

    @property
    def document(self) -> Rows:
        """[N, L] int32: document of each position, -1 at padding, BOS and other special tokens."""
        return self.layout.document

    @cached_property
    def label(self) -> np.ndarray:
        """[documents] int32: index into `label_names`, -1 for none."""
        return self.layout.array("label")

    def truth(self) -> Truth:
        """What is known of a synthetic world's held-out sequences. Raises TsaeError for any other store."""
        from tsae.data.synthetic import Truth

        if "truth_group" not in self.attributes["digests"]:
            raise TsaeError(f"{self.path}: holds no true features; only a synthetic world's store does")
        directions, group, features = (
            self.layout.array(f"truth_{name}") for name in ("directions", "group", "features")
        )
        return Truth(directions, group, tuple(self.attributes["model"]["feature_kinds"]), features)

    @cached_property
    def norms(self) -> Rows:
        """[N, L] float32: norm of each position's activation as it is stored, 0 at padding; NaN where a rolling store has none."""
        return norms.recorded(self.layout) or norms.add(self.layout, self.read)

    def norms_of(self, rows: np.ndarray | slice) -> np.ndarray:
        """[n, L] float32: the same of sequences `rows`; those of a rolling store are read for it where need be."""
        found = self.norms[rows]
        unknown = np.isnan(found).any(1)
        if unknown.any():
            found = found.copy()
            found[unknown] = norms.of(self.read(np.arange(self.n_sequences)[rows][unknown]))
        return found

    def valid(
        self,
        counted: Counted,
        rows: np.ndarray | slice = slice(None),
        limit: float | None = None,
        norms: np.ndarray | None = None,
    ) -> np.ndarray:
        """[n, L] bool: which positions of sequences `rows` count; of all sequences by default.

        Those that belong to a document, are not among the first `skip_positions`, hold none of `exclude_tokens`, and
        whose norm is at most `max_norm_multiple` times the median, or `limit` where that is given. `norms` [n, L] are
        theirs, where the caller has them.
        """
        valid = self.document[rows] >= 0
        valid[:, : counted.skip_positions] = False
        if counted.exclude_tokens:
            valid &= ~np.isin(self.tokens[rows], counted.exclude_tokens)
        if counted.max_norm_multiple is not None:
            norms = self.norms_of(rows) if norms is None else norms
            valid &= norms <= (self.limit(counted) if limit is None else limit)
        return valid

    def limit(self, counted: Counted) -> float:
        """The largest norm of a position that counts: `max_norm_multiple` times the median norm of the training part.

        The median is over positions that belong to a document and are not among the first `skip_positions`; of a
        rolling store, over those of the sample.
        """
        if counted.max_norm_multiple is None:
            return math.inf
        if counted.skip_positions not in self._medians:
            # Where nothing is trained on, as with labelled texts, the median is of all.
            rows = len(self.sample) or self.n_sequences

            def values() -> Iterator[np.ndarray]:
                for part in parts(rows, self.context_length):
                    yield self.norms[part][self.valid(Counted(counted.skip_positions), part)]

            pairs, _ = norms.neighbours(values, np.array([0.5]))
            self._medians[counted.skip_positions] = float(np.median(pairs[0]))
        return counted.max_norm_multiple * self._medians[counted.skip_positions]

    def read(self, sequences: Sequence[int] | np.ndarray, out: Tensor | None = None) -> Tensor:
        """Activations [n, L, D] of `sequences`, in their order, in the store's dtype; into `out` if given.

        Raises TsaeError naming the shard for anything missing, truncated, swapped or changed.
        """
        wanted = np.asarray(sequences, dtype=np.int64).reshape(-1)
        if len(wanted) and not (wanted.min() >= 0 and wanted.max() < self.n_sequences):
            raise IndexError(f"sequences {wanted.min()} to {wanted.max()} of a store of {self.n_sequences}")
        if out is None:
            out = self.empty(len(wanted))
        if not len(wanted):
            return out
        chunks, order = wanted // self.chunk_sequences, np.argsort(wanted, kind="stable")
        most = max(1, SCRATCH_BYTES // self.layout.geometry.chunk_bytes)
        scratch = self.empty(min(most, len(np.unique(chunks))) * self.chunk_sequences)
        for first, last in _runs(np.unique(chunks), most):
            self.read_chunks(first, last - first, scratch)
            here = order[np.searchsorted(chunks[order], first) : np.searchsorted(chunks[order], last)]
            out[torch.from_numpy(here)] = scratch[torch.from_numpy(wanted[here] - first * self.chunk_sequences)]
        return out

    def empty(self, sequences: int) -> Tensor:
        """An uninitialised tensor [sequences, L, D] in the store's dtype."""
        return uninitialised((sequences, self.context_length, self.activation_dim), self.dtype)

    def read_chunks(self, first: int, count: int, out: Tensor) -> None:
        """Read whole consecutive chunks to the beginning of `out` [≥ count·C, L, D]; the memory-speed path.

        The last chunk of the store brings its padding along. Raises TsaeError as `read` does.
        """
        geometry = self.layout.geometry
        payload = out.view(torch.uint8).numpy().reshape(-1)[: count * geometry.chunk_bytes].reshape(count, -1)
        taken = 0
        while taken < count:
            shard = geometry.shard_of(first + taken)
            here = min(count - taken, geometry.chunks_of(shard).stop - first - taken)
            self._read_run(shard, first + taken, payload[taken : taken + here])
            taken += here

    def _read_run(self, shard: int, first: int, payload: np.ndarray) -> None:
        """Consecutive chunks of one shard into `payload` [chunks, chunk_bytes]."""
        geometry, stored = self.layout.geometry, np.empty(CRC_BYTES, np.uint8)
        descriptor, checksums = self._open(shard)
        try:
            if shard not in self._sound:
                self._check_frame(shard, descriptor)
            # One chunk at a time: its checksum is computed while it is still in the processor's cache.
            for chunk, part in enumerate(payload, start=first):
                number = chunk - geometry.chunks_of(shard).start
                if not _read_fully(descriptor, [part.data, stored.data], number * geometry.stride):
                    raise self._damage(shard, "is truncated")
                computed = crc32c(part)
                if computed != stored.tobytes():
                    raise self._damage(shard, f"is damaged: chunk {number} fails its checksum")
                if computed != checksums[number].tobytes():
                    raise self._damage(
                        shard, f"holds other data than was harvested (chunk {number}): swapped or replaced"
                    )
        finally:
            os.close(descriptor)

    def _open(self, shard: int) -> tuple[int, np.ndarray]:
        """A descriptor of the file of a shard, and the checksums of its chunks."""
        chunks, layout = self.layout.geometry.chunks_of(shard), self.layout
        if shard in layout.kept:
            try:
                return os.open(layout.shard(shard), os.O_RDONLY), self._checksums[chunks.start : chunks.stop]
            except OSError as error:
                raise self._damage(shard, f"cannot be opened: {error.strerror}") from None
        while True:
            with suppress(FileNotFoundError):
                # Opened first: once it is, whoever removes shards cannot take it away.
                descriptor, marker = os.open(layout.shard(shard), os.O_RDONLY), layout.read_marker(shard)
                if marker is not None:
                    return descriptor, decode(marker["checksums"], "<u4")
                os.close(descriptor)
            if self.maker is None:
                raise TsaeError(
                    f"{layout.path}: shard {shard} has left the window, and nothing makes it again here; "
                    "open the store with its configuration: tsae.store.rolling.open_store(config)"
                )
            self.maker.make(shard)

    def _check_frame(self, shard: int, descriptor: int) -> None:
        """Size and index of a shard, once per shard and process."""
        problem = frame_problem(self.layout, shard, descriptor)
        if problem:
            raise self._damage(shard, problem)
        self._sound.add(shard)

    def _damage(self, shard: int, problem: str) -> TsaeError:
        return TsaeError(self.layout.complaint(shard, problem))


def uninitialised(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """`torch.empty` in memory from numpy, which asks for huge pages: a third less time to fill and to gather from."""
    count = math.prod(shape)
    memory = np.empty(max(count, 1) * dtype.itemsize, np.uint8)
    return torch.from_numpy(memory).view(dtype)[:count].view(shape)


def frame_problem(layout: StoreLayout, shard: int, descriptor: int) -> str:
    """What is wrong with the size or the index of an open shard file; empty if nothing."""
    geometry = layout.geometry
    size, expected = os.fstat(descriptor).st_size, geometry.shard_bytes(shard)
    if size != expected:
        return f"has {size} bytes instead of {expected}"
    if os.pread(descriptor, geometry.index_bytes, expected - geometry.index_bytes) != geometry.index(shard):
        return "has a damaged index"
    return ""


def _read_fully(descriptor: int, buffers: list[memoryview], offset: int) -> bool:
    """Fill the buffers from `offset` on; False if the file ends before."""
    while buffers:
        got = os.preadv(descriptor, buffers, offset)
        if got == 0:
            return False
        offset += got
        while buffers and got >= len(buffers[0]):
            got -= len(buffers.pop(0))
        if got:
            buffers[0] = buffers[0][got:]
    return True


def _runs(chunks: np.ndarray, most: int) -> list[tuple[int, int]]:
    """Sorted chunk numbers as ranges [first, last) of at most `most` consecutive ones."""
    runs: list[tuple[int, int]] = []
    for chunk in chunks.tolist():
        if runs and runs[-1][1] == chunk and chunk - runs[-1][0] < most:
            runs[-1] = (runs[-1][0], chunk + 1)
        else:
            runs.append((chunk, chunk + 1))
    return runs
