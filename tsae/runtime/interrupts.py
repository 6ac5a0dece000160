"""Ctrl-C, and a signal that stands for it, is heard wherever it comes: in a library's way out, and where Python passes over errors."""

from __future__ import annotations

import signal
import sys
import threading

AGAIN_SECONDS = 0.05


def interrupted(error: BaseException | None) -> bool:
    """Whether it is an interrupt, or what a library's way out of one has run into, such as that of a PDF half begun."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__context__
    return error is not None


def repeat_lost_interrupts() -> None:
    """From now on an interrupt comes again that Python ignored, as it does in `__del__` and when a weak reference dies."""
    before = sys.unraisablehook
    if getattr(before, "repeats_interrupts", False):
        return

    def hook(lost: sys.UnraisableHookArgs) -> None:
        if not issubclass(lost.exc_type, KeyboardInterrupt):
            before(lost)
            return
        # A little later, for this still is such a place; to the thread that hears signals, which may be waiting.
        again = threading.Timer(AGAIN_SECONDS, signal.pthread_kill, (threading.main_thread().ident, _number()))
        again.daemon = True
        again.start()

    hook.repeats_interrupts = True  # type: ignore[attr-defined]
    sys.unraisablehook = hook


def _number() -> signal.Signals:
    """The one that raises: SIGINT or, in a process that ignores it, SIGTERM."""
    return signal.SIGINT if callable(signal.getsignal(signal.SIGINT)) else signal.SIGTERM
