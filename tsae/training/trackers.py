"""Experiment trackers of a run: TensorBoard and W&B. What they need is asked for before anything starts; none ends a training.

A run has in W&B the name that it has on disk, and its sweep is its group. Files lie in the run's folder.
"""

from __future__ import annotations

import http.client
import importlib.util
import logging
import os
import ssl
import urllib.error
import urllib.request
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

from tsae.checkpoint import RunFolder
from tsae.config import schema
from tsae.config.run import RunConfig
from tsae.runtime.environment import home
from tsae.runtime.errors import TsaeError

PATIENCE = {"WANDB_INIT_TIMEOUT": "30", "WANDB_FINISH_TIMEOUT": "60"}
"""Seconds that W&B's server has to answer at the beginning, and to take what is left at the end, unless the user says so."""
ANSWER_SECONDS = 10.0

log = logging.getLogger("tsae")


class Tracker(Protocol):
    """What is told of a run while it trains."""

    def log(self, values: dict[str, float], step: int) -> object:
        """Take the measures of a step."""

    def finish(self) -> object:
        """Write what is left."""


def require(trackers: Iterable[str]) -> None:
    """Refuse what cannot track from here: packages that are not installed, W&B without a key. Raises TsaeError."""
    for tracker in sorted(set(trackers)):
        if importlib.util.find_spec(tracker) is None:
            raise TsaeError(f"training.trackers: {tracker} is not installed; pip install 'tsae[{tracker}]'")
        if tracker == "wandb":
            _require_key()


def _require_key() -> None:
    import wandb

    for name, seconds in PATIENCE.items():
        os.environ.setdefault(name, seconds)
    if _stays_here():
        return
    try:
        known = wandb.login(verify=False, prompt=False)
    except (wandb.Error, ValueError) as error:
        raise TsaeError(f"training.trackers: W&B does not take the key that it finds: {error}") from None
    if not known:
        raise TsaeError(
            "training.trackers: W&B has no key here; `wandb login` or WANDB_API_KEY gives it one, WANDB_MODE=offline keeps "
            "its runs in their folders"
        )


class Trackers:
    """The trackers that a run's settings name, which go on at `tracking`: the run's id there, and the step that comes next."""

    def __init__(self, config: RunConfig, run: RunFolder, tracking: dict[str, Any]) -> None:
        opening = {"tensorboard": _tensorboard, "wandb": _wandb}
        # What trackers cannot store becomes text.
        flat = schema.flatten(schema.to_plain(config))
        told = {key: value if isinstance(value, (int, float, str, bool)) else str(value) for key, value in flat}
        self._open: dict[str, Tracker] = {}
        for name in config.training.trackers:
            self._open[name] = opening[name](config, run, tracking, told)

    def log(self, values: dict[str, float], step: int) -> None:
        """Tell all of them; one that fails is told no more."""
        for name, tracker in list(self._open.items()):
            try:
                tracker.log(values, step=step)
            except Exception as error:
                del self._open[name]
                log.warning("%s: %s: %s; the training goes on without it", name, type(error).__name__, error)

    def finish(self) -> None:
        """Write what is left."""
        for name, tracker in self._open.items():
            try:
                tracker.finish()
            except Exception as error:
                log.warning("%s: %s: %s; it may lack the end of the run", name, type(error).__name__, error)


def _tensorboard(_: RunConfig, run: RunFolder, tracking: dict[str, Any], told: dict[str, Any]) -> Tracker:
    from accelerate.tracking import TensorBoardTracker

    # Of steps that are done again, the first writing is hidden.
    purged = {"purge_step": tracking["step"]} if tracking["step"] else {}
    tracker = TensorBoardTracker("tsae", run.path, **purged)
    tracker.start()
    tracker.store_init_configuration(told)
    return tracker


def _wandb(config: RunConfig, run: RunFolder, tracking: dict[str, Any], told: dict[str, Any]) -> Tracker:
    import wandb

    name, group = _names(run)
    settings = {
        "project": config.training.wandb_project or os.environ.get("WANDB_PROJECT") or "tsae",
        "entity": config.training.wandb_entity,
        "name": name,
        "group": group,
        "config": told,
        "dir": os.environ.get("WANDB_DIR") or run.path,
        # It ignores steps that are done again.
        "id": tracking["id"],
        "resume": "allow",
        "reinit": "create_new",  # runs that train together
    }
    silence = "" if _stays_here() else _silence(wandb.setup().settings.base_url)
    if not silence:
        try:
            return wandb.init(**settings)
        except (wandb.Error, OSError) as error:
            silence = str(error).splitlines()[0]
            settings["id"] += "-offline"  # it keeps the other
    log.warning(
        "%s: W&B's server does not take the run (%s); it is kept in %s, and `wandb sync` sends it",
        name, silence, Path(settings["dir"]) / "wandb",
    )  # fmt: skip
    return wandb.init(**settings, mode="offline")


def _stays_here() -> bool:
    """Whether the user asked W&B to send nothing."""
    import wandb

    return wandb.setup().settings.mode in ("offline", "dryrun", "disabled")


def _silence(url: str) -> str:
    """Why no server answers at `url`; nothing if one does, whatever it says."""
    try:
        urllib.request.urlopen(url, timeout=ANSWER_SECONDS).close()
    except (urllib.error.HTTPError, http.client.HTTPException, ssl.SSLError):
        return ""
    except OSError as error:
        reason = getattr(error, "reason", error)
        return "" if isinstance(reason, ssl.SSLError) else f"{url}: {reason}"  # whose certificates are W&B's matter
    return ""


def _names(run: RunFolder) -> tuple[str, str | None]:
    """The name of a run and of the sweep, or the folder, that it belongs to."""
    try:
        *groups, name = run.path.parent.absolute().relative_to(home() / "checkpoints").parts
    except ValueError:
        return run.path.parent.name, None
    return name, "/".join(groups) or None
