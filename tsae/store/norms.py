"""The norm of every position of a store, beside its activations: what tells massive tokens from ordinary ones.

The array `norms` has a chunk for each shard, which the shard's writer writes with it. In a store of an earlier version
there are none, and they are made when somebody first asks for them.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from tsae.runtime import files, locks, preemption
from tsae.runtime.progress import Progress
from tsae.runtime.rows import Rows, RowsOnDisk, parts
from tsae.store.geometry import CRC_BYTES, Geometry, crc32c
from tsae.store.layout import NORMS, StoreLayout, digest, remedy_of

if TYPE_CHECKING:
    import zarr

READ_BYTES = 16_000_000
PER_CENT = (0, 0.1, 1, 5, 25, 50, 75, 95, 99, 99.9, 100)


def create(group: zarr.Group, geometry: Geometry) -> None:
    """The frame of the array, without content."""
    from zarr.codecs import BytesCodec, Crc32cCodec

    group.create_array(
        NORMS,
        shape=(geometry.sequences, geometry.context_length),
        dtype="float32",
        chunks=(geometry.shard_sequences, geometry.context_length),
        serializer=BytesCodec(endian="little"),
        compressors=[Crc32cCodec()],
        filters=None,
        fill_value=float("nan"),
        dimension_names=("sequence", "position"),
    )


def of(activations: Tensor) -> np.ndarray:
    """Norms [S, L] float32 of activations [S, L, D], of the values as they are stored; the same on every machine.

    Summed in float64, so that the order of a sum shows in no digit that is kept.
    """
    norms = [torch.linalg.vector_norm(sequence, dim=-1, dtype=torch.float64) for sequence in activations]
    return torch.stack(norms).float().cpu().numpy()


def write(layout: StoreLayout, shard: int, norms: Iterable[np.ndarray]) -> None:
    """The norms of a shard's sequences, given in order as arrays [S, L]; nothing where the store has no place for them."""
    if not _metadata(layout).exists():
        return
    geometry = layout.geometry
    chunk = np.full((geometry.shard_sequences, geometry.context_length), np.nan, "<f4")
    rows = np.concatenate(list(norms))
    chunk[: len(rows)] = rows
    files.write_atomically(_chunk(layout, shard), lambda stream: stream.write(chunk.tobytes() + crc32c(chunk)))


def read(layout: StoreLayout) -> Rows | None:
    """[N, L] float32, NaN in shards that are not measured; None if any that is is missing or damaged: it can be made again."""
    if not all(_is_sound(layout, shard) for shard in layout.measured):
        return None
    geometry = layout.geometry
    return RowsOnDisk(
        (geometry.sequences, geometry.context_length),
        "<f4",
        lambda shard: _chunk(layout, shard),
        geometry.shard_sequences,
        remedy=remedy_of(NORMS),
        absent=float("nan"),
    )


def recorded(layout: StoreLayout) -> Rows | None:
    """The same as the store's digest has it, or None where it has none or they are damaged."""
    wanted = layout.attributes["digests"].get(NORMS)
    norms = read(layout) if wanted is not None else None
    return norms if norms is not None and digest(_measured(layout, norms)) == wanted else None


def _measured(layout: StoreLayout, norms: Rows) -> Rows:
    """Those that the digest is of."""
    return norms[layout.measured_sequences] if layout.rolling else norms


def add(layout: StoreLayout, activations: Callable[[np.ndarray], Tensor]) -> Rows:
    """The same of a complete store that has none, made from its activations [S, L, D] and kept beside them.

    What another process is making is waited for; where nothing may be written, they are only made.
    """
    if not os.access(layout.path, os.W_OK):
        norms = np.full((layout.geometry.sequences, layout.geometry.context_length), np.nan, np.float32)
        norms[layout.measured_sequences] = np.concatenate(list(_made(layout, activations)))
        return norms
    with locks.hold_when_free(layout.path / "norms.lock", str(layout.path)):
        return recorded(layout) or _add(layout, activations)


def _add(layout: StoreLayout, activations: Callable[[np.ndarray], Tensor]) -> Rows:
    made = np.concatenate(list(_made(layout, activations)))
    if not _metadata(layout).exists():
        _create_beside(layout)
    first = 0
    for shard in layout.measured:
        rows = len(layout.geometry.sequences_of(shard))
        write(layout, shard, [made[first : first + rows]])
        first += rows
    norms = read(layout)
    assert norms is not None
    record(layout, norms)
    return norms


