"""CUDA graphs without CUDA: what a part launches is written down, and done again on the same memory, without its Python.

As with a graph, recording leaves everything as it was before; what a part makes is rubbish until it is launched; numbers
are those of the recording, tensors are what now lies in their places. Memory that a graph gives to two tensors one after
the other each has for itself here: that a part looks at nothing but what the parts before it returned shows on a GPU alone.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from tests.interpreter import all_kernels
from tests.training.device_watch import READS, UNLAUNCHED
from tsae.training.recorded import Recording

log: list[str] = []
"""What happened to graphs: `recorded` or `launched`, an entry each."""


def record(part: Callable[[], Any], host: Iterable[Tensor] = ()) -> Recording:
    """What `part()` returns, and what launches again all that it launched. Tensors of `host` would not be on the GPU."""
    mode = Writing({_place(tensor) for tensor in host})
    with mode.kernels(), mode:
        result = part()
    mode.undo()
    log.append("recorded")

    def launch() -> None:
        log.append("launched")
        mode.launch()

    return result, launch


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _bytes(tensor: Tensor) -> Tensor:
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())


class Writing(TorchDispatchMode):
    def __init__(self, host: Container[int]) -> None:
        super().__init__()
        self._host = host
        self.calls: list[Callable[[], Any]] = []
        self._made: dict[int, Tensor] = {}
        self._before: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        name, kwargs = func._schema.name, kwargs or {}
        if name in READS and _place(args[0]) not in self._host:
            raise RuntimeError(f"operation not permitted when stream is capturing: {name}")
        given = dict(zip((each.name for each in func._schema.arguments), args, strict=False)) | kwargs
        written = {each.name for each in func._schema.arguments if each.alias_info and each.alias_info.is_write}
        self._written([value for key, value in given.items() if key in written])
        found = func(*args, **kwargs)
        outs = [each for each in tree_leaves(found) if isinstance(each, Tensor)]
        places = {_place(each) for each in tree_leaves(given) if isinstance(each, Tensor)}
        for out in outs:
            if _place(out) not in places:
                self._made.setdefault(_place(out), out)
        if func.is_view or name in UNLAUNCHED or name in READS:
            return found

        def call() -> None:
            again = [each for each in tree_leaves(func(*args, **kwargs)) if isinstance(each, Tensor)]
            for out, new in zip(outs, again, strict=True):
                if _place(out) != _place(new):
                    out.copy_(new)

        self.calls.append(call)
        return found

    def launch(self) -> None:
        """Do all that was written down once more."""
        with _disable_current_modes(), torch._C.DisableTorchFunction(), torch._C._AutoDispatchBelowAutograd():
            for call in self.calls:
                call()

    @contextmanager
    def kernels(self) -> Iterator[None]:
        found = all_kernels()
        launch = {kernel: kernel.run for kernel in found}
        for kernel in found:
            kernel.run = self._noted(launch[kernel])
        try:
            yield
        finally:
            for kernel in found:
                kernel.run = launch[kernel]

    def _noted(self, launch: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **options: Any) -> None:
            with _disable_current_modes(), torch._C.DisableTorchFunction():
                self._written(arguments)
                launch(*arguments, **options)
            self.calls.append(lambda: launch(*arguments, **options))

        return run

    def _written(self, tensors: Any) -> None:
        """Remember what is in memory that was there before, for it may be written to."""
        with _disable_current_modes():
            for tensor in tree_leaves(list(tensors)):
                if isinstance(tensor, Tensor) and _place(tensor) not in self._made:
                    self._before.setdefault(_place(tensor), (tensor, _bytes(tensor).clone()))

    def undo(self) -> None:
        for tensor, before in self._before.values():
            _bytes(tensor).copy_(before)
        for tensor in self._made.values():
            _bytes(tensor).fill_(255)  # NaN, or −1
