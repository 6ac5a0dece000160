"""What the jobs of these tests do when nothing is to be learned from training: they load no torch and end soon."""

from __future__ import annotations

import importlib
import json
import os
import site
import time
from pathlib import Path
from typing import Any

from tsae.runtime import preemption
from tsae.runtime.environment import process_rank
from tsae.runtime.files import write_json
from tsae.runtime.locks import LockHeld


def note(_configs: str, path: str, seconds: float = 0.0) -> None:
    """Write down where and when this ran."""
    began = time.time()
    time.sleep(seconds)
    seen = {name: value for name, value in os.environ.items() if name.startswith(("SLURM_", "TSAE_", "CUDA_", "MY_"))}
    place: dict[str, Any] = {"code": preemption.__file__, "image": os.environ.get("APPTAINER_CONTAINER")}
    place["no_user_site"] = not site.ENABLE_USER_SITE
    write_json(Path(path), {"began": began, "ended": time.time(), "environment": seen, **place})


def note_package(_configs: str, path: str, name: str) -> None:
    """Write down where package `name` and this code come from, and what PYTHONPATH is."""
    found = {"package": importlib.import_module(name).__file__, "code": preemption.__file__}
    write_json(Path(path), {**found, "path": os.environ["PYTHONPATH"]})


def fail(_configs: str, words: str) -> None:
    """Raise an error with these words."""
    raise ValueError(words)


def fail_in_one(_configs: str, path: str) -> None:
    """Raise an error in the second process, while the first counts, and leaves when it is asked to."""
    if process_rank() == 1:
        raise ValueError("no luck in one")
    count_up(_configs, path, 1000)


def die(_configs: str) -> None:
    """End without a word, as a process does that runs out of memory."""
    os._exit(9)


def count_up(_configs: str, path: str, until: int, seconds: float = 0.1) -> None:
    """Count from where the last process stopped; asked to leave, save the count and go."""
    state, counted = Path(path), 0
    if state.exists():
        counted = json.loads(state.read_text())["counted"]
    try:
        while counted < until:
            preemption.check()
            time.sleep(seconds)
            counted += 1
    finally:
        write_json(state, {"counted": counted})


def hang(_configs: str, path: str) -> None:
    """Begin a line in a file and do nothing more, whatever is asked; done at once the second time."""
    begun = Path(path).exists()
    Path(path).touch()
    if not begun:
        time.sleep(600)


def train(config: str, checkpoints: str, name: str, reached: str) -> None:
    """Train; the first time, halt after 100 steps, note in file `reached` that they are done, and wait for a signal."""
    from tsae.stages import train_stage
    from tsae.training.trainer import Trainer

    advance = Trainer.advance

    def halting(trainer: Any, *batch: Any) -> Any:
        tell = advance(trainer, *batch)
        if trainer.steps_done == 100 and "SLURM_RESTART_COUNT" not in os.environ:
            Path(reached).touch()
            while not preemption.requested():
                time.sleep(0.05)
        return tell

    Trainer.advance = halting  # type: ignore[method-assign]
    train_stage(config, checkpoints, name)


def wait_for_lock(_configs: str, path: str) -> None:
    """As a stage whose lock another process holds until there is a file."""
    if not Path(path).exists():
        raise LockHeld("somebody is working on it")
