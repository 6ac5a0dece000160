"""Progress that a person sees in the terminal and a launcher reads from a file."""

from __future__ import annotations

import os
import sys
import time
from contextlib import suppress
from pathlib import Path

from tsae.runtime import metadata
from tsae.runtime.environment import process_rank
from tsae.runtime.metadata import NATURAL

LINE_SECONDS = 2.0
SHAPE = {
    **{"stage": str, "done": NATURAL, "total": (None, NATURAL), "unit": str, "rate": float, "message?": str},
    "time": float,
}
"""What the file holds."""


class Progress:
    """A progress line on stderr and, beside the output, a small JSON file that is always whole.

    The file holds `stage`, `done`, `total`, `unit`, `rate` (units per second), `message` and `time`.
    """

    def __init__(self, stage: str, total: int | None, unit: str, path: Path | None = None, start: int = 0) -> None:
        self.stage, self.total, self.unit, self.path = stage, total, unit, path
        self._start, self._began, self._shown = start, time.monotonic(), 0.0

    def update(self, done: int, **shown: float | int | str) -> None:
        """Report that `done` of `total` (None: not known) is reached; `shown` are named figures for the line."""
        if process_rank() > 0:
            return  # of processes that work together the first one speaks
        now = time.monotonic()
        if (self.total is None or done < self.total) and now - self._shown < LINE_SECONDS:
            return
        self._shown = now
        rate = self.rate(done)
        figures = {name: f"{value:.4g}" if isinstance(value, float) else value for name, value in shown.items()}
        message = " ".join(f"{name} {figure}" for name, figure in figures.items())
        reached = f"{done}" if self.total is None else f"{done}/{self.total}"
        print(
            f"{self.stage}: {reached} {self.unit} ({rate:.3g}/s) {message}".rstrip(),
            file=sys.stderr,
            flush=True,
        )
        if self.path is not None:
            record = {
                "stage": self.stage,
                "done": done,
                "total": self.total,
                "unit": self.unit,
                "rate": rate,
                "message": message,
                "time": time.time(),
            }
            # Nothing depends on it, so it may be lost with the machine. Its draft has one name: what a kill leaves of it
            # the next report takes over, and another command on the same run may have renamed it already.
            self.path.parent.mkdir(parents=True, exist_ok=True)
            draft = self.path.with_name(f".{self.path.name}.tmp")
            try:
                draft.write_text(metadata.text_of(record))
                with suppress(FileNotFoundError):
                    os.replace(draft, self.path)
            finally:
                draft.unlink(missing_ok=True)

    def rate(self, done: int) -> float:
        """Units per second since this process began."""
        return (done - self._start) / max(time.monotonic() - self._began, 1e-9)
