"""Executors: how one stage becomes a running job on this machine. The queue above them decides when.

`local` runs each stage in processes of its own; `debug` runs it inside this one.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from tsae.runtime import job
from tsae.runtime.preemption import REQUEUE
from tsae.runtime.state import Record, State, mark_failed
from tsae.sweep.attempt import Attempt, python_path, shell_path
from tsae.sweep.container import Container
from tsae.sweep.queue.machine import Share
from tsae.sweep.resources import StageResources
from tsae.sweep.stage import Stage

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")
PATIENCE_SECONDS = 10.0


LAST_WORDS = 4096
"""Bytes from the end of a log in which a job's last line is looked for."""

Ending = tuple[State, str]
"""How a job ended: DONE, FAILED, PREEMPTED (saved, and can go on) or INTERRUPTED (killed); and one line of why."""


class Job(Protocol):
    """A started stage."""

    @property
    def log(self) -> Path:
        """The file that holds its output."""

    @property
    def started(self) -> float:
        """When it started, in seconds since the epoch."""

    @property
    def pid(self) -> int:
        """Its process group."""

    def poll(self) -> Ending | None:
        """How it ended, or None while it runs."""

    def ask(self) -> None:
        """Ask it to save what it has and leave."""

    def end(self) -> None:
        """Wait a little for it to leave, then stop it and everything it started."""


class Executor(Protocol):
    """A way to run stages."""

    name: str

    def processes(self, resources: StageResources, gpus: int) -> int:
        """How many processes a job of so many GPUs has."""

    def start(self, stage: Stage, share: Share) -> Job:
        """Start `stage` with what is in `share`."""


class DebugExecutor:
    """Runs each stage at once, in this process: for a debugger, and for one look at a full traceback."""

    name = "debug"

    def __init__(self, attempt: Attempt) -> None:
        self._attempt = attempt

    def processes(self, resources: StageResources, gpus: int) -> int:  # noqa: ARG002 (there is no other process)
        """One: this."""
        return 1

    def start(self, stage: Stage, share: Share) -> Job:  # noqa: ARG002 (this process has all it has)
        """Run `stage` to its end; its output goes to the terminal."""
        call, started = _call(stage, self._attempt, self.name), time.time()
        log = log_path(stage, self._attempt)
        log.parent.mkdir(exist_ok=True)
        try:
            job.run_stage(call)
        except Exception as error:
            log.write_text(traceback.format_exc())
            traceback.print_exc()
            record = Record.of(stage.record)
            return FinishedJob(log, started, (State.FAILED, (record.error if record else "") or str(error)))
        return FinishedJob(log, started, (State.DONE, ""))


@dataclass(frozen=True)
class FinishedJob:
    """A job that ended before its executor returned."""

    log: Path
    started: float
    ending: Ending
    pid: int = 0

    def poll(self) -> Ending | None:
        """How it ended."""
        return self.ending

    def ask(self) -> None:
        """Nothing is left to ask."""

    def end(self) -> None:
        """Nothing is left to stop."""


