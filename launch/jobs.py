"""Executors: how one stage becomes a running job. The queue above them decides when.

`local` runs each stage in a process of its own through submitit; `debug` runs it inside this one.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from stage import Stage

from tsae.errors import TsaeError
from tsae.preemption import REQUEUE

CONTROLLER = Path(__file__).with_name("controller.py")
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")
PATIENCE_SECONDS = 10.0


@dataclass(frozen=True)
class Outcome:
    """How a job ended: `error` is None, or one line; a job that was `preempted` has saved its state and can go on."""

    error: str | None
    preempted: bool = False


@dataclass(frozen=True)
class Share:
    """What one job may use of this machine."""

    cpus: int
    gpus: tuple[str, ...]


class Job(Protocol):
    """A started stage."""

    @property
    def log(self) -> Path:
        """The file that holds its output."""

    @property
    def started(self) -> float:
        """When it started, in seconds since the epoch."""

    def poll(self) -> Outcome | None:
        """How it ended, or None while it runs."""

    def end(self) -> None:
        """Stop it and everything it started."""


class Executor(Protocol):
    """A way to run stages."""

    name: str

    def start(self, stage: Stage, share: Share) -> Job:
        """Start `stage` with the resources of `share`."""


class DebugExecutor:
    """Runs each stage at once, in this process: for a debugger, and for one look at a full traceback."""

    name = "debug"

    def start(self, stage: Stage, share: Share) -> Job:  # noqa: ARG002 (this process has all it has)
        """Run `stage` to its end; its output goes to the terminal."""
        log = attempt_folder(stage) / "traceback.txt"
        started = time.time()
        try:
            stage.function(*stage.arguments)
        except Exception as error:
            log.write_text(traceback.format_exc())
            if not isinstance(error, TsaeError):
                traceback.print_exc()
            return FinishedJob(log, started, Outcome(last_line(f"{type(error).__name__}: {error}")))
        return FinishedJob(log, started, Outcome(None))


@dataclass(frozen=True)
class FinishedJob:
    """A job that ended before its executor returned."""

    log: Path
    started: float
    outcome: Outcome

    def poll(self) -> Outcome | None:
        """How it ended."""
        return self.outcome

    def end(self) -> None:
        """Nothing is left to stop."""


class LocalExecutor:
    """Runs each stage in processes of this machine that outlive neither the queue nor Ctrl-C."""

    name = "local"

    def start(self, stage: Stage, share: Share) -> Job:
        """Submit `stage`; threads and visible GPUs are those of `share`."""
        import submitit.local.local as backend

        folder = attempt_folder(stage)
        executor = _session_executor(backend)(folder)
        executor.update_parameters(timeout_min=60 * 24 * 365, stderr_to_stdout=True)
        variables = {
            **dict.fromkeys(THREAD_VARIABLES, str(share.cpus)),
            "CUDA_VISIBLE_DEVICES": ",".join(share.gpus),
            "PYTHONUNBUFFERED": "1",
            # Without it, a folder `tsae` in the working directory would stand in for the launcher's own package.
            "PYTHONSAFEPATH": "1",
        }
        with environment(variables):
            submitted = executor.submit(stage.function, *stage.arguments)
        return LocalJob(submitted.paths.stdout, time.time(), submitted.paths.result_pickle, submitted._process)


class LocalJob:
    """A stage in a session of its own: a controller of submitit and the task below it."""

    def __init__(self, log: Path, started: float, result: Path, process: subprocess.Popen[bytes]) -> None:
        self.log, self.started = log, started
        self._result, self._process = result, process

    def poll(self) -> Outcome | None:
        """The result that the task left, or the word of the log if it was killed before it could leave one."""
        if self._process.poll() is None:
            return None
        if self._process.returncode == REQUEUE:
            return Outcome("was preempted", preempted=True)
        if not self._result.exists():
            said = last_line(self.log.read_text(errors="replace")) if self.log.exists() else ""
            return Outcome(f"ended without a result (killed, or out of memory?); its last words: {said or 'none'}")
        from submitit.core.utils import pickle_load

        verdict, value = pickle_load(self._result)
        return Outcome(None if verdict == "success" else last_line(str(value)))

    def end(self) -> None:
        """Interrupt the session, and kill what does not stop in time."""
        for number in (signal.SIGINT, signal.SIGKILL):
            try:
                os.killpg(self._process.pid, number)
            except ProcessLookupError:
                return
            deadline = time.monotonic() + PATIENCE_SECONDS
            while time.monotonic() < deadline and self._session_lives():
                time.sleep(0.05)

    def _session_lives(self) -> bool:
        self._process.poll()
        try:
            os.killpg(self._process.pid, 0)
        except ProcessLookupError:
            return False
        return True


def _session_executor(backend: Any) -> Any:
    """submitit's local executor, but in a session of its own, so that Ctrl-C reaches the launcher alone.

    submitit chooses GPUs 0 to n-1 for every job; here the environment already names this job's own.
    """

    class SessionExecutor(backend.LocalExecutor):
        def _submit_command(self, command: str) -> Any:
            environ = {
                **os.environ,
                "SUBMITIT_EXECUTOR": "local",
                "SUBMITIT_LOCAL_COMMAND": command,
                "SUBMITIT_LOCAL_NTASKS": "1",
                "SUBMITIT_LOCAL_NODEID": "0",
                "SUBMITIT_LOCAL_JOB_NUM_NODES": "1",
                "SUBMITIT_LOCAL_TIMEOUT_S": str(60 * self.parameters["timeout_min"]),
                "SUBMITIT_LOCAL_SIGNAL_DELAY_S": "30",
                "SUBMITIT_LOCAL_WITH_SHELL": "",
                "SUBMITIT_STDERR_TO_STDOUT": "1",
            }
            with open(self.folder / "controller.log", "wb") as stream:
                process = subprocess.Popen(
                    [sys.executable, str(CONTROLLER), str(self.folder)],
                    env=environ,
                    stdin=subprocess.DEVNULL,
                    stdout=stream,
                    stderr=stream,
                    start_new_session=True,
                )
            return backend.LocalJob(self.folder, str(process.pid), tasks=[0], process=process)

    return SessionExecutor


def attempt_folder(stage: Stage) -> Path:
    """A fresh folder for one attempt: results of an earlier one with the same process id are never mistaken for its own."""
    stamp = f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    folder = stage.logs / stamp
    attempt = 1
    while folder.exists():
        attempt += 1
        folder = stage.logs / f"{stamp}-{attempt}"
    folder.mkdir(parents=True)
    return folder


def last_line(text: str) -> str:
    """The last line that says something, without the module path of an exception's class."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        return ""
    kind, colon, message = lines[-1].partition(": ")
    if (colon and kind.endswith("TsaeError")) or kind.endswith("LockHeld"):
        return message
    return f"{kind.rpartition('.')[2]}{colon}{message}" if kind.replace(".", "").isidentifier() else lines[-1]


@contextmanager
def environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables for the processes started inside the block."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def visible_gpus() -> tuple[str, ...]:
    """GPUs of this machine that this process may use, found without loading torch."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return tuple(name.strip() for name in named.split(",") if name.strip() and name.strip() != "-1")
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ()
    return tuple(str(i) for i, line in enumerate(listed.stdout.splitlines()) if line.startswith("GPU "))
