"""A GPU that is not there, for what a GPU would refuse or get wrong as far as places and order go.

Values are in this machine's memory, all of them; what is put on `cuda` is marked, by its storage, and so is what is computed
of it (`places`). Operators that mix places are refused, and so are uses of a memory by two streams, or by a stream and the
host, that nothing orders (`order`). Triton's interpreter runs the kernels. What this finds is a tensor that was made in the wrong
place, one that numpy looks at without a copy, a wait that is missing. How fast a GPU is, what it runs out of and how it
rounds, is not seen.
"""

from __future__ import annotations

import functools
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext
from queue import Queue
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import _disable_current_modes

from tests.interpreter import all_kernels, quicken
from tests.pretended_gpu.order import DEFAULT, Order
from tests.pretended_gpu.places import Methods, Operators, Places
from tests.training import emulated_graphs
from tsae.sae import sparse

FREE_BYTES = 1 << 33
PROPERTIES = SimpleNamespace(
    name="pretended", major=9, minor=0, total_memory=2 * FREE_BYTES, shared_memory_per_block_optin=232448
)


class _Event:
    order: Order

    def __init__(self, *_: Any, **__: Any) -> None:
        self.clock = self.order.snapshot(self.order.host)

    def record(self, stream: _Stream | None = None) -> None:
        self.clock = self.order.snapshot(self.order.current if stream is None else stream.number)

    def wait(self, stream: _Stream | None = None) -> None:
        self.order.wait(self.order.current if stream is None else stream.number, self.clock)

    def synchronize(self) -> None:
        self.order.wait(self.order.host, self.clock, allowed=True)


class _Stream:
    order: Order

    def __init__(self, *_: Any, number: int | None = None, **__: Any) -> None:
        self.number = self.order.new_stream() if number is None else number

    def wait_stream(self, other: _Stream) -> None:
        self.order.wait(self.number, self.order.snapshot(other.number))

    def wait_event(self, event: _Event) -> None:
        event.wait(self)

    def record_event(self, event: Any = None) -> Any:
        event = event or torch.cuda.Event()
        event.record(self)
        return event

    def synchronize(self) -> None:
        self.order.wait(self.order.host, self.order.snapshot(self.number))


class _Graph:
    """What was launched while it was recorded, which is launched again without Python."""

    recorded: Any

    def replay(self) -> None:
        self.recorded()


class _Everything:
    def __contains__(self, _: Any) -> bool:
        return True


class _Recording:
    """torch.cuda.graph. What is read back is refused by `order` already; it then leaves the stream current on which it recorded."""

    order: Order

    def __init__(self, graph: _Graph, stream: _Stream, **_: Any) -> None:
        self.graph, self.stream, self.within = graph, stream, ExitStack()

    def __enter__(self) -> None:
        self.mode = emulated_graphs.Writing(_Everything())
        self.before = self.order.current
        self.order.set_current(self.stream.number)
        for each in (self.order.recording(), self.mode.kernels(), self.mode):
            self.within.enter_context(each)

    def __exit__(self, *error: Any) -> None:
        self.within.close()
        if error[0] is None:
            self.order.set_current(self.before)
            self.graph.recorded = self.mode.launch
            with _disable_current_modes(), torch._C.DisableTorchFunction():
                self.mode.undo()


