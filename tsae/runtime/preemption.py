"""Being asked to leave: SIGTERM, SIGUSR2 and the end of the terminal (SIGHUP) set a flag, which the stages poll where they can stop and lose little.

A stage that leaves has saved its state and ends the process with `REQUEUE`: whoever started it runs it again.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import BrokenExecutor
from contextlib import contextmanager
from types import FrameType
from typing import TypeVar

REQUEUE = 75
"""Exit code of a process that was preempted and can continue: EX_TEMPFAIL, "try again later", of sysexits.h."""
SIGNALS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGHUP)

_Item = TypeVar("_Item")
_asked: signal.Signals | None = None
_told = False
_watching = False


class Preempted(SystemExit):
    """This process was asked to leave and has saved what it had; ends it with `REQUEUE` and without a traceback.

    No `Exception`: submitit would record one as the job's result, and a job that has a result is not run again.
    """

    def __init__(self) -> None:
        super().__init__(REQUEUE)

    def __str__(self) -> str:
        return f"preempted ({_asked.name if _asked else 'by another process'}); the same command continues"


@contextmanager
def watched() -> Iterator[None]:
    """Turn the signals into a flag while the block runs; inside another such block, or another thread, nothing changes.

    Handlers of others, such as submitit's own, are put back at the end; but a process that is on its way out takes
    no more notice of the signals. Raises Preempted in place of the error of a pool whose processes the signal killed.
    """
    global _asked, _told, _watching
    if _watching or threading.current_thread() is not threading.main_thread():
        yield
        return
    # What nohup has made deaf to the end of its terminal stays so.
    heard = [number for number in SIGNALS if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, _note) for number in heard}
    _watching = True
    try:
        yield
        _asked, _told = None, False
    except BaseException as error:
        if isinstance(error, Preempted) or (isinstance(error, BrokenExecutor) and requested()):
            before = dict.fromkeys(SIGNALS, signal.SIG_IGN)
            raise Preempted from error.__cause__
        _asked, _told = None, False
        raise
    finally:
        _watching = False
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def requested() -> bool:
    """Whether this process was asked to leave."""
    return _asked is not None or _told


def request() -> None:
    """Ask this process to leave, because one that it works with was asked to; without effect unless it is watched."""
    global _told
    _told = _watching


def check() -> None:
    """Raise Preempted if this process was asked to leave; for places where there is nothing to save."""
    if requested():
        raise Preempted


def wait(seconds: float) -> None:
    """Sleep, and raise Preempted soon after this process is asked to leave."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        check()
        time.sleep(0.2)


def polled(items: Iterable[_Item]) -> Iterator[_Item]:
    """`items`, with a check before each."""
    for item in items:
        check()
        yield item


def _note(number: int, _frame: FrameType | None) -> None:
    global _asked
    _asked = _asked or signal.Signals(number)


def _in_child() -> None:
    """A forked helper ends when it is told to, and leaves to its parent what is sent to all of a job or terminal: USR2, HUP."""
    global _asked, _told, _watching
    if _watching:
        _asked, _told, _watching = None, False, False
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)


os.register_at_fork(after_in_child=_in_child)