def quantiles(layout: StoreLayout, norms: Rows) -> dict[str, float]:
    """Per cent → quantile of the norms of the sample's tokens after the first position that belong to a document."""

    def values() -> Iterator[np.ndarray]:
        for rows in parts(layout.sample, layout.geometry.context_length):
            yield norms[rows][:, 1:][layout.document[rows][:, 1:] >= 0]

    # Between two neighbours, as `numpy.quantile` of all values has it.
    pairs, between = neighbours(values, np.array(PER_CENT) / 100)
    found = [float(np.quantile(pair, share)) for pair, share in zip(pairs, between, strict=True)]
    return {f"{share:g}": value for share, value in zip(PER_CENT, found, strict=True)}


def neighbours(values: Callable[[], Iterator[np.ndarray]], shares: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[n, 2] float32: of all values the two between which each quantile lies, and [n] how far from the first of them.

    `values` gives the same blocks of float32 from 0 up twice. Such numbers are in the order of their bits, so that two
    counts of 65,536 entries find any of them exactly: of the upper halves of all, then of the lower ones of a few.
    """
    upper = np.zeros(2**16, np.int64)
    for block in values():
        upper += np.bincount(block.view(np.uint32) >> 16, minlength=2**16)
    ends, place = np.cumsum(upper), shares * max(int(upper.sum()) - 1, 0)
    ranks = np.stack([np.floor(place), np.ceil(place)], axis=1).astype(np.int64)
    if not ends[-1]:
        return np.zeros(ranks.shape, np.float32), place
    half = np.searchsorted(ends, ranks, side="right")
    lower = {int(number): np.zeros(2**16, np.int64) for number in np.unique(half)}
    for block in values():
        bits = block.view(np.uint32)
        for number, counts in lower.items():
            counts += np.bincount(bits[bits >> 16 == number] & 0xFFFF, minlength=2**16)
    found = np.zeros(ranks.shape, np.uint32)
    for number, counts in lower.items():
        here = half == number
        within = ranks[here] - (ends[number] - upper[number])
        found[here] = (number << 16) + np.searchsorted(np.cumsum(counts), within, side="right")
    return found.view(np.float32), place - np.floor(place)


def record(layout: StoreLayout, norms: Rows) -> None:
    """Keep the digest of the norms with those of the other arrays."""
    digests = {**layout.attributes["digests"], NORMS: digest(_measured(layout, norms))}
    layout.set_attributes(digests=digests)


def _made(layout: StoreLayout, activations: Callable[[np.ndarray], Tensor]) -> Iterator[np.ndarray]:
    """Norms [S, L] of the measured shards' sequences, some at a time."""
    rows, step = layout.measured_sequences, max(1, READ_BYTES // layout.geometry.sequence_bytes)
    progress = Progress("norms of activations", len(rows), "sequences")
    for first in preemption.polled(range(0, len(rows), step)):
        part = rows[first : first + step]
        yield of(activations(part))
        progress.update(first + len(part))


def _create_beside(layout: StoreLayout) -> None:
    """The array's frame in a store that was prepared without."""
    import zarr

    files.discard_drafts(layout.path, NORMS)
    draft = files.draft_of(layout.path / NORMS)
    create(zarr.create_group(draft), layout.geometry)
    shutil.rmtree(layout.path / NORMS, ignore_errors=True)
    os.rename(draft / NORMS, layout.path / NORMS)
    shutil.rmtree(draft)
    files.sync_folder(layout.path)


def _metadata(layout: StoreLayout) -> Path:
    return layout.path / NORMS / "zarr.json"


def _chunk(layout: StoreLayout, shard: int) -> Path:
    return layout.path / NORMS / "c" / str(shard) / "0"


def _is_sound(layout: StoreLayout, shard: int) -> bool:
    """Whether the norms of one shard are there and fit their checksum."""
    geometry, path = layout.geometry, _chunk(layout, shard)
    data = path.read_bytes() if path.exists() else b""
    size = geometry.shard_sequences * geometry.context_length * 4
    return len(data) == size + CRC_BYTES and crc32c(data[:size]) == data[size:]
