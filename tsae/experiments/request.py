"""What the command line of an experiment asks for: on which run, with which configuration."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from tsae.checkpoint import BASELINE, RunFolder, find_dictionary
from tsae.config import run as configuration
from tsae.config import schema
from tsae.config.run import RunConfig
from tsae.config.sections import ModelConfig
from tsae.experiments.driver import with_dataset
from tsae.interop.origin import origin_of, read_json
from tsae.interop.place import Place
from tsae.runtime import environment
from tsae.runtime.errors import TsaeError, suggestion

FREE = ("model.device", "model.batch_size", "training.device")
"""Settings of a trained run that an experiment may change: where things run."""


def arguments_of(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """What the stage of experiment `name` is called with. Raises TsaeError."""
    checkpoints = options.checkpoints_path or environment.home() / "checkpoints"
    if getattr(options, "protocol", None) is not None:
        options.overrides = [*options.overrides, f"experiments.{name}.protocol={options.protocol}"]
    config = with_dataset(_config(checkpoints, options), name, options.dataset)
    chunk = getattr(options, "chunk", None)
    return {
        "config": config,
        "checkpoints_path": checkpoints,
        "run_name": options.run_name,
        "name": name,
        "chunks": None if chunk is None else [chunk],
        "checkpoint": options.checkpoint,
        "explanations": getattr(options, "explanation_path", None),
    }


def _existing(checkpoints: Path, name: str) -> Path:
    """Where the run `name` is. Raises TsaeError with the runs there are if it is not one of them."""
    path = RunFolder.of(checkpoints, name).path.parent
    if checkpoints.is_dir() and not path.exists():
        runs = sorted(folder.parent.name for folder in checkpoints.glob("*/trainer_0"))
        raise TsaeError(
            f"--run_name {name}: {checkpoints} holds no such run; {suggestion(name, runs)}"
            f"runs found: {', '.join(runs) or 'none'}"
        )
    return path


def _config(checkpoints: Path, options: argparse.Namespace) -> RunConfig:
    """The run's own configuration with the command line's overrides; of files from elsewhere, what they tell.

    Raises TsaeError if `--model` or `--layer` contradict the run.
    """
    extra = configuration.parse_overrides(options.overrides)
    configuration.check_part(extra, "command line")
    if options.run_name == BASELINE:
        if getattr(options, "chunk", None) in (0, 1):
            raise TsaeError(f"--chunk {options.chunk}: {BASELINE} has no splits; leave --chunk out")
        named = {key: value for key in ("model", "layer") if (value := getattr(options, key)) is not None}
        tree = {"model": {"name" if key == "model" else key: value for key, value in named.items()}}
        return configuration.from_mapping(configuration.lay_over(tree, extra), "command line")
    run = RunFolder(find_dictionary(_existing(checkpoints, options.run_name)))
    asked = Place(options.model, options.layer)
    config = run.load_config() if run.resolved.exists() else None
    trained = origin_of(read_json(run.config_json), run.path).place if config is None else Place.of(config)
    part = trained.difference(asked)
    if part is not None:
        raise TsaeError(
            f"--{part} {getattr(options, part)}: {run.path} was trained on {trained.said(part)}; leave --{part} out"
        )
    config = config or _foreign(run, trained, asked)
    for key in extra:
        if not key.startswith("experiments.") and key not in FREE:
            raise TsaeError(
                f"command line: {key}: was decided when the run was trained; allowed: experiments.…, {', '.join(FREE)}"
            )
    return configuration.from_mapping(configuration.lay_over(schema.to_plain(config), extra), "command line")


def _foreign(run: RunFolder, trained: Place, asked: Place) -> RunConfig:
    """What another program's run tells of its place in a language model; flags fill in what it leaves out."""
    model, layer = asked.model or trained.model, asked.block if trained.block is None else trained.block
    if model is None or (layer is None and trained.module is None):
        missing = "model" if model is None else "layer"
        raise TsaeError(f"{run.config_json}: does not tell the {missing}; give --{missing}")
    if layer is None:
        return RunConfig(model=ModelConfig(name=model, hook_point=trained.module))
    return RunConfig(model=ModelConfig(name=model, layer=layer))
