"""Arrays that stay on disk: of their rows only those that are asked for are read."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.lib.mixins import NDArrayOperatorsMixin

from tsae.runtime.errors import TsaeError

NUMBERS_AT_ONCE = 2**22


class Rows(Protocol):
    """What an array in memory and one on disk have in common."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of all of it."""

    @property
    def dtype(self) -> np.dtype:
        """Of its numbers."""

    def __len__(self) -> int:
        """How many rows there are."""

    def __getitem__(self, index: slice | np.ndarray) -> np.ndarray:
        """Some rows, in memory."""


def parts(count: int, width: int) -> Iterator[slice]:
    """`count` rows of `width` numbers in slices of at most 4 M numbers."""
    step = max(1, NUMBERS_AT_ONCE // width)
    return (slice(first, min(first + step, count)) for first in range(0, count, step))


class RowsOnDisk(NDArrayOperatorsMixin):
    """An array whose rows lie in files as plain little-endian numbers, `per_file` in each; what follows them is passed over.

    Nothing is kept in memory, so any number of processes may read one that is larger than all of it. An expression such as
    `rows >= 0` is that of the whole array.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        dtype: str,
        file_of: Callable[[int], Path],
        per_file: int,
        *,
        remedy: str,
        absent: float | None = None,
    ) -> None:
        """`remedy` says what mends a file that is not as it was; `absent` stands for the numbers of one that is not there."""
        self.shape, self.dtype = shape, np.dtype(dtype)
        self._file_of, self._per_file, self._remedy, self._absent = file_of, per_file, remedy, absent

    def __len__(self) -> int:
        return self.shape[0]

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> np.ndarray:
        """All of it, in memory: what numpy takes."""
        del copy  # it always is one
        return self[:] if dtype is None else self[:].astype(dtype)

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **options: Any) -> Any:
        inputs = tuple(np.asarray(each) if isinstance(each, RowsOnDisk) else each for each in inputs)
        return getattr(ufunc, method)(*inputs, **options)

    def __getitem__(self, index: Any) -> np.ndarray:
        """Rows, by a number, a slice or a list of numbers, and as slices or numbers what is wanted of them, as numpy has it.

        Raises TsaeError as `runs` does.
        """
        rows, *rest = index if isinstance(index, tuple) else (index,)
        if any(np.ndim(each) for each in rest if not isinstance(each, slice)):
            raise TypeError("of an array on disk, lists choose rows alone")
        if np.ndim(rows) == 0 and not isinstance(rows, slice):
            return self[np.array([rows])][(0, *rest)]
        wanted = np.arange(*rows.indices(len(self))) if isinstance(rows, slice) else np.asarray(rows, np.int64)
        wanted = np.where(wanted < 0, wanted + len(self), wanted)
        if len(wanted) and not (wanted.min() >= 0 and wanted.max() < len(self)):
            raise IndexError(f"rows {wanted.min()} to {wanted.max()} of {len(self)}")
        first = np.flatnonzero(np.diff(wanted, prepend=-2) != 1)
        return self.runs(wanted[first], np.diff(first, append=len(wanted)))[(slice(None), *rest)]

    def runs(self, starts: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        """The rows of runs, each given by its first row and its size, one after another.

        Raises TsaeError, naming the file, for one that is missing or too short.
        """
        found = np.empty((int(sizes.sum()), *self.shape[1:]), self.dtype)
        memory, at = found.reshape(-1).view(np.uint8).data, 0
        width = self.dtype.itemsize * int(np.prod(self.shape[1:]))
        with ExitStack() as opened:
            descriptors: dict[int, int | None] = {}
            for start, size in zip(starts.tolist(), sizes.tolist(), strict=True):
                while size:
                    number, within = divmod(start, self._per_file)
                    here = min(size, self._per_file - within)
                    if number not in descriptors:
                        descriptors[number] = self._open(number, opened)
                    descriptor, end = descriptors[number], at + here * width
                    if descriptor is None:
                        found.reshape(-1)[at // self.dtype.itemsize : end // self.dtype.itemsize] = self._absent
                    else:
                        offset = within * width
                        while at < end:
                            got = os.preadv(descriptor, [memory[at:end]], offset)
                            if not got:
                                raise TsaeError(f"{self._file_of(number)}: is too short; {self._remedy}")
                            at, offset = at + got, offset + got
                    at, start, size = end, start + here, size - here
        return found

    def _open(self, number: int, opened: ExitStack) -> int | None:
        path = self._file_of(number)
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            if self._absent is not None and isinstance(error, FileNotFoundError):
                return None
            raise TsaeError(f"{path}: cannot be read: {error.strerror}; {self._remedy}") from None
        opened.callback(os.close, descriptor)
        return descriptor
