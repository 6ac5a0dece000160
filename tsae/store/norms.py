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
from tsae.store.geometry import CRC_BYTES, Geometry, crc32c
from tsae.store.layout import NORMS, StoreLayout, digest

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


def read(layout: StoreLayout) -> np.ndarray | None:
    """[N, L] float32 of the measured shards' sequences, or None if any of it is missing or damaged: it can be made again."""
    found = [_read_chunk(layout, shard) for shard in layout.measured]
    whole = [chunk for chunk in found if chunk is not None]
    return np.concatenate(whole) if len(whole) == len(found) else None


def recorded(layout: StoreLayout) -> np.ndarray | None:
    """The same as the store's digest has it, or None where it has none or they are damaged."""
    wanted = layout.attributes["digests"].get(NORMS)
    norms = read(layout) if wanted is not None else None
    return norms if norms is not None and digest(norms) == wanted else None


def add(layout: StoreLayout, activations: Callable[[np.ndarray], Tensor]) -> np.ndarray:
    """The same of a complete store that has none, made from its activations [S, L, D] and kept beside them.

    What another process is making is waited for; where nothing may be written, they are only made.
    """
    if not os.access(layout.path, os.W_OK):
        return np.concatenate(list(_made(layout, activations)))
    with locks.hold_when_free(layout.path / "norms.lock", str(layout.path)):
        norms = recorded(layout)
        return _add(layout, activations) if norms is None else norms


def _add(layout: StoreLayout, activations: Callable[[np.ndarray], Tensor]) -> np.ndarray:
    norms = np.concatenate(list(_made(layout, activations)))
    if not _metadata(layout).exists():
        _create_beside(layout)
    first = 0
    for shard in layout.measured:
        rows = len(layout.geometry.sequences_of(shard))
        write(layout, shard, [norms[first : first + rows]])
        first += rows
    record(layout, norms)
    return norms


def quantiles(layout: StoreLayout, norms: np.ndarray) -> dict[str, float]:
    """Per cent → quantile of the norms of the sample's tokens after the first position that belong to a document."""
    found = norms[: layout.sample, 1:][layout.document[: layout.sample, 1:] >= 0]
    values = np.quantile(found, np.array(PER_CENT) / 100) if len(found) else np.zeros(len(PER_CENT))
    return {f"{share:g}": float(value) for share, value in zip(PER_CENT, values, strict=True)}


def record(layout: StoreLayout, norms: np.ndarray) -> None:
    """Keep the digest of the norms with those of the other arrays."""
    layout.set_attributes(digests={**layout.attributes["digests"], NORMS: digest(norms)})


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


def _read_chunk(layout: StoreLayout, shard: int) -> np.ndarray | None:
    """[S, L] of one shard; None if it is missing or damaged."""
    geometry, path = layout.geometry, _chunk(layout, shard)
    data = path.read_bytes() if path.exists() else b""
    size = geometry.shard_sequences * geometry.context_length * 4
    if len(data) != size + CRC_BYTES or crc32c(data[:size]) != data[size:]:
        return None
    chunk = np.frombuffer(data[:size], "<f4").reshape(geometry.shard_sequences, geometry.context_length)
    return chunk[: len(geometry.sequences_of(shard))]
