"""Which tensors would be on the GPU, and what CUDA would refuse to compute of tensors in different places."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from tests.pretended_gpu.order import Order
from tests.training.device_watch import COPIED, INDEXED, READS, UNLAUNCHED

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
COPY = "aten::copy_"
PLACES = ("device", "is_cuda", "is_cpu", "is_meta")


class Misplaced(Exception):
    """What CUDA would refuse."""


class Marked:
    """A set of storages. A weak reference keeps the address of one that is gone from serving another."""

    def __init__(self) -> None:
        self._there: dict[int, StorageWeakRef] = {}
        self._lock = threading.Lock()

    def __contains__(self, storage: Any) -> bool:
        return storage._cdata in self._there

    def add(self, storage: Any) -> None:
        with self._lock:
            if storage._cdata not in self._there:
                self._there[storage._cdata] = StorageWeakRef(storage)
                if not len(self._there) % 4096:
                    self._there = {key: ref for key, ref in self._there.items() if not ref.expired()}

    def discard(self, storage: Any) -> None:
        with self._lock:
            self._there.pop(storage._cdata, None)


class Places:
    def __init__(self, order: Order) -> None:
        self.order, self._on_gpu, self.pinned = order, Marked(), Marked()

    def of(self, tensor: Tensor) -> torch.device:
        return GPU if storage_of(tensor) in self._on_gpu else CPU

    def put(self, tensor: Tensor, device: torch.device) -> None:
        (self._on_gpu.add if device.type == "cuda" else self._on_gpu.discard)(storage_of(tensor))

    def made(self, tensor: Tensor, copied: bool) -> None:
        """A new tensor on the GPU, empty or filled there, or `copied` from numbers of the host."""
        self.order.made(storage_of(tensor))
        if copied:
            self.order.wait(self.order.host, self.order.snapshot(self.order.current))

    def read_by_host(self, what: str, tensor: Tensor) -> None:
        """The host looks at a tensor, of which a GPU's it gets a copy once all before it is done."""
        storage = storage_of(tensor)
        if storage in self._on_gpu:
            self.order.used(self.order.current, what, [storage], [])
            self.order.wait(self.order.host, self.order.snapshot(self.order.current))
        elif self.order.knows(storage):
            self.order.used(self.order.host, what, [storage], [])

    def copied(self, target: Tensor, source: Tensor, non_blocking: bool) -> None:
        """A copy that a GPU takes part in."""
        order, (to, of) = self.order, (storage_of(target), storage_of(source))
        order.used(order.current, "a copy", [of], [to])
        host = [each for each in (to, of) if each not in self._on_gpu]
        # Of memory that is not pinned, CUDA's driver has taken or given all when it returns.
        if host and not (non_blocking and all(each in self.pinned for each in host)):
            order.wait(order.host, order.snapshot(order.current))

    def saved(self, value: Any, *_: Any, **__: Any) -> None:
        """torch.save, which reads memory by no operator."""
        for leaf in tree_leaves(value):
            if isinstance(leaf, Tensor):
                self.read_by_host("save", leaf)

    @property
    def record_stream(self) -> Callable[[Tensor, Any], None]:
        """Tensor.record_stream."""
        return lambda tensor, stream: self.order.record(storage_of(tensor), stream.number)

    def launch(self, kernel: Any, run: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """A kernel of Triton's, which may write whatever it is given."""
        given = [each for each in (*arguments, *options.values()) if isinstance(each, Tensor)]
        for each in given:
            if self.of(each) == CPU:
                raise Misplaced(f"{kernel.__name__} is given a tensor of the host {tuple(each.shape)}")
        self.order.used(self.order.current, kernel.__name__, [], map(storage_of, given))
        # The interpreter has no product in bfloat16; in float32 it is the same.
        import triton.language as tl

        with _disable_current_modes(), torch._C.DisableTorchFunction():
            return run(*(tl.float32 if each is tl.bfloat16 else each for each in arguments), **options)


def storage_of(tensor: Tensor) -> Any:
    with torch._C.DisableTorchFunction(), _disable_current_modes():
        return (tensor if tensor.layout == torch.strided else tensor.values()).untyped_storage()


def _is_meta(tensor: Tensor) -> bool:
    with torch._C.DisableTorchFunction():
        return tensor.is_meta


class Methods(TorchFunctionMode):
    """What asks for a place, or names one."""

    def __init__(self, places: Places) -> None:
        super().__init__()
        self.places = places

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs, name = dict(kwargs or {}), getattr(func, "__name__", "")
        if name == "__get__":
            name = func.__self__.__name__
            if name not in PLACES:
                return func(*args)
            device = torch.device("meta") if _is_meta(args[0]) else self.places.of(args[0])
            return device if name == "device" else device.type == name.removeprefix("is_")
        if name in ("numpy", "__array__", "tolist"):
            if name != "tolist" and self.places.of(args[0]) == GPU:
                raise Misplaced(f"{name} of a tensor on the GPU")
            self.places.read_by_host(name, args[0])
        if name == "pin_memory":
            result = args[0].clone()
            self.places.pinned.add(storage_of(result))
            return result
        if name in ("to", "cuda", "cpu"):
            return self._moved(name, args, kwargs)
        pinned, device = kwargs.pop("pin_memory", False), kwargs.get("device")
        placed = device is not None and torch.device(device).type != "meta"
        result = func(*args, **kwargs | ({"device": CPU} if placed else {}))
        if placed:
            self.places.put(result, torch.device(device))
            if torch.device(device).type == "cuda":
                self.places.made(result, func in COPIED)
        if pinned:
            self.places.pinned.add(storage_of(result))
        return result

    def _moved(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        tensor, copy, dtype, layout = args[0], kwargs.pop("copy", False), None, None
        non_blocking = kwargs.get("non_blocking", False)
        if name != "to":
            device = torch.device(name)
        elif len(args) > 1 and isinstance(args[1], Tensor):
            device, dtype = self.places.of(args[1]), args[1].dtype
        else:
            device, dtype, non_blocking, layout = torch._C._nn._parse_to(*args[1:], **kwargs)  # type: ignore[attr-defined]
        dtype, layout = dtype or tensor.dtype, layout or torch.preserve_format
        if _is_meta(tensor) or (device is not None and device.type == "meta"):
            return Tensor.to(tensor, CPU if device is not None and device.type == "cuda" else device, dtype)
        if device is None or device.type == self.places.of(tensor).type:
            return Tensor.to(tensor, dtype, copy=copy, memory_format=layout)
        if tensor.requires_grad and torch.is_grad_enabled():
            moved: Tensor = _Move.apply(tensor, device, self._moved)  # type: ignore[no-untyped-call]
            return moved.to(dtype)
        with torch._C.DisableTorchFunction(), _disable_current_modes():
            result = tensor.to(dtype, copy=True, memory_format=layout)
        self.places.put(result, device)
        if non_blocking and device.type == "cpu":
            self.places.pinned.add(storage_of(result))  # torch does so
        self.places.copied(result, tensor, non_blocking)
        return result


class _Move(torch.autograd.Function):
    """A copy to another place, whose gradient goes back to the first."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, device: torch.device, move: Callable[..., Tensor]) -> Tensor:
        ctx.place, ctx.move = tensor.device, move
        return move("to", (tensor.detach(), device), {})

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return ctx.move("to", (gradient, ctx.place), {}), None, None


class Operators(TorchDispatchMode):
    """What is computed of tensors on the GPU is there, too."""

    def __init__(self, places: Places) -> None:
        super().__init__()
        self.places = places

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        name, kwargs, places = func._schema.name, kwargs or {}, self.places
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and not _is_meta(leaf)]
        on_gpu = [each for each in tensors if places.of(each) == GPU]
        if not on_gpu:
            if not func.is_view:
                for each in tensors:
                    places.read_by_host(name, each)
            return func(*args, **kwargs)
        if name == COPY:
            places.copied(args[0], args[1], kwargs.get("non_blocking", len(args) > 2 and args[2]))
            return func(*args, **kwargs)
        strangers = [each for each in tensors if places.of(each) == CPU]
        if name in INDEXED and strangers:
            # CUDA takes an index of the host, and a number to be put there (`x[index] = 1`), and waits for their copies.
            strangers = [each for each in strangers if not any(each is index for index in args[1])]
            places.order.wait(places.order.host, places.order.snapshot(places.order.current))
        # Also a number of the host, as a tensor of no dimension, but nothing else.
        if any(each.dim() for each in strangers):
            shapes = [f"{tuple(each.shape)} {places.of(each)}" for each in tensors]
            raise Misplaced(f"{name} of tensors in different places: {', '.join(shapes)}")
        result = func(*args, **kwargs)
        given = {id(each) for each in tensors}
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor) and id(leaf) not in given]
        for each in made:
            places.put(each, GPU)
        if not func.is_view and name not in UNLAUNCHED:
            places.order.used(
                places.order.current,
                name,
                map(storage_of, on_gpu),
                map(storage_of, [*made, *_written(func, args, kwargs)]),
            )
        if name in READS:
            places.order.wait(places.order.host, places.order.snapshot(places.order.current))
        return result


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterable[Tensor]:
    """What an operator writes of what it is given."""
    for number, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[number] if number < len(args) else kwargs.get(argument.name)
            yield from (leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor))
