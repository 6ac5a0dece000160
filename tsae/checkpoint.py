"""The checkpoint layout: where every file of a run is.

    <checkpoints_path>/<run_name>/trainer_0/
        config.json  ae.pt  checkpoints/ae_<step>.pt        what the reference's scripts read
        resolved.yaml  provenance.json  metrics.jsonl  eval_results.json  resume/  ...

Nothing else in the package builds a path into a run folder.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from tsae import config as configuration
from tsae import files, schema
from tsae.config import RunConfig
from tsae.errors import TsaeError


class RunFolder:
    """Paths and small files of one run. Creating the object touches nothing on disk."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config_json = self.path / "config.json"
        self.weights = self.path / "ae.pt"
        self.resolved = self.path / "resolved.yaml"
        self.provenance = self.path / "provenance.json"
        self.metrics = self.path / "metrics.jsonl"
        self.progress = self.path / "progress.json"
        self.eval_results = self.path / "eval_results.json"
        self.resume = self.path / "resume"

    @classmethod
    def of(cls, checkpoints_path: str | Path, run_name: str) -> RunFolder:
        """The folder of run `run_name` below `checkpoints_path`."""
        return cls(Path(checkpoints_path) / run_name / "trainer_0")

    def checkpoint(self, step: int) -> Path:
        """Weights as they were before update `step`."""
        return self.path / "checkpoints" / f"ae_{step}.pt"

    def result(self, name: str, suffix: str) -> Path:
        """`<name>.json` or `<name>.png` of an experiment on this run."""
        return self.path / f"{name}.{suffix}"

    def claim(self, config: RunConfig) -> None:
        """Write resolved.yaml, or refuse a folder that belongs to another training configuration."""
        wanted = schema.stable_hash(configuration.training_settings(config))
        if self.resolved.exists():
            found = schema.read_yaml(self.resolved).get("training_hash")
            if found != wanted:
                raise TsaeError(
                    f"{self.path}: holds a run of another configuration (hash {found}, this one is {wanted}); "
                    "choose another run name or remove the folder"
                )
            return
        if self.weights.exists():
            raise TsaeError(f"{self.path}: holds weights but no resolved.yaml; choose another run name")
        text = yaml.safe_dump({"training_hash": wanted, **schema.to_plain(config)}, sort_keys=False)
        files.write_atomically(self.resolved, lambda stream: stream.write(text.encode()))

    def load_config(self) -> RunConfig:
        """The resolved configuration this folder was made with."""
        tree = schema.read_yaml(self.resolved)
        tree.pop("training_hash", None)
        return configuration.from_mapping(tree, str(self.resolved))

    def is_trained(self, config: RunConfig) -> bool:
        """Whether final weights of exactly this training configuration are here."""
        if not (self.weights.exists() and self.resolved.exists()):
            return False
        wanted = schema.stable_hash(configuration.training_settings(config))
        return bool(schema.read_yaml(self.resolved).get("training_hash") == wanted)

    def is_evaluated(self, config: RunConfig) -> bool:
        """Whether eval_results.json of exactly this configuration is here."""
        wanted = schema.stable_hash(configuration.evaluation_settings(config))
        return self.is_trained(config) and bool(self.read_results().get("config_hash") == wanted)

    def read_results(self) -> dict[str, Any]:
        """The content of eval_results.json, or an empty mapping."""
        if not self.eval_results.exists():
            return {}
        loaded: dict[str, Any] = json.loads(self.eval_results.read_text())
        return loaded
