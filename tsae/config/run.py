"""The configuration of one run: what to read, what to train, what to measure.

A run is one YAML file; the resolved file and its hash lie beside every output.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from tsae.config import schema, validation
from tsae.config.experiments import ExperimentsConfig
from tsae.config.sections import (
    KIND_SETTINGS,
    OBJECTIVE_PRESETS,
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    ObjectiveConfig,
    SaeConfig,
    StoreConfig,
    TrainingConfig,
)
from tsae.config.synthetic import SYNTHETIC_PRESETS, SyntheticConfig
from tsae.runtime.errors import TsaeError, suggestion

PRESETS = {"objective": OBJECTIVE_PRESETS, "synthetic": SYNTHETIC_PRESETS}
"""Sections with presets, the default one first."""

SYNTHETIC = "synthetic"
"""The value of `data.source` that stands for a synthetic world."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything one run depends on."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """The language model."""
    data: DataConfig = field(default_factory=DataConfig)
    """The text."""
    synthetic: SyntheticConfig = field(default_factory=SyntheticConfig)
    """The world that takes the place of model and text when `data.source` is `synthetic`."""
    store: StoreConfig = field(default_factory=StoreConfig)
    """The activation store."""
    sae: SaeConfig = field(default_factory=SaeConfig)
    """The dictionary."""
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    """The training objective."""
    training: TrainingConfig = field(default_factory=TrainingConfig)
    """Optimisation."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """Measures."""
    experiments: ExperimentsConfig = field(default_factory=ExperimentsConfig)
    """The paper's experiments on the trained dictionary."""

    @property
    def normalize(self) -> str:
        """How activations are scaled for training."""
        if self.training.normalize != "auto":
            return self.training.normalize
        return "unit_rms" if self._relative_errors else "none"

    @property
    def bias_lr(self) -> float:
        """Learning rate of the biases relative to that of the weight matrices."""
        if self.training.bias_lr is not None:
            return self.training.bias_lr
        return 0.3 if self._relative_errors else 1.0

    @property
    def clip_norm(self) -> float:
        """Bound on the gradient's norm."""
        if self.training.clip_norm is not None:
            return self.training.clip_norm
        return 0.005 if self._relative_errors else 1.0

    @property
    def _relative_errors(self) -> bool:
        """Whether reconstruction errors are divided by the variance."""
        return self.objective.reconstruction == "variance" and not KIND_SETTINGS[self.sae.kind].penalised

    @property
    def is_synthetic(self) -> bool:
        """Whether the activations are those of a synthetic world: no language model is read."""
        return self.data.source == SYNTHETIC

    @cached_property
    def training_hash(self) -> str:
        """Hash of what decides the trained dictionary; a launcher of many runs asks for it again and again."""
        return schema.stable_hash(training_settings(self))

    @cached_property
    def evaluation_hash(self) -> str:
        """Hash of what decides eval_results.json."""
        return schema.stable_hash(evaluation_settings(self))


def load(path: str | Path, overrides: list[str] | None = None) -> RunConfig:
    """The run described by a YAML file, such as a run folder's resolved.yaml, and `section.key=value` overrides."""
    tree = schema.read_yaml(path)
    tree.pop("training_hash", None)  # the first line of a resolved.yaml
    extra = schema.parse_overrides(overrides or [])
    # Overrides are checked on their own first, so that an error names the command line, not the file.
    from_mapping(extra, "command line", partial=True)
    if isinstance(tree.get("objective"), str):
        tree["objective"] = {"preset": tree["objective"]}
    return from_mapping(schema.merge_into(tree, extra), str(path))


def from_mapping(tree: Mapping[str, Any], where: str, *, partial: bool = False) -> RunConfig:
    """A validated RunConfig; `where` names the source in errors, `partial` checks keys and types only."""
    tree = dict(tree)
    for name, presets in PRESETS.items():
        if name in tree:
            tree[name] = _with_preset(name, presets, tree[name], where)
    config = schema.build(RunConfig, tree, where)
    if not partial:
        validation.validate(config, where)
    return config


