"""Interleaved rounds: every contestant does one step in each round, so that all meet the same state of the machine.

Each contestant has a process of its own, `python -m tsae.bench.rounds`, JSON lines in, JSON lines out: so that memory is
its own, that no two libraries share a process, and that one may live in another environment, where only torch, and what
the contestant itself needs, is imported.
"""

from __future__ import annotations

import ctypes
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import torch

from tsae.bench import contestants
from tsae.bench.contestants import INSTALL, PEERS, TF32, own_equivalent
from tsae.bench.shape import Shape, batches
from tsae.runtime.errors import TsaeError
from tsae.runtime.phases import record
from tsae.runtime.progress import Progress
from tsae.training.recorded import EAGER

BATCHES = 2
GPU_PHASE_ROUNDS = 3
IN_A_ROW = 5
"""Steps of a GPU between two looks at the clock, each of which waits for it: in a training no step is waited for."""
LEAVE_SECONDS = 30.0
DESCRIBED = ("library", "algorithm", "encoded", "state_bytes")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How to measure."""

    rounds: int = 7
    warmup: int = 3
    """Steps of each contestant before the first round."""
    threads: int = 1
    clock: str = "cpu"
    """`cpu`: seconds of processor time, of all threads; `wall`."""
    interpreters: dict[str, str] = field(default_factory=dict)
    """Python of the environment that a library lives in, where it is not this one."""


@dataclass
class Measured:
    """What one contestant did."""

    name: str
    library: str
    algorithm: str
    encoded: int
    state_bytes: int
    seconds: list[float] = field(default_factory=list)
    """Of each round."""
    phases: list[dict[str, float]] = field(default_factory=list)
    calls: dict[str, int] | None = None
    """Of a GPU in one step: see `tally`."""
    peak_bytes: int | None = None
    """Memory above the batches and the imported libraries."""

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def beyond_state_bytes(self) -> int | None:
        """Peak memory beyond weights, gradients and Adam's moments."""
        return None if self.peak_bytes is None else self.peak_bytes - self.state_bytes

    def median_phases(self) -> dict[str, float]:
        """Median seconds of each phase, largest first."""
        names = {name for step in self.phases for name in step}
        medians = {name: statistics.median(step.get(name, 0.0) for step in self.phases) for name in names}
        return dict(sorted(medians.items(), key=lambda item: -item[1]))


class Result(NamedTuple):
    """What was measured, and why some libraries were not."""

    measured: list[Measured]
    missing: dict[str, str]


