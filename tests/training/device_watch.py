"""What a step would ask of a GPU, seen without one: what it reads back, what it copies there, and how often it launches.

On CUDA the host waits wherever it needs a number of the device: for a scalar, for the size of what `nonzero` or a mask
selects. All of that passes by here, each with the line of the package that asked for it. Reading a `Late` number is no
wait for what has just been launched; it has a way of its own, and is counted apart.

A launch is an operator that is no view and makes no empty tensor, or a kernel. Some operators (sort, cumsum, topk) are
several kernels of CUDA's.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import tsae
from tests.interpreter import all_kernels
from tsae.runtime.late import Late

PACKAGE = Path(tsae.__file__).parent
READS = {
    "aten::_local_scalar_dense",
    "aten::nonzero",
    "aten::masked_select",
    "aten::equal",
    "aten::_unique2",
    "aten::unique_dim",
    "aten::unique_consecutive",
    "aten::is_nonzero",
}
"""Operators whose result, or its size, the host waits for."""
INDEXED = {"aten::index", "aten::index_put_", "aten::index_put", "aten::_index_put_impl_"}
UNLAUNCHED = {"aten::empty", "aten::empty_like", "aten::new_empty", "aten::empty_strided", "aten::new_empty_strided"}
UNLAUNCHED |= {"aten::_unsafe_view", "aten::lift_fresh", "aten::detach", "aten::resize_", "aten::_reshape_alias"}
READING = {"tolist", "numpy", "cpu"}
"""Methods that read a tensor without an operator."""
COPIED = {torch.tensor, torch.as_tensor, Tensor.new_tensor}
"""What brings numbers of the host to the device, one small copy each."""


class Reads(Exception):
    """The step reads something back."""


def place() -> str:
    """The line of the package that is being run."""
    frame = sys._getframe(1)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(PACKAGE):
            return f"{path.relative_to(PACKAGE)}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back  # type: ignore[assignment]
    return "outside"


class Watch:
    """Counts by operator and place; with `strict`, a read raises `Reads`.

    Tensors of `host` would not be on the GPU; each is recognised by its memory.
    """

    def __init__(self, strict: bool = False, host: Iterable[Tensor] = ()) -> None:
        self.strict = strict
        self.host = {tensor.untyped_storage().data_ptr() for tensor in host}
        self.reads, self.copies, self.launches = Counter[str](), Counter[str](), Counter[str]()
        self.late = Counter[str]()

    def is_host(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self.host

    def read(self, what: str) -> None:
        self.reads[f"{what} at {place()}"] += 1
        if self.strict:
            raise Reads(f"{what} at {place()}")

    @property
    def launched(self) -> int:
        """Launches in all."""
        return sum(self.launches.values())

    @contextmanager
    def watching(self) -> Iterator[Watch]:
        """Look at what runs within."""
        found = all_kernels()
        launch = {kernel: kernel.run for kernel in found}
        for kernel in found:
            kernel.run = self._counted(kernel.__name__, launch[kernel])
        read = Late.read

        def read_late(late: Late) -> Any:
            self.late[place()] += 1
            with _disable_current_modes(), torch._C.DisableTorchFunction():
                return read(late)

        Late.read = read_late  # type: ignore[method-assign]
        try:
            with _Operators(self), _Methods(self):
                yield self
        finally:
            Late.read = read  # type: ignore[method-assign]
            for kernel in found:
                kernel.run = launch[kernel]

    def _counted(self, name: str, launch: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **options: Any) -> Any:
            self.launches[f"{name} at {place()}"] += 1
            # The interpreter's own work is none of the step's.
            with _disable_current_modes(), torch._C.DisableTorchFunction():
                return launch(*arguments, **options)

        return run


class _Operators(TorchDispatchMode):
    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self.watch = watch

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        name, kwargs = func._schema.name, kwargs or {}
        unsized = name == "aten::repeat_interleave" and kwargs.get("output_size") is None
        if (name in READS or unsized) and not self.watch.is_host(args[0]):
            self.watch.read(name)
        elif name in INDEXED and any(index is not None and index.dtype == torch.bool for index in args[1]):
            self.watch.read(f"{name} by a mask")
        if name not in UNLAUNCHED and not func.is_view:
            self.watch.launches[f"{name} at {place()}"] += 1
        return func(*args, **kwargs)


class _Methods(TorchFunctionMode):
    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self.watch = watch

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in READING and not self.watch.is_host(args[0]):
            self.watch.read(func.__name__)
        if func in COPIED:
            self.watch.copies[f"{func.__name__} at {place()}"] += 1
        return func(*args, **(kwargs or {}))
