"""What a person sees of a running sweep: one line per event, and live lines for what is running."""

from __future__ import annotations

import json
import shutil
import sys
import time
from typing import Any, TextIO

from runner import Task

TERMINAL_SECONDS = 0.5
LOG_SECONDS = 5.0
BAR = 16


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
        label = task.stage.label
        if task.state == "running" and task.share is not None and task.job is not None:
            gpus = f", GPU {','.join(task.share.gpus)}" if task.share.gpus else ""
            plural = "s" if task.share.cpus > 1 else ""
            self.say(f"{label}: started ({task.share.cpus} core{plural}{gpus}; log {task.job.log})")
        elif task.state == "elsewhere":
            self.say(f"{label}: {task.elsewhere} is working on it; waiting for that")
        elif task.state == "waiting" and task.preemptions:
            self.say(f"{label}: was preempted; it continues when there is room")
        elif task.state == "done":
            spent = f" in {duration(time.time() - task.job.started)}" if task.job else ""
            self.say(f"{label}: done{spent}")
        elif task.state == "failed":
            self.say(f"{label}: FAILED: {task.error}")
            if task.job is not None:
                self.say(f"    log: {task.job.log}")

    def refresh(self, tasks: list[Task]) -> None:
        """Redraw the live lines when it is time."""
        now = time.monotonic()
        if now - self._shown < (TERMINAL_SECONDS if self._in_place else LOG_SECONDS):
            return
        self._shown = now
        lines = [progress_line(task) for task in tasks if task.state in ("running", "elsewhere")]
        if not lines:
            return
        counts = ", ".join(
            f"{sum(task.state == state for task in tasks)} {state}"
            for state in ("done", "running", "elsewhere", "waiting", "failed", "blocked")
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
    began = task.job.started if task.job is not None else task.elsewhere.since if task.elsewhere else time.time()
    label = f"  {task.stage.label}"
    record = read_progress(task, began)
    if not record or not record.get("total"):
        return f"{label}  starting, {duration(time.time() - began)}"
    done, total, rate = record["done"], record["total"], record.get("rate") or 0.0
    filled = min(BAR, BAR * done // total)
    left = f"  {duration((total - done) / rate)} left" if rate > 0 and done < total else ""
    stage = "" if str(record["stage"]).split(" ")[0] == task.stage.kind else f"{record['stage']} "
    return (
        f"{label}  {stage}[{'#' * filled}{'.' * (BAR - filled)}] {done}/{total} {record['unit']}"
        f"  {rate:.3g}/s{left}  {record.get('message', '')}"
    ).rstrip()


def read_progress(task: Task, began: float) -> dict[str, Any]:
    """What the stage last wrote about itself; nothing from before it began counts."""
    try:
        record: dict[str, Any] = json.loads(task.stage.progress.read_text())
        return record if record["time"] >= began else {}
    except (OSError, ValueError, KeyError, TypeError):
        # Not written yet, or by another version: progress is for looking at, nothing depends on it.
        return {}


def duration(seconds: float) -> str:
    """Seconds as `m:ss` or `h:mm:ss`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