class _Worker:
    """The process of one contestant."""

    def __init__(self, name: str, shape: Shape, plan: Plan) -> None:
        # This package is found there by its path alone: the other environment need not have it installed.
        path = os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")]))
        limits = {"OMP_NUM_THREADS": str(plan.threads), "MKL_NUM_THREADS": str(plan.threads)}
        self.name, self.library = name, name.removesuffix(TF32)
        self._process = subprocess.Popen(
            [plan.interpreters.get(self.library, sys.executable), "-m", "tsae.bench.rounds"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            # What libraries say while they load is not for the reader of a table.
            stderr=subprocess.DEVNULL if self.library in PEERS else None,
            env={**os.environ, **limits, "PYTHONPATH": path},
            text=True,
        )
        self.described = self.ask(
            {"name": name, "shape": shape.as_dict(), "threads": plan.threads, "clock": plan.clock}
        )

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """The answer to a request. Raises TsaeError if the contestant failed."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        # A process that has ended cannot be written to; its last words are still there to be read.
        with suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise TsaeError(f"bench: {self.name} ended without an answer, exit code {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        if "missing" in answer:
            raise TsaeError(
                f"{self.name}: not installed here ({answer['missing']}); install {INSTALL.get(self.library, self.library)} in an "
                "environment of its own that has torch and numpy, and give its interpreter: "
                f"--against {self.library}=ENVIRONMENT/bin/python"
            )
        if "error" in answer:
            raise TsaeError(f"bench: {self.name}: {answer['error']}")
        return answer

    def leave(self) -> None:
        """Let the process come to its end, in which it removes what it has written."""
        if self._process.stdin is not None:
            with suppress(BrokenPipeError):
                self._process.stdin.close()
            self._process.stdin = None  # `communicate` would flush it

    def close(self) -> None:
        """End the process."""
        self.leave()
        with suppress(subprocess.TimeoutExpired):
            self._process.communicate(timeout=LEAVE_SECONDS)
        self._process.kill()
        self._process.wait()


def measure(names: Sequence[str], shape: Shape, plan: Plan, against: Sequence[str] = ()) -> Result:
    """Time contestants `names` and the libraries `against`, those with this package's equivalent of each.

    A library that cannot be imported or does not start is left out, and so are one and the dense
    path where they fail later: dense codes may not fit into the memory. Raises TsaeError if another contestant fails.
    """
    with ExitStack() as stack:

        def start(name: str) -> _Worker:
            worker = _Worker(name, shape, plan)
            stack.callback(worker.close)
            return worker

        libraries, missing = [], {}
        for name in against:
            try:
                libraries.append(start(name))
            except TsaeError as error:
                missing[name] = str(error)
        equivalents = dict.fromkeys(own_equivalent(worker.library, shape) for worker in libraries)
        own = [name for name in equivalents if name != f"sparse:{shape.kind}"]
        workers = [start(name) for name in (*names, *own)] + libraries
        measured = _rounds(workers, shape, plan, missing)
        for worker in workers:
            worker.leave()  # all at once
    return Result(measured, missing)


def _rounds(workers: list[_Worker], shape: Shape, plan: Plan, missing: dict[str, str]) -> list[Measured]:
    measured = {
        worker.name: Measured(worker.name, **{key: worker.described[key] for key in DESCRIBED}) for worker in workers
    }
    on_gpu = shape.device.startswith("cuda")
    # The first steps of a GPU compile kernels, and record graphs once they have met a kind of step often enough.
    warmup = max(plan.warmup, EAGER + 4) if on_gpu else plan.warmup
    # Timing the phases of a GPU waits for it at each one, so there they get rounds of their own.
    kinds = ["warm"] * warmup + ["time"] * plan.rounds + ["phases"] * (GPU_PHASE_ROUNDS if on_gpu else 0)
    kinds += ["calls"] * on_gpu
    progress = Progress(f"bench {shape.name}", len(kinds) * len(workers), "steps")
    for number, kind in enumerate(kinds):
        # There and back again, so that nobody always follows the same neighbour.
        for place, worker in enumerate(workers if number % 2 else reversed(workers)):
            entry = measured.get(worker.name)
            if entry is None:
                continue
            try:
                answer = worker.ask({"record": kind == "phases" or not on_gpu, "calls": kind == "calls"})
            except TsaeError as error:
                if worker.library not in (*PEERS, "dense"):
                    raise
                missing[worker.name] = str(error)
                del measured[worker.name]
                continue
            entry.peak_bytes = answer["peak_bytes"]
            if kind == "time":
                entry.seconds.append(answer["seconds"])
            if kind == "phases" or (kind == "time" and not on_gpu):
                entry.phases.append(answer["phases"])
            entry.calls = answer.get("calls", entry.calls)
            progress.update(number * len(workers) + place + 1, round=number + 1)
    return list(measured.values())


def main() -> None:
    """Answer requests until the input ends. What libraries print goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    try:
        _serve(json.loads(sys.stdin.readline()), answers)
    except TsaeError as error:
        _answer(answers, {"error": str(error)})
    except ImportError as error:
        _answer(answers, {"missing": str(error)})
    except Exception as error:
        # Libraries fail in ways of their own; whoever asked says so in one line.
        _answer(answers, {"error": f"{type(error).__name__} {error}".strip()})
        raise


def _serve(first: dict[str, Any], answers: TextIO) -> None:
    torch.set_num_threads(first["threads"])
    shape, name = Shape(**first["shape"]), first["name"]
    data = batches(shape, BATCHES)
    # One step of a tiny contestant: what is imported and initialised once is not a cost of the step.
    tiny = dataclasses.replace(shape, activation_dim=16, dict_size=128, k=4, batch_size=32)
    contestants.build(name, tiny).step(batches(tiny, 1)[0])
    memory = Memory(shape.device)
    contestant = contestants.build(name, shape)
    clock = _clock(shape.device, first["clock"])
    _answer(answers, {key: getattr(contestant, key) for key in DESCRIBED})
    for number, line in enumerate(sys.stdin):
        request, batch = json.loads(line), data[number % len(data)]
        answer: dict[str, Any]
        began = clock()
        if request["calls"]:
            kinds = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
            with torch.profiler.profile(activities=kinds) as profile:
                contestant.step(batch)
            on_host = torch.autograd.DeviceType.CPU
            answer = {"calls": tally((event.name, event.device_type == on_host) for event in profile.events() or ())}
        elif request["record"]:
            with record(clock) as times:
                contestant.step(batch)
            answer = {"seconds": clock() - began, "phases": times.seconds}
        else:
            steps = 1 if shape.device == "cpu" else IN_A_ROW
            for later in range(steps):
                contestant.step(data[(number + later) % len(data)])
            answer = {"seconds": (clock() - began) / steps}
        _answer(answers, {**answer, "peak_bytes": memory.peak()})


def tally(events: Iterable[tuple[str, bool]]) -> dict[str, int]:
    """Of a profile's events, each a name and whether it was the host's: what the host asked of a GPU, and what that did."""
    host, device = Counter[str](), Counter[str]()
    for name, on_host in events:
        (host if on_host else device)[name] += 1
    waits = ("cudaStreamSynchronize", "cudaEventSynchronize", "cudaDeviceSynchronize")
    return {
        "launches": sum(n for name, n in host.items() if name.startswith(("cudaLaunchKernel", "cuLaunchKernel"))),
        "graphs": host["cudaGraphLaunch"],
        # The profiler itself waits once, in its end.
        "waits": sum(host[name] for name in waits) - (host["cudaDeviceSynchronize"] > 0),
        "copies": sum(n for name, n in host.items() if name.startswith("cudaMemcpy")),
        "kernels": sum(n for name, n in device.items() if not name.startswith(("Memcpy", "Memset"))),
    }


def _answer(answers: TextIO, value: dict[str, Any]) -> None:
    print(json.dumps(value), file=answers, flush=True)


def _clock(device: str, kind: str) -> Callable[[], float]:
    """Seconds of CPU (of all threads) or of wall time; a GPU is waited for first."""
    if device.startswith("cuda"):

        def synchronized() -> float:
            torch.cuda.synchronize(device)
            return time.perf_counter()

        return synchronized
    return time.process_time if kind == "cpu" else time.perf_counter


class Memory:
    """Bytes above what is in use now: resident memory, or what torch allocates on a GPU."""

    def __init__(self, device: str) -> None:
        self._device = device if device.startswith("cuda") else None
        if self._device is not None:
            torch.cuda.reset_peak_memory_stats(self._device)
            self._before: int | None = torch.cuda.memory_allocated(self._device)
        else:
            # Freed memory goes back to the system, where it counts again once it is used.
            if sys.platform == "linux":
                ctypes.CDLL(None).malloc_trim(0)
            self._before = _status("VmRSS")

    def peak(self) -> int | None:
        """Most bytes since; none where the system does not tell."""
        highest = torch.cuda.max_memory_allocated(self._device) if self._device else _status("VmHWM")
        return None if highest is None or self._before is None else highest - self._before


def _status(field: str) -> int | None:
    """A size that Linux tells of this process, in bytes."""
    if sys.platform != "linux":
        return None
    with open("/proc/self/status") as lines:
        found = next((line for line in lines if line.startswith(field)), None)
    return None if found is None else 1024 * int(found.split()[1])


if __name__ == "__main__":
    main()