def _with_preset(name: str, presets: Mapping[str, dict[str, Any]], section: Any, where: str) -> Any:
    """Section `name` with what its preset, the first one by default, says of keys that are not given."""
    if isinstance(section, str):
        section = {"preset": section}
    if not isinstance(section, Mapping):
        return section
    preset = section.get("preset", next(iter(presets)))
    if preset not in presets:
        raise TsaeError(
            f"{where}: {name}.preset: {preset!r} is not allowed; {suggestion(preset, presets)}"
            f"allowed: {', '.join(presets)}"
        )
    return {**presets[preset], **section}


def group_weights(config: RunConfig) -> tuple[float, ...]:
    """Weight of each nested reconstruction, before they are combined."""
    fractions, chosen = config.sae.fractions, config.objective.group_weights
    n = len(fractions)
    named = {"fractions": fractions, "uniform": (1 / n,) * n, "ones": (1.0,) * n}
    return named[chosen] if isinstance(chosen, str) else chosen


def store_settings(config: RunConfig) -> dict[str, Any]:
    """The part of a configuration that decides the content of the activation store."""
    world = config.is_synthetic
    plain = _plain(config, ("data", "store", "synthetic" if world else "model"))
    del plain["store"]["path"]
    if world:
        plain["data"] = {name: plain["data"][name] for name in ("source", "context_length", "holdout", "seed")}
        return plain
    del plain["model"]["device"], plain["model"]["batch_size"], plain["data"]["skip_positions"]
    return plain


def _plain(config: RunConfig, sections: Iterable[str]) -> dict[str, Any]:
    """Some sections as YAML-ready mappings; a plan of a thousand runs would wait for all of them."""
    return {name: schema.to_plain(getattr(config, name)) for name in sections}


def reading_settings(config: RunConfig) -> dict[str, Any]:
    """What decides the batches a run reads: runs that agree in it can share one process."""
    names = ("pair_rule", "batch_size", "seed", "pool_sequences", "device", "precision")
    reading = {name: getattr(config.training, name) for name in names}
    return {
        **store_settings(config),
        **reading,
        "skip_positions": config.data.skip_positions,
        "path": config.store.path,
    }


def training_settings(config: RunConfig) -> dict[str, Any]:
    """The part that decides a trained dictionary: everything but evaluation and where things run."""
    apart = {"model", "data", "synthetic", "store", "evaluation", "experiments"}
    others = (section.name for section in dataclasses.fields(config) if section.name not in apart)
    plain = {**store_settings(config), **_plain(config, others)}
    plain["data"]["skip_positions"] = config.data.skip_positions
    for name in ("device", "processes", "shard", "trackers", "resume_every", "resume_minutes", "resume_keep", "pack"):
        del plain["training"][name]
    return plain


def evaluation_settings(config: RunConfig) -> dict[str, Any]:
    """The part that decides eval_results.json."""
    plain = {**training_settings(config), "evaluation": schema.to_plain(config.evaluation)}
    del plain["evaluation"]["batch_size"]
    return plain


def experiment_settings(config: RunConfig, name: str) -> dict[str, Any]:
    """The part that decides the results of experiment `name`."""
    own, texts = (schema.to_plain(getattr(config.experiments, part)) for part in (name, "texts"))
    return {**training_settings(config), "experiment": own, "texts": texts}


def help_text() -> str:
    """Every setting with its type, default and meaning."""
    return "\n".join(schema.describe(RunConfig)).strip()


def replace(config: RunConfig, **sections: Mapping[str, Any]) -> RunConfig:
    """A copy with some fields of some sections changed: `replace(config, sae={"k": 40})`."""
    changed = {name: dataclasses.replace(getattr(config, name), **values) for name, values in sections.items()}
    return dataclasses.replace(config, **changed)
