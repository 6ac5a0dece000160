"""Writing a store: prepare it once, write whole shards in any order and from any number of tasks, finalise.

    layout = prepare(path, contexts, activation_dim, store=config.store)
    write_shard(layout, shard, activations)     # for every shard
    finalise(layout)

Where the activations come from is the caller's business: a language model (`harvest`) or anything else.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from tsae.config import schema
from tsae.config.sections import StoreConfig
from tsae.runtime import files, metadata
from tsae.runtime.errors import TsaeError
from tsae.runtime.rows import Rows
from tsae.store import geometry as cutting
from tsae.store import layout as layouts
from tsae.store import norms
from tsae.store.geometry import Geometry, crc32c
from tsae.store.layout import StoreLayout, decode, digest, encode

if TYPE_CHECKING:
    from tsae.data.contexts import Contexts

SAMPLE_TOKENS = 2**18
"""Positions at the beginning of a rolling store that its statistics are of, whatever the window: 2,048 contexts of 128."""
TORCH_DTYPE = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
DISK_DTYPE = {"bfloat16": "uint16", "float16": "float16", "float32": "float32"}
# What stands where nothing was written is NaN, so that a hole can never pass for data.
BFLOAT16_NAN = 0x7FC0


@dataclasses.dataclass
class Summary:
    """Sums in float64 over activations of one width D.

    Gathered shard by shard and merged in shard order: how the work is cut over tasks does not change a bit of them.
    """

    count: int
    total: np.ndarray  # [D]
    squares: np.ndarray  # [D]
    largest: np.ndarray  # [D] largest magnitude

    @classmethod
    def empty(cls, activation_dim: int) -> Summary:
        """The summary of no activations."""
        return cls(0, *(np.zeros(activation_dim) for _ in range(3)))

    def add(self, activations: Tensor) -> None:
        """Take in activations [n, D]."""
        if len(activations) == 0:
            return
        values = activations.to(torch.float64)
        self.count += len(values)
        self.total += values.sum(0).cpu().numpy()
        self.squares += values.square().sum(0).cpu().numpy()
        self.largest = np.maximum(self.largest, values.abs().amax(0).cpu().numpy())

    def to_json(self) -> dict[str, Any]:
        """The sums, exactly: float64 in base64."""
        arrays = {"total": self.total, "squares": self.squares, "largest": self.largest}
        return {"count": self.count, **{name: encode(array, "<f8") for name, array in arrays.items()}}

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Summary:
        """The summary that `to_json` wrote."""
        return cls(record["count"], *(decode(record[name], "<f8") for name in ("total", "squares", "largest")))

    @classmethod
    def merged(cls, summaries: Iterable[Summary], activation_dim: int) -> Summary:
        """One summary of several, added up in their order."""
        merged = cls.empty(activation_dim)
        for summary in summaries:
            merged.count += summary.count
            merged.total += summary.total
            merged.squares += summary.squares
            merged.largest = np.maximum(merged.largest, summary.largest)
        return merged

    @classmethod
    def of(cls, statistics: dict[str, Any]) -> Summary:
        """The summary of which `statistics` were made, but for rounding."""
        count, mean, variance = (np.array(statistics[name]) for name in ("count", "mean", "variance"))
        return cls(int(count), count * mean, count * (variance + mean**2), np.array(statistics["max_abs"]))

    def without(self, part: Summary) -> Summary:
        """The summary of what remains without a part; its largest magnitudes may be those of the part."""
        return Summary(self.count - part.count, self.total - part.total, self.squares - part.squares, self.largest)

    def statistics(self) -> dict[str, Any]:
        """The attribute `statistics`: `count`, `mean` [D], `variance` [D], `mean_squared_norm`, `max_abs` [D], `gamma`.

        gamma = ‖mean‖ / ‖standard deviation‖ (arXiv 2605.31518): far above 1, what tokens have in common hides what they
        do not. None where nothing varies.
        """
        count = max(self.count, 1)
        mean = self.total / count
        spread = np.maximum(self.squares / count - mean**2, 0).sum()
        return {
            "of": "training part, positions after the first that belong to a document",
            "count": self.count,
            "mean": mean.tolist(),
            "variance": np.maximum(self.squares / count - mean**2, 0).tolist(),
            "mean_squared_norm": float(self.squares.sum() / count),
            "max_abs": self.largest.tolist(),
            "gamma": float(np.sqrt(np.square(mean).sum() / spread)) if spread > 0 else None,
        }


def prepare(
    path: str | Path,
    contexts: Contexts,
    activation_dim: int,
    *,
    store: StoreConfig,
    attributes: Mapping[str, Any] | None = None,
    extras: Mapping[str, np.ndarray] | None = None,
) -> StoreLayout:
    """Create a store without activations at `path`: its final shape, tokens, lengths, documents, labels.

    The folder appears whole or not at all; if another process was first, its store is kept. `attributes` are added
    to the group's, `extras` (named as in `layout.EXTRAS`) to the arrays. Raises TsaeError if `path` holds something
    else.
    """
    layout = StoreLayout(path)
    if layout.exists():
        return layout
    layout.path.parent.mkdir(parents=True, exist_ok=True)
    files.discard_drafts(layout.path.parent, layout.path.name)
    draft = files.draft_of(layout.path)
    try:
        _write_draft(draft, contexts, activation_dim, store, dict(attributes or {}), dict(extras or {}))
        os.rename(draft, layout.path)
        files.sync_folder(layout.path.parent)
    except OSError:
        if not layout.exists():
            raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return layout


def _write_draft(
    path: Path,
    contexts: Contexts,
    activation_dim: int,
    store: StoreConfig,
    attributes: dict[str, Any],
    extras: dict[str, np.ndarray],
) -> None:
    import zarr
    from zarr.codecs import BytesCodec, Crc32cCodec, ZstdCodec

    sequences, length = contexts.tokens.shape
    geometry = cutting.choose(sequences, length, activation_dim, store.dtype, store.shard_mb)
    if store.window is not None:
        train = sequences - int(contexts.heldout)
        geometry = dataclasses.replace(geometry, shard_sequences=cutting.block_sequences(geometry, train))
        attributes["rolling"] = {"sample": min(train, -(-SAMPLE_TOKENS // length))}
    arrays: dict[str, Rows] = {name: getattr(contexts, name) for name in layouts.SIBLINGS} | extras
    group, digests = zarr.create_group(path), {}
    for name, rows in arrays.items():
        array = group.create_array(
            name,
            shape=rows.shape,
            dtype=rows.dtype,
            chunks=layouts.chunk_of(name, rows.shape),
            compressors=[Crc32cCodec()] if name in layouts.ON_DISK else [ZstdCodec(level=3), Crc32cCodec()],
            config={"write_empty_chunks": True},  # zarr leaves out the file of a chunk of zeros
            dimension_names={**layouts.SIBLINGS, **layouts.EXTRAS}[name],
        )
        digests[name] = digest(rows, array.chunks[0], array.__setitem__)
    group.create_array(
        "activations",
        shape=(sequences, length, activation_dim),
        dtype=DISK_DTYPE[store.dtype],
        chunks=(geometry.chunk_sequences, length, activation_dim),
        shards=(geometry.shard_sequences, length, activation_dim),
        serializer=BytesCodec(endian="little"),
        compressors=[Crc32cCodec()],
        filters=None,
        fill_value=BFLOAT16_NAN if store.dtype == "bfloat16" else float("nan"),
        attributes={"dtype": store.dtype},
        dimension_names=("sequence", "position", "dimension"),
    )
    norms.create(group, geometry)
    group.create_array(
        "checksums",
        shape=(geometry.chunks,),
        dtype="uint32",
        chunks=(geometry.chunks,),
        serializer=BytesCodec(endian="little"),
        compressors=[Crc32cCodec()],
        filters=None,
        dimension_names=("chunk",),
    )
    described = dataclasses.asdict(geometry)
    attributes = {
        "format": layouts.FORMAT,
        "version": layouts.VERSION,
        "identity": schema.stable_hash([described, digests, attributes]),
        **attributes,
        "dtype": store.dtype,
        "geometry": described,
        "heldout": int(contexts.heldout),
        "tokens": int(contexts.lengths.sum()),
        "label_names": list(contexts.label_names),
        "contexts": contexts.fingerprint,
        "digests": digests,
        "frames": {
            name: layouts.file_hash(path / name / "zarr.json") for name in (*arrays, "activations", "checksums")
        },
        "complete": False,
    }
    StoreLayout(path).write_attributes(attributes)
    for folder, _, names in os.walk(path):
        for name in names:
            with open(Path(folder) / name, "rb") as stream:
                os.fsync(stream.fileno())
        files.sync_folder(Path(folder))


def write_shard(layout: StoreLayout, shard: int, activations: Iterable[Tensor]) -> None:
    """Write one shard and its marker from its sequences' activations, given in order as tensors [S, L, D].

    Raises what `writing` does.
    """
    with writing(layout, shard) as write:
        for block in activations:
            write(block)


@contextmanager
def writing(layout: StoreLayout, shard: int) -> Iterator[Callable[[Tensor], None]]:
    """Take the activations of one shard's sequences, in order as tensors [S, L, D]; it and its marker are written at the end.

    Padding is stored as zeros. A process that dies leaves the shard as it was: the file is renamed into place when it
    is whole, and the marker follows. Raises TsaeError for NaN or infinite activations, ValueError for another number of
    sequences than the shard has.
    """
    geometry, rows = layout.geometry, layout.geometry.sequences_of(shard)
    path = layout.shard(shard)
    path.parent.mkdir(parents=True, exist_ok=True)
    files.discard_drafts(path.parent)
    files.discard_drafts(layout.marker(shard).parent)
    temporary = files.draft_of(path)
    summary, lengths, given = Summary.empty(geometry.activation_dim), [], 0
    try:
        with open(temporary, "wb", buffering=0) as stream:
            chunks = _ChunkStream(stream, geometry)

            def write(block: Tensor) -> None:
                nonlocal given
                if given + len(block) > len(rows):
                    raise ValueError(f"more sequences were given than the {len(rows)} of the shard")
                values = _storable(layout, rows.start + given, block, summary)
                if layout.is_measured(shard):
                    lengths.append(norms.of(values))
                chunks.append(_in_memory(values).view(torch.uint8).numpy().reshape(len(values), -1))
                given += len(block)

            yield write
            if given != len(rows):
                raise ValueError(f"only {given} sequences were given for a shard of {len(rows)}")
            chunks.finish(geometry.index(shard))
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    for folder in (path.parent, path.parent.parent, path.parent.parent.parent, layout.activations):
        files.sync_folder(folder)
    marker = {
        "store": layout.identity,
        "shard": shard,
        "sequences": len(rows),
        "bytes": geometry.shard_bytes(shard),
        "checksums": encode(np.concatenate(chunks.checksums), "<u4"),
        "written_by": {"host": socket.gethostname(), "pid": os.getpid(), "job": os.environ.get("SLURM_JOB_ID")},
    }
    if layout.is_measured(shard):
        norms.write(layout, shard, lengths)
        marker["summary"] = summary.to_json()
    metadata.write(layout.marker(shard), marker)


def _storable(layout: StoreLayout, first: int, block: Tensor, summary: Summary) -> Tensor:
    """What is stored of activations [S, L, D] of the sequences from `first` on, contiguous; `summary` takes it in."""
    dtype = TORCH_DTYPE[layout.geometry.dtype]
    rows = slice(first, first + len(block))
    lengths = torch.from_numpy(layout.lengths[rows]).to(block.device)
    positions = torch.arange(block.shape[1], device=block.device)
    real = positions < lengths[:, None]
    values = torch.where(real[..., None], block, 0).to(dtype).contiguous()
    finite = torch.isfinite(values).flatten(1).all(1)
    if not bool(finite.all()):
        sequence = first + int((~finite).nonzero()[0])
        remedy = " or do not fit float16; choose store.dtype bfloat16" if dtype == torch.float16 else ""
        raise TsaeError(f"{layout.path}: the activations of sequence {sequence} are not finite{remedy}")
    document = torch.from_numpy(layout.document[rows]).to(block.device)
    sequences = torch.arange(first, first + len(block), device=block.device)
    summary.add(values[(document >= 0) & (positions > 0) & (sequences < layout.sample)[:, None]])
    return values


def _in_memory(values: Tensor) -> Tensor:
    """`values` where the processor can read them; those of a GPU come without it, beside what else goes on there."""
    if not values.is_cuda:
        return values
    copied = torch.empty(values.shape, dtype=values.dtype, pin_memory=True).copy_(values, non_blocking=True)
    torch.cuda.current_stream(values.device).synchronize()
    return copied


class _ChunkStream:
    """Cuts sequences into chunks, each followed by its checksum."""

    def __init__(self, stream: BinaryIO, geometry: Geometry) -> None:
        self._stream, self._filled = stream, 0
        hole = np.array([BFLOAT16_NAN], "<u2") if geometry.dtype == "bfloat16" else np.array([np.nan], geometry.dtype)
        self._hole = np.tile(hole.view(np.uint8), geometry.sequence_bytes // hole.itemsize)
        self._chunk = np.empty((geometry.chunk_sequences, geometry.sequence_bytes), np.uint8)
        self.checksums: list[np.ndarray] = []

    def append(self, sequences: np.ndarray) -> None:
        """Take the bytes [S, sequence_bytes] of the next sequences."""
        while len(sequences):
            taken = min(len(self._chunk) - self._filled, len(sequences))
            self._chunk[self._filled : self._filled + taken] = sequences[:taken]
            sequences = sequences[taken:]
            self._filled += taken
            if self._filled == len(self._chunk):
                self._flush()

    def finish(self, index: bytes) -> None:
        """Fill up the last chunk and end the shard with its index."""
        if self._filled:
            self._chunk[self._filled :] = self._hole
            self._flush()
        _write_fully(self._stream, index)

    def _flush(self) -> None:
        checksum = crc32c(self._chunk)
        _write_fully(self._stream, self._chunk)
        _write_fully(self._stream, checksum)
        self.checksums.append(np.frombuffer(checksum, "<u4"))
        self._filled = 0


def _write_fully(stream: BinaryIO, data: bytes | np.ndarray) -> None:
    remaining = memoryview(data).cast("B")  # type: ignore[arg-type]
    while len(remaining):
        remaining = remaining[stream.write(remaining) :]


def finalise(layout: StoreLayout) -> None:
    """Write the checksums, the statistics and the manifest, then declare the store complete.

    Any task may call it, several at once too. Raises TsaeError naming the shards that are missing.
    """
    geometry = layout.geometry
    found = [(shard, layout.read_marker(shard)) for shard in layout.measured]
    missing = [shard for shard, marker in found if marker is None]
    if missing:
        raise TsaeError(f"{layout.path}: shards {missing} are not written; run the same harvest again")
    markers = [marker for _, marker in found if marker is not None]
    checksums = np.zeros(geometry.chunks, "<u4")
    for marker in markers:
        chunks = geometry.chunks_of(marker["shard"])
        checksums[chunks.start : chunks.stop] = decode(marker["checksums"], "<u4")
    layout.write_checksums(checksums)
    summary = Summary.merged((Summary.from_json(marker["summary"]) for marker in markers), geometry.activation_dim)
    manifest = {
        "shards": len(markers),
        "bytes": sum(marker["bytes"] for marker in markers),
        "checksums": digest(checksums),
    }
    statistics, lengths = summary.statistics(), norms.read(layout)
    if layout.rolling:
        statistics["of"] = f"the first {layout.sample} sequences, {statistics['of']}"
    if lengths is not None:  # of a harvest that an earlier version began, they are made when they are needed
        norms.record(layout, lengths)
        statistics["norm_quantiles"] = norms.quantiles(layout, lengths)
    layout.set_attributes(statistics=statistics, manifest=manifest, complete=True)
