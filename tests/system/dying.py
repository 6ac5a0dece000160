"""Stages that are killed or signalled at a chosen moment; the processes that the tests start import this."""

from __future__ import annotations

import functools
import importlib
import io
import itertools
import os
import signal
import threading
from collections.abc import Callable
from typing import Any, BinaryIO

import torch

from tsae import preemption, stages
from tsae.checkpoint import RunFolder
from tsae.config import RunConfig
from tsae.training.resume import ResumeStates
from tsae.training.run import train
from tsae.training.trainer import Trainer

WHOLE_SAVE = torch.save
MOMENTS = ("after a time", "in a step", "in a write", "before a sync", "before a rename", "after a rename")


def train_and_die(config: RunConfig, run: RunFolder, moment: str, count: int) -> None:
    """Train; SIGKILL at the `count`-th such moment (the `count`-th hundredth of a second for 'after a time')."""
    if moment == "after a time":
        threading.Timer(count / 100, _die).start()
    elif moment == "in a step":
        _at(Trainer, "_track_threshold", count, before=_die)
    elif moment == "in a write":
        _at(torch, "save", count, before=_write_half)
    elif moment == "before a sync":
        _at(os, "fsync", count, before=_die)
    elif moment == "before a rename":
        _at(os, "replace", count, before=_die)
    elif moment == "before the states are removed":
        _at(ResumeStates, "remove", count, before=_die)
    else:
        _at(os, "replace", count, after=_die)
    train(config, run)
    # A timer that has not struck must not outlive the training.
    os._exit(0)


def signalled(stage: str, arguments: tuple[Any, ...], at: str, count: int, number: int) -> None:
    """Run a stage that gets signal `number` in the `count`-th call of `at` (module:name), and while it saves states."""

    def send(*_: Any) -> None:
        if count:
            os.kill(os.getpid(), number)

    module, _, path = at.partition(":")
    *owners, name = path.split(".")
    _at(functools.reduce(getattr, owners, importlib.import_module(module)), name, count, before=send)
    # Called by the thread that writes; the main thread, which waits for it, handles the signals.
    for n in range(1, 4):
        _at(torch, "save", n, before=lambda *_: preemption.requested() and send())
    getattr(stages, stage)(*arguments)


def _at(owner: Any, name: str, count: int, before: Callable[..., Any] | None = None, after: Any = None) -> None:
    """Let `before` or `after` happen at the `count`-th call of a function."""
    original, calls = getattr(owner, name), itertools.count(1)

    def wrapped(*arguments: Any, **named: Any) -> Any:
        now = next(calls) == count
        if now and before is not None:
            before(*arguments)
        result = original(*arguments, **named)
        if now and after is not None:
            after()
        return result

    setattr(owner, name, wrapped)


def _die(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _write_half(state: Any, stream: BinaryIO) -> None:
    """Leave the first half of a checkpoint in the file."""
    whole = io.BytesIO()
    WHOLE_SAVE(state, whole)
    stream.write(whole.getvalue()[: whole.tell() // 2])
    stream.flush()
    _die()
