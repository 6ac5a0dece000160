"""A stage as a job: what a scheduler, a local queue or a debugger runs, while it keeps a record of itself.

Schedulers are asked only whether a job lives; what became of it is what it wrote itself. Importing this module is cheap: a job that waits or is refused loads no torch.
"""

from __future__ import annotations

import gc
import importlib
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from tsae.runtime import kept, metadata, preemption
from tsae.runtime.environment import forget_what_is_for_others, process_count, process_rank
from tsae.runtime.errors import TsaeError
from tsae.runtime.interrupts import interrupted
from tsae.runtime.locks import LockHeld
from tsae.runtime.metadata import COUNT
from tsae.runtime.processes import end_without_a_search
from tsae.runtime.state import Record, State

MOST_RESTARTS = "TSAE_MOST_RESTARTS"
"""Names the variable that bounds how often one job may be started again."""
WAIT_SECONDS = 5.0


CALL = {
    **{"record": str, "function": str, "arguments": list, "label": str, "attempt?": str, "executor?": str},
    **{"processes?": COUNT, "log?": (None, str)},
    "then?": [{"record": str, "function": str, "arguments": list, "label": str, "after": [str]}],
}


@dataclass(frozen=True, kw_only=True)
class Call:
    """A stage to run: a function by name with plain arguments, and where the record goes."""

    record: str
    """Folder of state.json."""
    function: str
    """`module:name`."""
    arguments: Sequence[Any]
    label: str
    """For people: `train split_fraction=0.2`."""
    attempt: str = ""
    """Stamp of the launch that asked for it."""
    executor: str = "debug"
    """A scheduler's name, local or debug."""
    processes: int = 1
    """How many processes do it together."""
    log: str | None = None
    """File that holds the output, where whoever starts the job knows it before."""
    then: Sequence[Mapping[str, Any]] = ()
    """Stages that follow in the same process, each with its `record`, `function`, `arguments` and `label`, and the records
    of those among them that it comes `after`."""

    def save(self, path: Path) -> None:
        """Write it as JSON, for `python -m tsae.runtime.job`."""
        metadata.write(path, asdict(self))

    @classmethod
    def load(cls, path: str | Path) -> Call:
        """The call in a JSON file."""
        found = metadata.read(Path(path), CALL, "launch the sweep again")
        return cls(**{name: value for name, value in found.items() if name in cls.__annotations__})


@dataclass(frozen=True, kw_only=True)
class Place:
    """Which job this process belongs to, in its scheduler's words; by default a process of this machine."""

    job: str = field(default_factory=lambda: str(os.getpid()))
    """Its id, as the scheduler's `submit` gave it."""
    host: str = field(default_factory=socket.gethostname)
    cluster: str | None = None
    restarts: int = 0
    """How often the job was started again after it was preempted, out of time, or on a lost node."""
    log: str | None = None


def run_stage(call: Call, place: Place | None = None) -> None:
    """Run the stage, as one process of its group where several were started, and keep its record; then those that follow.

    Waits while another process works on the same output. Raises what the stage raises, `Preempted` among it. One that
    follows and fails keeps no other from being done; TsaeError names them at the end.
    """
    end_without_a_search()
    first, place, folder = process_rank() == 0, place or Place(), Path(call.record)
    record = Record(
        stage=call.label,
        executor=call.executor,
        job=place.job,
        cluster=place.cluster,
        attempt=call.attempt,
        restarts=place.restarts,
        host=place.host,
        pid=os.getpid(),
        gpus=os.environ.get("CUDA_VISIBLE_DEVICES"),
        log=call.log or place.log or "",
        started=time.time(),
    )
    try:
        with preemption.watched(), kept.keeping(bool(call.then)):
            _require_restarts_left(place)
            _require_company(call)
            if first:
                record.enter(folder, State.RUNNING)
            _leaving_when_asked(lambda: _when_free(_resolved(call.function), call.arguments))
            _follow(call.then, record)
    except preemption.Preempted:
        if not first:
            # The first process may still be writing, and its scheduler would kill it if this one ended with another code.
            sys.exit(0)
        record.enter(folder, State.PREEMPTED)
        raise
    except Exception as error:
        if not interrupted(error):  # of an interrupt nothing is said: the stage is one that ended without a word
            record.enter(folder, State.FAILED, _line(error))
        raise
    if first:
        record.enter(folder, State.DONE)


