"""Check a store against its own records, without the language model or the text that made it."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from tsae.runtime.errors import TsaeError
from tsae.runtime.progress import Progress
from tsae.store.geometry import crc32c
from tsae.store.layout import StoreLayout, decode
from tsae.store.reader import frame_problem
from tsae.store.window import held


def verify(path: str | Path, deep: bool = False) -> list[str]:
    """The problems of a store, one line each, naming the shard; none if it is sound.

    Checks presence, size, index and marker of every shard and the arrays beside the activations; `deep` reads every
    chunk and recomputes its checksum. Raises TsaeError if there is no store at `path`.
    """
    layout = StoreLayout(path)
    problems = [] if layout.attributes["complete"] else [f"{layout.path}: the harvest is not finished"]
    arrays = list(layout.attributes["digests"])
    checks = [(layout.check_array, arrays), (layout.check_frame, [*arrays, "activations", "checksums"])]
    for check, name in ((check, name) for check, names in checks for name in names):
        try:
            check(name)
        except TsaeError as error:
            problems.append(str(error))
    checksums = None
    if layout.attributes["complete"]:
        try:
            checksums = layout.read_checksums()
        except TsaeError as error:
            problems.append(str(error))
    shards = [*held(layout), *layout.kept] if layout.rolling else [*layout.kept]
    progress = Progress("verify", len(shards), "shards")
    for done, shard in enumerate(shards, start=1):
        problem = _shard_problem(layout, shard, checksums, deep)
        if problem:
            problems.append(layout.complaint(shard, problem))
        progress.update(done, problems=len(problems))
    return problems


def _shard_problem(layout: StoreLayout, shard: int, checksums: np.ndarray | None, deep: bool) -> str:
    if layout.size_of(shard) is None:
        return "is missing"
    marker = layout.read_marker(shard)
    if marker is None:
        return "has no valid marker: it was not finished, or comes from another store"
    wanted = decode(marker["checksums"], "<u4")
    if checksums is not None and layout.is_measured(shard):
        chunks = layout.geometry.chunks_of(shard)
        if not np.array_equal(checksums[chunks.start : chunks.stop], wanted):
            return "was written again after the store was completed"
    descriptor = os.open(layout.shard(shard), os.O_RDONLY)
    try:
        return frame_problem(layout, shard, descriptor) or _content_problem(layout, descriptor, wanted, deep)
    finally:
        os.close(descriptor)


def _content_problem(layout: StoreLayout, descriptor: int, wanted: np.ndarray, deep: bool) -> str:
    """Compare the checksums beside the chunks with the marker's; `deep` recomputes them from the data."""
    geometry = layout.geometry
    for number, checksum in enumerate(wanted):
        offset = number * geometry.stride
        if deep:
            data = np.frombuffer(os.pread(descriptor, geometry.stride, offset), np.uint8)
            stored = data[geometry.chunk_bytes :].tobytes()
            if crc32c(data[: geometry.chunk_bytes]) != stored:
                return f"is damaged: chunk {number} fails its checksum"
        else:
            stored = os.pread(descriptor, 4, offset + geometry.chunk_bytes)
        if stored != checksum.tobytes():
            return f"holds other data than its marker says (chunk {number}): swapped or replaced"
    return ""
