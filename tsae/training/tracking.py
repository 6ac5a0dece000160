"""accelerate's engine and the experiment trackers it feeds, which take up an interrupted run where it continues."""

from __future__ import annotations

import importlib.util
import uuid
from typing import Any

from accelerate import Accelerator

from tsae.checkpoint import RunFolder
from tsae.config import schema
from tsae.config.run import RunConfig
from tsae.runtime.errors import TsaeError


def new_tracking() -> dict[str, Any]:
    """What a resumable state keeps of the trackers: the name of this run there, and the step that comes next."""
    return {"id": uuid.uuid4().hex, "step": 0}


def make_accelerator(config: RunConfig, run: RunFolder, tracking: dict[str, Any]) -> Accelerator:
    """The engine of one run, its trackers set to continue at `tracking`. Raises TsaeError for one not installed."""
    settings = config.training
    for tracker in settings.trackers:
        if importlib.util.find_spec(tracker) is None:
            raise TsaeError(f"training.trackers: {tracker} is not installed; pip install 'tsae[{tracker}]'")
    accelerator = Accelerator(
        cpu=settings.device == "cpu",
        log_with=list(settings.trackers) or None,
        project_dir=str(run.path),
    )
    if settings.trackers:
        # Of steps that are done again, tensorboard hides the first writing and wandb ignores the second.
        continued = {
            "tensorboard": {"purge_step": tracking["step"]} if tracking["step"] else {},
            "wandb": {"id": tracking["id"], "resume": "allow"},
        }
        accelerator.init_trackers("tsae", config=_flat(schema.to_plain(config)), init_kwargs=continued)
    return accelerator


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` → `{"a.b": 1}`; what trackers cannot store becomes text."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value if isinstance(value, (int, float, str, bool)) else str(value)
    return flat
