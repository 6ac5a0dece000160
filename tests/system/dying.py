"""Stages that are killed or signalled at a chosen moment; the processes that the tests start import this."""

from __future__ import annotations

import functools
import importlib
import io
import itertools
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch

from tsae import cli, stages
from tsae.checkpoint import RunFolder
from tsae.config.run import RunConfig
from tsae.parallel import liveness
from tsae.parallel.rendezvous import together
from tsae.runtime import preemption
from tsae.training.resume import ResumeStates
from tsae.training.run import train
from tsae.training.trainer import Trainer

WHOLE_SAVE = torch.save
MOMENTS = ("after a time", "in a step", "in a write", "before a sync", "before a rename", "after a rename")


def train_and_die(config: RunConfig, run: RunFolder, moment: str, count: int) -> None:
    """Train; SIGKILL at the `count`-th such moment (the `count`-th hundredth of a second for 'after a time')."""
    _die_at(moment, count)
    train(config, run)
    # A timer that has not struck must not outlive the training.
    os._exit(0)


def _die_at(moment: str, count: int) -> None:
    if moment == "after a time":
        threading.Timer(count / 100, _die).start()
    elif moment == "in a step":
        ResumeStates.busy = False  # type: ignore[assignment]  # states are waited for, not left out, where the disk is slow
        _at(Trainer, "_track_thresholds", count, before=_die)
    elif moment == "in a write":
        _at(torch, "save", count, before=_write_half)
    elif moment == "before a sync":
        _at(os, "fsync", count, before=_die)
    elif moment == "before a rename":
        _at(os, "replace", count, before=_die)
    elif moment == "before the states are removed":
        _at(RunFolder, "end", count, before=_die)
    else:
        _at(os, "replace", count, after=_die)


def as_rank(
    rank: int,
    world: int,
    port: int,
    folder: Path,
    arguments: list[str],
    slurm: bool = False,
    kill: tuple[int, str, int] | None = None,
    preempt: tuple[int, str, int] | None = None,
) -> None:
    """Be process `rank` of `world` that run a `tsae` command.

    `kill` (rank, moment, n) ends one at its n-th such moment, `preempt` (rank, at, n) signals one in its n-th call of
    `at` (module:name).
    What it says goes to `rank<n>.err`. With `slurm`, srun's variables say which process it is, else torchrun's.
    """
    _write_errors_to(folder / f"rank{rank}.err")
    os.environ.update(_srun(rank, world, port) if slurm else _torchrun(rank, world, port))
    if kill is not None and kill[0] == rank:
        _die_at(*kill[1:])
    if preempt is not None and preempt[0] == rank:
        _at(*_found(preempt[1]), preempt[2], before=lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    sys.exit(cli.main(arguments))


def in_folder(
    folder: Path,
    arguments: list[str],
    rank: int,
    world: int,
    port: int,
    seconds: float | None = None,
    number: int = 0,
    place: Callable[[Path], None] = lambda _: None,
) -> None:
    """Be process `rank` of `world` that run a `tsae` command in a folder; after so many seconds it gets signal `number`.

    TSAE_HOME is `home` there; what it says goes to `rank<n>.err` beside the folder. `place` is done first.
    """
    _write_errors_to(folder.parent / f"rank{rank}.err")
    os.chdir(folder)
    place(folder)
    os.environ.update({"TSAE_HOME": str(folder / "home")}, **(_torchrun(rank, world, port) if world > 1 else {}))
    if seconds is not None:
        timer = threading.Timer(seconds, os.kill, (os.getpid(), number))
        timer.daemon = True
        timer.start()
    sys.exit(cli.main(arguments))


def while_another_dies(rank: int, world: int, port: int, folder: Path, _arguments: list[str]) -> None:
    """Be one of several processes of which number 1 dies while the others work alone for long."""
    _write_errors_to(folder / f"rank{rank}.err")
    os.environ.update(_torchrun(rank, world, port))
    liveness.GRACE_SECONDS = 0.1
    with together(cpu=True):
        if rank == 1:
            _die()
        time.sleep(600)


def with_old_files(rank: int, world: int, port: int, folder: Path, arguments: list[str]) -> None:
    """Be one of several processes of which number 1 sees no resumable states, as on a file system that lags behind."""
    if rank == 1:
        ResumeStates._counted = lambda _: []  # type: ignore[method-assign]
    as_rank(rank, world, port, folder, arguments)


def _write_errors_to(path: Path) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    with open(path, "wb") as stream:
        os.dup2(stream.fileno(), 2)


def under_torchrun(killed: str, arguments: list[str]) -> None:
    """Be a process that torchrun started: number `killed` dies in its 20th update, unless torchrun has restarted it."""
    if os.environ["RANK"] == killed and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        _die_at("in a step", 20)
    sys.exit(cli.main(arguments))


def _torchrun(rank: int, world: int, port: int) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def _srun(rank: int, world: int, port: int) -> dict[str, str]:
    return {
        "SLURM_JOB_ID": str(port),
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NUM_TASKS": str(world),
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(rank),
        "SLURM_STEP_NODELIST": "localhost",
    }


def signalled(stage: str, arguments: tuple[Any, ...], at: str, count: int, number: int) -> None:
    """Run a stage that gets signal `number` in the `count`-th call of `at` (module:name), and while it saves states."""

    def send(*_: Any) -> None:
        if count:
            os.kill(os.getpid(), number)

    _at(*_found(at), count, before=send)
    # Called by the thread that writes; the main thread, which waits for it, handles the signals.
    for n in range(1, 4):
        _at(torch, "save", n, before=lambda *_: preemption.requested() and send())
    getattr(stages, stage)(*arguments)


def _found(at: str) -> tuple[Any, str]:
    """Where the function `module:name` is, and its name there."""
    module, _, path = at.partition(":")
    *owners, name = path.split(".")
    return functools.reduce(getattr, owners, importlib.import_module(module)), name


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


if __name__ == "__main__":
    under_torchrun(sys.argv[1], sys.argv[2:])