class LocalExecutor:
    """Runs each stage in processes of this machine: one, or several that work together."""

    name = "local"

    def __init__(self, attempt: Attempt, container: Container | None = None) -> None:
        self._attempt, self._container = attempt, container

    def processes(self, resources: StageResources, gpus: int) -> int:
        """As many as the sweep names, else one for each GPU that this machine has for the job."""
        return (resources.nodes or 1) * resources.tasks if resources.tasks else max(1, gpus)

    def start(self, stage: Stage, share: Share) -> LocalJob:
        """Start `stage`; threads and visible GPUs are those of `share`."""
        count = self.processes(stage.resources, len(share.gpus))
        call = _call(stage, self._attempt, self.name, count)
        path = self._attempt.folder / "calls" / f"{stage.record.name}.json"
        call.save(path)
        environ = {**self._variables(share, count), **_meeting_point(count)}
        log = log_path(stage, self._attempt)
        log.parent.mkdir(exist_ok=True)
        processes: list[subprocess.Popen[bytes]] = []
        with open(log, "ab") as stream:
            for rank in range(count):
                own = environ | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if count > 1 else {})
                processes.append(
                    subprocess.Popen(
                        [*self._python(own, share), "-m", "tsae.runtime.job", str(path)],
                        env=os.environ | own,
                        stdin=subprocess.DEVNULL,
                        stdout=stream,
                        stderr=stream,
                        # All of them in a group of their own, which Ctrl-C does not reach and one signal ends.
                        process_group=processes[0].pid if processes else 0,
                    )
                )
        return LocalJob(stage.record, log, processes)

    def _python(self, variables: Mapping[str, str], share: Share) -> list[str]:
        if self._container is None:
            return [sys.executable]
        return self._container.command(variables, gpus=bool(share.gpus))

    def _variables(self, share: Share, processes: int) -> dict[str, str]:
        return {
            **dict.fromkeys(THREAD_VARIABLES, str(max(1, share.cpus // processes))),
            "CUDA_VISIBLE_DEVICES": ",".join(share.gpus),
            "PYTHONPATH": python_path(self._attempt.code, *shell_path(in_image=self._container is not None)),
            "PYTHONUNBUFFERED": "1",
            # Without it, a folder `tsae` in the working directory would stand in for the launcher's own package.
            "PYTHONSAFEPATH": "1",
        }


class LocalJob:
    """The processes of one stage; when one of them dies the others are ended, since they would wait for it for ever."""

    def __init__(self, record: Path, log: Path, processes: list[subprocess.Popen[bytes]]) -> None:
        self.log, self.started, self.pid = log, time.time(), processes[0].pid
        self._record, self._processes = record, processes
        self._first_code: int | None = None
        self._deadline: float | None = None

    def poll(self) -> Ending | None:
        """What its record says, or the word of the log if it was killed before it could say anything."""
        codes = [process.poll() for process in self._processes]
        bad = [code for code in codes if code not in (None, 0)]
        if bad and self._first_code is None:
            self._first_code = bad[0]
        if None in codes:
            if bad:
                self._end_the_rest()
            return None
        code = self._first_code or 0
        if code == 0:
            return State.DONE, ""
        if code == REQUEUE:
            return State.PREEMPTED, "was preempted"
        words = f"its last words: {last_line(self.log) or 'none'}"
        if code < 0:
            return State.INTERRUPTED, f"was killed ({_signal_name(-code)}; out of memory?); {words}"
        record = Record.of(self._record)
        if record is None or record.state != State.FAILED or (record.started or 0.0) < self.started - 1:
            error = f"a process ended with code {code}; {words}"
            mark_failed(self._record, error)
            return State.FAILED, error
        return State.FAILED, record.error

    def ask(self) -> None:
        """Ask all of its processes to leave."""
        self._signal(signal.SIGTERM)

    def end(self) -> None:
        """Kill what does not leave in time."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            deadline = time.monotonic() + PATIENCE_SECONDS
            while self._lives():
                if time.monotonic() > deadline:
                    self._signal(number)
                    break
                time.sleep(0.05)

    def _end_the_rest(self) -> None:
        if self._deadline is None:
            self._deadline = time.monotonic() + PATIENCE_SECONDS
            self._signal(signal.SIGTERM)
        elif time.monotonic() > self._deadline:
            self._signal(signal.SIGKILL)

    def _signal(self, number: signal.Signals) -> None:
        try:
            os.killpg(self.pid, number)
        except ProcessLookupError:
            return

    def _lives(self) -> bool:
        for process in self._processes:
            process.poll()
        try:
            os.killpg(self.pid, 0)
        except ProcessLookupError:
            return False
        return True


def log_path(stage: Stage, attempt: Attempt) -> Path:
    """Where a local job of `attempt` writes."""
    return attempt.folder / "logs" / f"{stage.record.name}.log"


def last_line(log: Path) -> str:
    """The last line of a log that says something."""
    try:
        with open(log, "rb") as stream:
            stream.seek(max(0, stream.seek(0, os.SEEK_END) - LAST_WORDS))
            lines = stream.read().decode(errors="replace").splitlines()
    except FileNotFoundError:
        return ""
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def _call(stage: Stage, attempt: Attempt, executor: str, processes: int = 1) -> job.Call:
    """`stage` as a job of `attempt` on this machine."""
    return job.Call(
        record=str(stage.record),
        function=stage.function,
        arguments=stage.arguments_in(attempt.points),
        label=stage.label,
        attempt=attempt.stamp,
        executor=executor,
        processes=processes,
        log=str(log_path(stage, attempt)),
        then=stage.then_in(attempt.points),
    )


def _meeting_point(processes: int) -> dict[str, str]:
    """Variables by which processes that work together find each other."""
    if processes == 1:
        return {}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
