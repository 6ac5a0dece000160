"""One contestant in a process of its own: `python -m tsae.bench.worker`, JSON lines in, JSON lines out.

So that memory is its own, that no two libraries share a process, and that one may live in another environment: only
torch, and what the contestant itself needs, is imported.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any, TextIO

import torch

from tsae.bench import contestants
from tsae.bench.memory import Memory
from tsae.bench.shape import Shape, batches
from tsae.runtime.errors import TsaeError
from tsae.runtime.phases import record

BATCHES = 2


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
    _load_libraries(name, shape)
    memory = Memory(shape.device)
    contestant = contestants.build(name, shape)
    clock = _clock(shape.device, first["clock"])
    described = {"library": contestant.library, "algorithm": contestant.algorithm, "encoded": contestant.encoded}
    _answer(answers, {**described, "state_bytes": contestant.state_bytes})
    for number, line in enumerate(sys.stdin):
        request, batch = json.loads(line), data[number % len(data)]
        began = clock()
        if request["record"]:
            with record(clock) as times:
                contestant.step(batch)
            answer = {"seconds": clock() - began, "phases": times.seconds}
        else:
            contestant.step(batch)
            answer = {"seconds": clock() - began}
        _answer(answers, {**answer, "peak_bytes": memory.peak()})


def _load_libraries(name: str, shape: Shape) -> None:
    """One step of a tiny contestant: what is imported and initialised once is not a cost of the step."""
    tiny = dataclasses.replace(shape, activation_dim=16, dict_size=128, k=4, batch_size=32)
    contestants.build(name, tiny).step(batches(tiny, 1)[0])


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


if __name__ == "__main__":
    main()
