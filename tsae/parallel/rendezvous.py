"""Where the processes that were started together meet, and leave together."""

from __future__ import annotations

import atexit
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from tsae.parallel.group import ALONE, Group, Processes, reason_of
from tsae.parallel.liveness import Heartbeat
from tsae.runtime import preemption
from tsae.runtime.environment import process_count
from tsae.runtime.errors import TsaeError
from tsae.runtime.locks import LockHeld

PATIENCE = timedelta(minutes=30)
"""How long a collective of the training waits for a process that lives."""
HOST_PATIENCE = timedelta(days=1)
"""The same while one process writes or measures and the others have nothing to do."""
SILENCE = timedelta(minutes=2)
"""After how long without a sign of life, such as from a machine without power, a process counts as dead."""
PARTING_SECONDS = 5.0
"""How long a process that ends before its work does waits for what is under way to break off."""

_group: Processes | None = None
_beats: Any = None
_together = False


@contextmanager
def together(cpu: bool) -> Iterator[Group]:
    """The processes that torchrun, accelerate or a scheduler started with this one (RANK, WORLD_SIZE, LOCAL_RANK and
    MASTER_ADDR in the environment tell); all of them enter the block and leave it together.

    `cpu`: though there may be GPUs. Inside another such block nothing is waited for. Raises Preempted, or LockHeld, at
    the end in all of them if one does inside; and TsaeError if they do not meet, or one ends meanwhile: within seconds if it was
    killed, within `SILENCE` if its machine was lost.
    """
    global _together
    if process_count() == 1 or _together:
        yield _group if _together and _group is not None else ALONE
        return
    group = _meet(cpu)
    heartbeat, _together = Heartbeat(group, _beats), True
    reason: BaseException | None = None
    try:
        try:
            yield group
        except (preemption.Preempted, LockHeld) as error:
            reason = error
        preempted, held = group.start_any([isinstance(reason, kind) for kind in (preemption.Preempted, LockHeld)])()
        heartbeat.stop()
    except BaseException:
        atexit.unregister(_part)
        heartbeat.abandon()
        # It may wait for ever for what the others have left open.
        parting = threading.Thread(target=_part, daemon=True)
        parting.start()
        parting.join(PARTING_SECONDS)
        raise
    finally:
        _together = False
    if preempted:
        raise preemption.Preempted
    if held:
        raise reason or LockHeld("another process is already working on the same output; wait for it or end it")


def _meet(cpu: bool) -> Processes:
    """The group of all processes; they meet once."""
    global _group, _beats
    if _group is not None:
        return _group
    from accelerate import PartialState

    try:
        store, rank, world = next(dist.rendezvous("env://", timeout=PATIENCE))
        # torchrun that restarts its processes keeps the store, in which the addresses of the dead still stand.
        attempt = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        state = PartialState(cpu=cpu, timeout=PATIENCE, store=attempt, rank=rank, world_size=world)
        control = dist.new_group(backend="gloo", timeout=HOST_PATIENCE)
        _beats = dist.new_group(backend="gloo", timeout=SILENCE)
    except (RuntimeError, ValueError) as error:
        where = ":".join(os.environ.get(name, "?") for name in ("MASTER_ADDR", "MASTER_PORT"))
        raise TsaeError(
            f"process {os.environ.get('RANK')} of {process_count()}: did not meet the others at {where} "
            f"({reason_of(error)}); start all of them, with the same MASTER_ADDR and MASTER_PORT"
        ) from error
    atexit.register(_part)
    _group = Processes(state.device, control)
    return _group


def _part() -> None:
    """Close the connections and end their threads, of which one that let go of a tensor while the interpreter is being
    taken down would abort the process.
    """
    global _group, _beats
    if _group is not None:
        _group.part()
    _group = _beats = None
    if dist.is_initialized():
        dist.destroy_process_group()