@contextmanager
def ordered_threads(order: Order) -> Iterator[None]:
    """What a thread hands to another is known to it: by a future, its task, or a queue."""

    def after(function: Any) -> Any:
        """Told of by the object that it is a method of."""

        def told(self: Any, *given: Any, **options: Any) -> Any:
            self.clock = order.snapshot(order.host) | getattr(self, "clock", Counter())
            return function(self, *given, **options)

        return told

    def before(function: Any) -> Any:
        def told(self: Any, *given: Any, **options: Any) -> Any:
            try:
                return function(self, *given, **options)
            finally:
                order.wait(order.host, getattr(self, "clock", Counter()), allowed=True)

        return told

    submit = ThreadPoolExecutor.submit

    def submitted(self: Any, task: Any, *given: Any, **options: Any) -> Any:
        clock = order.snapshot(order.host)

        def run(*given: Any, **options: Any) -> Any:
            order.wait(order.host, clock, allowed=True)
            return task(*given, **options)

        return submit(self, run, *given, **options)

    with ExitStack() as stack:
        for kind, tells, hears in ((Future, ("set_result", "set_exception"), "result"), (Queue, ("put",), "get")):
            for name in tells:
                stack.enter_context(patch.object(kind, name, after(getattr(kind, name))))
            stack.enter_context(patch.object(kind, hears, before(getattr(kind, hears))))
        stack.enter_context(patch.object(ThreadPoolExecutor, "submit", submitted))
        yield


@contextmanager
def pretended() -> Iterator[Order]:
    """Within, `cuda` is there, once a process: what is kept from one time to the next would be found in no place."""
    order = Order()
    places = Places(order)
    stream = type("Stream", (_Stream,), {"order": order})

    def on(given: _Stream | None) -> Any:
        return nullcontext() if given is None else order.on(given.number)

    stand_ins: dict[str, Any] = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda _: None,
        "device": lambda _: nullcontext(),
        "is_bf16_supported": lambda **_: True,
        "get_device_name": lambda _=None: PROPERTIES.name,
        "get_device_properties": lambda _=None: PROPERTIES,
        "Stream": stream,
        "CUDAGraph": _Graph,
        "graph": type("graph", (_Recording,), {"order": order}),
        "graph_pool_handle": lambda: None,
        "set_sync_debug_mode": order.refuse_waits,
        "Event": type("Event", (_Event,), {"order": order}),
        "stream": on,
        "set_stream": lambda given: order.set_current(given.number),
        "current_stream": lambda _=None: stream(number=order.current),
        "default_stream": lambda _=None: stream(number=DEFAULT),
        "synchronize": lambda _=None: order.wait_for_all(),
        "empty_cache": lambda: None,
        "mem_get_info": lambda _=None: (FREE_BYTES, 2 * FREE_BYTES),
        "memory_allocated": lambda _=None: 0,
        "memory_reserved": lambda _=None: 0,
        "get_rng_state": lambda _=None: torch.get_rng_state(),
        "set_rng_state": lambda *_: None,
        "get_rng_state_all": lambda: [torch.get_rng_state()],
        "set_rng_state_all": lambda _: None,
    }
    run, save = threading.Thread.run, torch.save

    def run_there(thread: threading.Thread) -> None:
        with Methods(places), Operators(places):
            run(thread)

    def save_there(value: Any, *given: Any, **options: Any) -> None:
        places.saved(value)
        save(value, *given, **options)

    with ExitStack() as stack:
        for name, stand_in in stand_ins.items():
            stack.enter_context(patch.object(torch.cuda, name, stand_in))
        stack.enter_context(patch.object(torch._C, "_cuda_clearCublasWorkspaces", lambda: None, create=True))
        # Torch looks at the stream before a mode may.
        stack.enter_context(patch.object(torch.Tensor, "record_stream", places.record_stream))
        stack.enter_context(patch.object(torch, "save", save_there))
        stack.enter_context(patch.object(threading.Thread, "run", run_there))
        stack.enter_context(ordered_threads(order))
        if sparse.interpreted():
            quicken()
            stack.enter_context(patch.object(sparse, "interpreted", lambda: False))  # for tensors of the host
            for kernel in all_kernels():
                stack.enter_context(patch.object(kernel, "run", functools.partial(places.launch, kernel, kernel.run)))
        else:
            stack.enter_context(patch.object(sparse, "_kernels", lambda: None))
        stack.enter_context(Methods(places))
        stack.enter_context(Operators(places))
        yield order
