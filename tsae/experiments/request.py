"""What the command line of an experiment asks for: on which run, with which configuration."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from tsae.checkpoint import BASELINE, RunFolder
from tsae.config import run as configuration
from tsae.config.run import RunConfig
from tsae.experiments.driver import with_dataset
from tsae.experiments.registry import require_possible
from tsae.interop.place import Place
from tsae.interop.settings import find_run, settings_of
from tsae.runtime import environment
from tsae.runtime.errors import TsaeError


def arguments_of(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """What `stages.experiment_run` is called with. Raises TsaeError."""
    if options.run_name is None:
        if not options.overrides:
            raise TsaeError(
                f"{name}: which run? Its name or folder is expected: tsae {name} RUN (`tsae runs` lists them)"
            )
        options.run_name, *options.overrides = options.overrides
    checkpoints = options.checkpoints_path or environment.home() / "checkpoints"
    for key in ("protocol", "beside"):
        if getattr(options, key, None) is not None:
            options.overrides = [*options.overrides, f"experiments.{name}.{key}={getattr(options, key)}"]
    if options.run_name == BASELINE:
        config, run = _baseline(options), RunFolder(RunFolder.of(checkpoints, BASELINE).path, options.out)
    else:
        run = find_run(options.run_name, checkpoints, options.out)
        used = (f"experiments.{name}", "experiments.texts")
        config = settings_of(run, _overrides(options), used, Place(options.model, options.layer))
    chunk = getattr(options, "chunk", None)
    config = with_dataset(config, name, options.dataset)
    require_possible(name, config, str(run.path))
    return {
        "config": config,
        "run": run,
        "name": name,
        "chunks": None if chunk is None else [chunk],
        "checkpoint": options.checkpoint,
        "explanations": getattr(options, "explanation_path", None),
    }


def _overrides(options: argparse.Namespace) -> dict[str, Any]:
    extra = configuration.parse_overrides(options.overrides)
    configuration.check_part(extra, "command line")
    return extra


def _baseline(options: argparse.Namespace) -> RunConfig:
    """The configuration of the dense residual stream: the command line's alone."""
    if getattr(options, "chunk", None) in (0, 1):
        raise TsaeError(f"--chunk {options.chunk}: {BASELINE} has no splits; leave --chunk out")
    named = {"model.name": options.model, "model.layer": options.layer}
    given = {key: value for key, value in named.items() if value is not None}
    given = configuration.locate(given, Path.cwd())
    return configuration.from_mapping(configuration.lay_over({}, given | _overrides(options)), "command line")
