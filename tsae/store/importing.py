"""Activations of any model into a store: arrays of vision, audio or protein models train like those of a language model.

Arrays [S, L, D] are S sequences; of arrays [N, D], N vectors in a row, every `context_length` become one, cut anew where a
document ends. Sequences are put into a random order, with whole documents held out, and padded to one length.

An example: 1,000 vectors, documents of 300 and 700 of them and contexts of 128 are 9 sequences, 128 + 128 + 44 vectors of
the first document and 5 · 128 + 60 of the second. One document is held out, so with `holdout` 0.1 at least 3 of the 9.
"""

from __future__ import annotations

import hashlib
import itertools
import shutil
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tsae.config import schema
from tsae.config.sections import StoreConfig
from tsae.data.contexts import Contexts
from tsae.runtime import contents, locks, preemption
from tsae.runtime.errors import TsaeError
from tsae.runtime.progress import Progress
from tsae.store.filling import require_room, write_missing
from tsae.store.layout import StoreLayout, digest
from tsae.store.writer import prepare

AT_ONCE = 64
"""Sequences that are read at a time."""
HASHED = 4096
"""Rows of an array in memory that are hashed at a time."""
FLOATS = ("bfloat16", "float16", "float32", "float64")


class Array:
    """Rows of an array [N, D] or [S, L, D]: of numpy, torch or zarr, or in a file, of which only what is asked for is read."""

    def __init__(self, array: Any, name: str, content: str = "") -> None:
        """`array` has a shape, a dtype and slices; `content` is the hash of the file that holds it. Raises TsaeError."""
        self._array, self.name, self.shape = array, name, tuple(array.shape)
        self.dtype = str(array.dtype).removeprefix("torch.")
        if len(self.shape) not in (2, 3) or self.dtype not in FLOATS or 0 in self.shape:
            raise TsaeError(
                f"{name}: is {self.dtype} {list(self.shape)}; floating-point arrays [vectors, dimensions] or "
                "[sequences, positions, dimensions] are expected"
            )
        if self.shape[1] == 1 and len(self.shape) == 3:
            raise TsaeError(f"{name}: has sequences of one position; give it as [vectors, dimensions]")
        # A compressed array is read chunk by chunk, so rows of a chunk stay together.
        self.chunk = int((getattr(array, "chunks", None) or (1,))[0])
        self._kept: tuple[int, Tensor] = (-1, torch.empty(0))
        self._content = content

    @property
    def about(self) -> dict[str, Any]:
        """What tells it from any other array; of one that is in no file its values are read for it."""
        if not self._content:
            hasher = hashlib.sha256()
            for start in preemption.polled(range(0, self.shape[0], HASHED)):
                hasher.update(self.read(start, min(start + HASHED, self.shape[0])).contiguous().numpy().data)
            self._content = hasher.hexdigest()
        return {"name": Path(self.name).name, "shape": list(self.shape), "dtype": self.dtype, "content": self._content}

    def read(self, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop` [n, …] as float32."""
        if self.chunk == 1:
            return _tensor(self._array[start:stop])
        parts = []
        for chunk in range(start // self.chunk, -(-stop // self.chunk)):
            first = chunk * self.chunk
            if self._kept[0] != chunk:
                self._kept = chunk, _tensor(self._array[first : first + self.chunk])
            parts.append(self._kept[1][max(start - first, 0) : stop - first])
        return torch.cat(parts)


def _tensor(values: Any) -> Tensor:
    return values.float() if isinstance(values, Tensor) else torch.from_numpy(np.array(values, np.float32))


def open_array(path: Path, key: str | None = None) -> Array:
    """The array in a .npy or .safetensors file or a zarr folder; `key` names one of several. Raises TsaeError."""
    try:
        if path.suffix == ".npy":
            found: Any = np.load(path, mmap_mode="r", allow_pickle=False)
        elif path.suffix == ".safetensors":
            found = _of_safetensors(path, key)
        elif path.is_dir():
            found = _of_zarr(path, key)
        else:
            raise TsaeError(f"{path}: a .npy or .safetensors file, or a zarr folder, is expected")
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise TsaeError(f"{path}: cannot be read as an array: {error}") from None
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    return Array(found, str(path), contents.sha256_of_all(files, path))


def _of_safetensors(path: Path, key: str | None) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        stream = safe_open(path, "pt")
        name = _chosen(path, key, stream.keys())
        part = stream.get_slice(name)
        # Its own words for dtypes are others; a slice without rows has the one that will be read.
        return _Slice(part, tuple(part.get_shape()), part[0:0].dtype)
    except SafetensorError as error:
        raise TsaeError(f"{path}: cannot be read as an array: {error}") from None


class _Slice(NamedTuple):
    """A tensor in a file."""

    part: Any
    shape: tuple[int, ...]
    dtype: torch.dtype

    def __getitem__(self, rows: Any) -> Any:
        return self.part[rows]


def _of_zarr(path: Path, key: str | None) -> Any:
    import zarr

    found = zarr.open(path, mode="r")
    if isinstance(found, zarr.Group):
        return found[_chosen(path, key, [name for name, _ in found.arrays()])]
    return found


def _chosen(path: Path, key: str | None, names: Sequence[str]) -> Any:
    if key is None and len(names) == 1:
        return names[0]
    if key not in names:
        raise TsaeError(f"{path}: has {', '.join(sorted(names)) or 'no arrays'}; name one with --key")
    return key


def read_column(path: Path) -> np.ndarray:
    """[n] numbers or words, from a .npy file or the lines of a text file. Raises TsaeError."""
    try:
        if path.suffix == ".npy":
            return np.load(path, allow_pickle=False)
        return np.array(path.read_text(encoding="utf-8").splitlines())
    except (OSError, ValueError) as error:
        raise TsaeError(
            f"{path}: a .npy file of one dimension, or a text file with a line for each, is expected: {error}"
        ) from None


def import_arrays(
    arrays: Sequence[Any],
    path: str | Path,
    *,
    lengths: Any = None,
    documents: Any = None,
    labels: Any = None,
    name: str = "imported",
    context_length: int = 128,
    store: StoreConfig | None = None,
    holdout: float = 0.1,
    seed: int = 0,
) -> Path:
    """Write `arrays`, all [N, D] or all [S, L, D] and one after another, into a store at `path`; return the path.

    `lengths` [S] are the vectors of each sequence that are no padding; `documents` and `labels`, [S] or [N], say what each
    sequence or vector belongs to, and what that is: without `documents` every sequence is one of its own. `holdout` is the
    share of the sequences that whole documents are held out for, chosen by `seed`; `name` says what the activations are of.
    The same call continues after a kill. Train on it with `data.source: store` and `store.path`.

    Raises TsaeError for arrays that do not fit together, fewer than two documents, activations that are not finite, and a
    path that holds something else.
    """
    layout, settings = StoreLayout(path), store or StoreConfig()
    opened = [one if isinstance(one, Array) else Array(one, f"array {number}") for number, one in enumerate(arrays)]
    if len({one.shape[1:] for one in opened}) != 1:
        told = ", ".join(f"{one.name} {list(one.shape)}" for one in opened)
        raise TsaeError(f"arrays of one shape but for their first size are expected, not {told or 'none'}")
    rows = _rows(opened, lengths, documents, context_length)
    contexts = _contexts(rows, opened, labels, holdout, seed)
    made = contexts.made
    cut = [digest(array) for array in (made.lengths, made.document, made.label)]
    about = {
        "name": name,
        "arrays": [one.about for one in opened],
        "cut": schema.stable_hash([cut, made.label_names, made.heldout, seed]),
        "dtype": settings.dtype,
    }
    if layout.exists() and layout.attributes["model"] != about:
        raise TsaeError(f"{layout.path}: holds other activations; choose another place, or remove the folder")
    attributes = {"model": about, "packages": {package: version(package) for package in ("tsae", "zarr", "torch")}}
    begun = layout.exists()
    with locks.hold(layout.path.with_name(f"{layout.path.name}.harvest_0of1.lock"), "import"):
        prepare(layout.path, made, opened[0].shape[-1], store=settings, attributes=attributes)
        if not layout.is_whole():
            require_room([(layout, layout.measured)])
            reading = _Reading(opened, rows, contexts.order, layout)
            try:
                write_missing([layout], layout.measured, reading.activations)
            except TsaeError:
                if not begun and not any(map(layout.is_written, layout.measured)):
                    shutil.rmtree(layout.path)  # the place stays free
                raise
    return layout.path


class _Rows(NamedTuple):
    """The sequences, in the order of the arrays."""

    start: np.ndarray
    """[S] the first of its vectors, or its place in arrays of sequences."""
    size: np.ndarray
    """[S] its vectors."""
    document: np.ndarray
    """[S] its document, numbered in order of appearance."""
    names: np.ndarray
    """[documents] the first vector or sequence of each."""
    length: int
    """What all are padded to."""


def _rows(arrays: Sequence[Array], lengths: Any, documents: Any, context_length: int) -> _Rows:
    total, is_cut = sum(one.shape[0] for one in arrays), len(arrays[0].shape) == 3
    given = None if documents is None else _column(documents, total, "documents", is_cut)
    if not is_cut:
        if lengths is not None:
            raise TsaeError(
                "lengths: are of sequences [S, L, D]; vectors [N, D] are cut by context_length and documents"
            )
        breaks = np.flatnonzero(given[1:] != given[:-1]) + 1 if given is not None else np.zeros(0, np.int64)
        edges = np.array([0, *breaks, total])
        pieces = [np.arange(first, last, context_length) for first, last in itertools.pairwise(edges)]
        start, end = np.concatenate(pieces), np.repeat(edges[1:], [*map(len, pieces)])
        size, length = np.minimum(context_length, end - start), context_length
    else:
        start, length = np.arange(total), arrays[0].shape[1]
        size = np.full(total, length) if lengths is None else _column(lengths, total, "lengths", is_cut)
        if size.dtype.kind not in "iu" or size.min() < 1 or size.max() > length:
            raise TsaeError(f"lengths: whole numbers from 1 to {length} are expected")
    named = np.arange(len(start)) if given is None else given[start]
    _, first, number = np.unique(named, return_index=True, return_inverse=True)
    turn = np.argsort(np.argsort(first))
    return _Rows(start, size, turn[number.reshape(-1)], start[np.sort(first)], length)


def _column(values: Any, total: int, what: str, is_cut: bool) -> np.ndarray:
    column = np.asarray(values)
    if column.shape != (total,):
        unit = "sequence" if is_cut else "vector"
        raise TsaeError(f"{what}: one for each of the {total} {unit}s is expected, not {list(column.shape)}")
    return column


class _Made(NamedTuple):
    made: Contexts
    order: np.ndarray
    """[S] the sequences in the order of the store."""


def _contexts(rows: _Rows, arrays: Sequence[Array], labels: Any, holdout: float, seed: int) -> _Made:
    random, count = np.random.default_rng(seed), len(rows.names)
    if count < 2:
        raise TsaeError("documents: at least two are needed, one to train on and one to hold out")
    sizes = np.bincount(rows.document, minlength=count)
    chosen = random.permutation(count)
    share = min(int(np.searchsorted(np.cumsum(sizes[chosen]), holdout * len(rows.start))) + 1, count - 1)
    held_out = np.isin(rows.document, chosen[:share])
    # What one chunk of a compressed array holds stays together.
    block = np.unique(rows.start // arrays[0].chunk, return_inverse=True)[1].reshape(-1)
    turns = random.permutation(block.max() + 1)[block]
    shuffled = np.lexsort((random.permutation(len(block)), turns, held_out))
    inside = np.arange(rows.length) < rows.size[shuffled, None]
    names: Any = ()
    label: np.ndarray = np.full(count, -1)
    if labels is not None:
        is_cut = len(arrays[0].shape) == 3
        column = _column(labels, sum(one.shape[0] for one in arrays), "labels", is_cut)
        words = np.array([str(word) for word in column])
        each = rows.document if is_cut else np.repeat(rows.document, rows.size)
        if (words != words[rows.names][each]).any():
            raise TsaeError("labels: all of a document must have the same")
        names, label = np.unique(words[rows.names], return_inverse=True)
    made = Contexts(
        tokens=np.zeros(inside.shape, np.int32),
        lengths=rows.size[shuffled].astype(np.int32),
        document=np.where(inside, rows.document[shuffled, None], -1).astype(np.int32),
        label=label.astype(np.int32).reshape(-1),
        label_names=tuple(map(str, names)),
        heldout=int(held_out.sum()),
        fingerprint="",
    )
    return _Made(made, shuffled)


class _Reading:
    """The sequences of a store, read from the arrays, with progress."""

    def __init__(self, arrays: Sequence[Array], rows: _Rows, order: np.ndarray, layout: StoreLayout) -> None:
        self._arrays, self._rows, self._order, self._layout = arrays, rows, order, layout
        self._ends = np.cumsum([one.shape[0] for one in arrays])
        self._progress = Progress("import", len(order), "sequences", layout.progress)

    def activations(self, shard: int, _: Sequence[int]) -> Iterator[list[Tensor]]:
        """The activations [S, L, D] of one shard, some sequences at a time."""
        place = self._layout.geometry.sequences_of(shard)
        for first in preemption.polled(range(place.start, place.stop, AT_ONCE)):
            last = min(first + AT_ONCE, place.stop)
            block = torch.zeros(last - first, self._rows.length, self._layout.geometry.activation_dim)
            for row, sequence in enumerate(self._order[first:last]):
                start, size = int(self._rows.start[sequence]), int(self._rows.size[sequence])
                if len(self._arrays[0].shape) == 3:
                    block[row, :size] = self._read(start, start + 1)[0, :size]
                else:
                    block[row, :size] = self._read(start, start + size)
            yield [block]
            self._progress.update(last)

    def _read(self, start: int, stop: int) -> Tensor:
        """Rows of all arrays together."""
        parts = []
        for array, end in zip(self._arrays, self._ends, strict=True):
            first = end - array.shape[0]
            if start < end and stop > first:
                parts.append(array.read(max(start - first, 0), min(stop, end) - first))
        return torch.cat(parts)
