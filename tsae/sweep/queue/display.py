"""What a person sees of a running sweep: one line per event, and live lines for what is running."""

from __future__ import annotations

import shutil
import sys
import time
from typing import Any, TextIO

from tsae.runtime import metadata
from tsae.runtime.progress import SHAPE
from tsae.runtime.state import State
from tsae.sweep.queue.runner import Task
from tsae.sweep.stage import Stage

TERMINAL_SECONDS = 0.5
LOG_SECONDS = 5.0
BAR = 16
COUNTED = (State.DONE, State.RUNNING, State.ELSEWHERE, State.WAITING, State.FAILED, State.INTERRUPTED, State.BLOCKED)


class Terminal:
    """Shows a queue on `stream`: live lines redrawn in place on a terminal, else a line now and then."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._in_place = self._stream.isatty()
        self._began = time.monotonic()
        self._drawn, self._shown = 0, 0.0

    def say(self, text: str) -> None:
        """Print a line that stays."""
        self._clear()
        print(text, file=self._stream, flush=True)

    def changed(self, task: Task) -> None:
        """Print the line of an event; what a failure blocks is counted in the live lines and named at the end."""
        label, status = task.stage.label, task.status
        if task.state == State.RUNNING:
            gpus = f", GPU {status.gpus}" if status.gpus else ""
            plural = "s" if status.cpus > 1 else ""
            self.say(f"{label}: started ({status.cpus} core{plural}{gpus}; log {status.log})")
        elif task.state == State.ELSEWHERE:
            self.say(f"{label}: {status.elsewhere} is working on it; waiting for that")
        elif task.state == State.WAITING and status.restarts:
            self.say(f"{label}: was preempted; it continues when there is room")
        elif task.state == State.DONE:
            spent = f" in {duration((status.ended or 0.0) - status.started)}" if status.started else ""
            self.say(f"{label}: done{spent}")
        elif task.state in (State.FAILED, State.INTERRUPTED):
            self.say(f"{label}: {task.state.upper()}: {status.error}")
            if status.log:
                self.say(f"    log: {status.log}")

    def refresh(self, tasks: list[Task]) -> None:
        """Redraw the live lines when it is time."""
        now = time.monotonic()
        if now - self._shown < (TERMINAL_SECONDS if self._in_place else LOG_SECONDS):
            return
        self._shown = now
        lines = [progress_line(task) for task in tasks if task.state in (State.RUNNING, State.ELSEWHERE)]
        if not lines:
            return
        counts = ", ".join(
            f"{sum(task.state == state for task in tasks)} {state}"
            for state in COUNTED
            if any(task.state == state for task in tasks)
        )
        lines.append(f"[{duration(now - self._began)}] {len(tasks)} stages: {counts}")
        self._clear()
        width = shutil.get_terminal_size().columns - 1 if self._in_place else None
        for line in lines:
            print(line[:width], file=self._stream)
        self._stream.flush()
        self._drawn = len(lines) if self._in_place else 0

    def _clear(self) -> None:
        """Take the live lines away; the next text replaces them."""
        if self._drawn:
            self._stream.write(f"\x1b[{self._drawn}F\x1b[J")
            self._drawn = 0


def progress_line(task: Task) -> str:
    """`train k=16  [####    ] 200/800 steps  12.5/s  0:48 left  loss 0.31`."""
    began = task.status.started or 0.0
    label = f"  {task.stage.label}"
    record = read_progress(task.stage, began)
    if not record or not record.get("total"):
        return f"{label}  starting, {duration(time.time() - began)}" if began else f"{label}  starting"
    done, total, rate = record["done"], record["total"], record.get("rate") or 0.0
    filled = min(BAR, BAR * done // total)
    left = f"  {duration((total - done) / rate)} left" if rate > 0 and done < total else ""
    part = "" if str(record["stage"]).split(" ")[0] == task.stage.kind else f"{record['stage']} "
    return (
        f"{label}  {part}[{'#' * filled}{'.' * (BAR - filled)}] {done}/{total} {record['unit']}"
        f"  {rate:.3g}/s{left}  {record.get('message', '')}"
    ).rstrip()


def read_progress(stage: Stage, began: float) -> dict[str, Any]:
    """What the stage last wrote about itself; nothing from before it began counts."""
    # Not written yet, damaged, or by another version: progress is for looking at, nothing depends on it.
    record = metadata.whole(stage.progress, SHAPE)
    return record if record and record["time"] >= began else {}


def duration(seconds: float) -> str:
    """Seconds as `m:ss`, `h:mm:ss` or `2d 3:04:05`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if not hours and not days:
        return f"{minutes}:{rest:02}"
    return f"{f'{days}d ' if days else ''}{hours}:{minutes:02}:{rest:02}"
