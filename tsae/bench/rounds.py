"""Interleaved rounds: every contestant does one step in each round, so that all meet the same state of the machine."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from tsae.bench.peers import INSTALL, PEERS, own_equivalent
from tsae.bench.shape import Shape
from tsae.runtime.errors import TsaeError
from tsae.runtime.progress import Progress

GPU_PHASE_ROUNDS = 3
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


def _remedy(name: str) -> str:
    return (
        f"install {INSTALL.get(name, name)} in an environment of its own that has torch and numpy, and give its "
        f"interpreter: --against {name}=ENVIRONMENT/bin/python"
    )


class _Worker:
    """The process of one contestant."""

    def __init__(self, name: str, shape: Shape, plan: Plan) -> None:
        threads = str(plan.threads)
        # This package is found there by its path alone: the other environment need not have it installed.
        path = os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")]))
        limits = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "PYTHONPATH": path}
        self.name = name
        self._process = subprocess.Popen(
            [plan.interpreters.get(name, sys.executable), "-m", "tsae.bench.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            # What libraries say while they load is not for the reader of a table.
            stderr=subprocess.DEVNULL if name in PEERS else None,
            env={**os.environ, **limits},
            text=True,
        )
        request = {"name": name, "shape": shape.as_dict(), "threads": plan.threads, "clock": plan.clock}
        self.described = self.ask(request)

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
            raise TsaeError(f"{self.name}: not installed here ({answer['missing']}); {_remedy(self.name)}")
        if "error" in answer:
            raise TsaeError(f"bench: {self.name}: {answer['error']}")
        return answer

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()


def measure(names: Sequence[str], shape: Shape, plan: Plan, against: Sequence[str] = ()) -> Result:
    """Time contestants `names` and the libraries `against`, those with this package's equivalent of each.

    A library that cannot be imported or does not start is left out. Raises TsaeError if a contestant fails.
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
        equivalents = dict.fromkeys(own_equivalent(worker.name, shape) for worker in libraries)
        own = [name for name in equivalents if name != f"sparse:{shape.kind}"]
        workers = [start(name) for name in (*names, *own)] + libraries
        measured = _rounds(workers, shape, plan)
    return Result(measured, missing)


def _rounds(workers: list[_Worker], shape: Shape, plan: Plan) -> list[Measured]:
    measured = {
        worker.name: Measured(worker.name, **{key: worker.described[key] for key in DESCRIBED}) for worker in workers
    }
    on_gpu = shape.device.startswith("cuda")
    # Timing the phases of a GPU waits for it at each one, so there they get rounds of their own.
    kinds = ["warm"] * plan.warmup + ["time"] * plan.rounds + ["phases"] * (GPU_PHASE_ROUNDS if on_gpu else 0)
    progress = Progress(f"bench {shape.name}", len(kinds) * len(workers), "steps")
    for number, kind in enumerate(kinds):
        # There and back again, so that nobody always follows the same neighbour.
        for place, worker in enumerate(workers if number % 2 else reversed(workers)):
            answer = worker.ask({"record": kind == "phases" or not on_gpu})
            entry = measured[worker.name]
            entry.peak_bytes = answer["peak_bytes"]
            if kind == "time":
                entry.seconds.append(answer["seconds"])
            if kind == "phases" or (kind == "time" and not on_gpu):
                entry.phases.append(answer["phases"])
            progress.update(number * len(workers) + place + 1, round=number + 1)
    return list(measured.values())