def _follow(stages: Sequence[Mapping[str, Any]], job: Record) -> None:
    """Run the stages that come after the first one of `job`, each with a record of its own."""
    failed: dict[str, str] = {}
    for stage in stages:
        folder, own = Path(stage["record"]), replace(job, stage=stage["label"], started=time.time())
        if missing := [failed[record] for record in stage["after"] if record in failed]:
            failed[stage["record"]] = missing[0]
            continue
        _free_memory()
        own.enter(folder, State.RUNNING)
        try:
            _leaving_when_asked(partial(_when_free, _resolved(stage["function"]), stage["arguments"]))
        except preemption.Preempted:
            own.enter(folder, State.PREEMPTED)
            raise
        except Exception as error:
            if interrupted(error):
                raise
            traceback.print_exc()
            own.enter(folder, State.FAILED, _line(error))
            failed[stage["record"]] = f"{stage['label']}: {_line(error)}"
        else:
            own.enter(folder, State.DONE)
    if failed:
        raise TsaeError("; ".join(dict.fromkeys(failed.values())))


def _free_memory() -> None:
    """Give back what the stage before had on a GPU, where the next one may need all of it."""
    gc.collect()
    if (torch := sys.modules.get("torch")) is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()


def main(arguments: list[str] | None = None) -> int:
    """`python -m tsae.runtime.job CALL.json`: 0 when the stage is complete, 1 when it failed, 75 when it was preempted."""
    (path,) = sys.argv[1:] if arguments is None else arguments
    forget_what_is_for_others()
    try:
        run_stage(Call.load(path))
    except TsaeError as error:
        traceback.print_exc()
        print(f"tsae: {error}", file=sys.stderr)
        return 1
    except preemption.Preempted as preempted:
        print(f"tsae: {preempted}", file=sys.stderr)
        return preemption.REQUEUE
    return 0


def _require_restarts_left(place: Place) -> None:
    most = os.environ.get(MOST_RESTARTS)
    if most is not None and place.restarts > int(most):
        raise TsaeError(
            f"was preempted or out of time {place.restarts} times, more than max_restarts: {most} of the cluster's file "
            "allows; the same command goes on from the last state"
        )


def _require_company(call: Call) -> None:
    if process_count() != call.processes:
        raise TsaeError(
            f"{call.label}: {call.processes} processes were asked for and {process_count()} started; "
            "something between the scheduler and Python has put them into groups of their own"
        )


def _leaving_when_asked(work: Callable[[], None]) -> None:
    """Do `work`; what fails once the job was asked to leave, as collectives do whose peer has left, is no failure of it."""
    try:
        work()
    except Exception as error:
        if not preemption.requested():
            raise
        traceback.print_exc()
        raise preemption.Preempted from error


def _when_free(function: Callable[..., object], arguments: Sequence[Any]) -> None:
    """Call the stage; while another process holds its lock, wait and try again: what that one completes is not redone."""
    while True:
        try:
            function(*arguments)
            return
        except LockHeld as held:
            print(f"waiting: {held}", file=sys.stderr, flush=True)
        preemption.wait(WAIT_SECONDS)


def _line(error: Exception) -> str:
    words = " ".join(str(error).split())
    return words if isinstance(error, TsaeError) else f"{type(error).__name__}: {words}"


def _resolved(name: str) -> Callable[..., object]:
    module, _, attribute = name.partition(":")
    function: Callable[..., object] = getattr(importlib.import_module(module), attribute)
    return function


if __name__ == "__main__":
    sys.exit(main())
