"""What an evaluation was made from: it is complete while all of that is as it was."""

from __future__ import annotations

from typing import Any

import tsae.evaluation.results  # noqa: F401  (declares its measures)
from tsae.checkpoint import RunFolder
from tsae.config import schema
from tsae.config.run import RunConfig
from tsae.evaluation.measures import TRUTH, versions
from tsae.store import binding


def made_from(config: RunConfig, run: RunFolder) -> dict[str, str]:
    """Hashes of what decides eval_results.json: weights, data, settings, and how each measure is computed."""
    measures = {key: version for key, version in versions().items() if config.is_synthetic or not key.startswith(TRUTH)}
    return {
        "weights": binding.weights_identity(run),
        "data": binding.data_identity(run, config),
        "settings": config.evaluation_hash,
        "measures": schema.stable_hash(measures),
    }


def measured_with(config: RunConfig) -> dict[str, Any]:
    """The sections that an evaluation goes by, as a tree: of a run from elsewhere nothing else tells them later."""
    tree = schema.to_plain(config)
    return {name: tree[name] for name in ("model", "data", "synthetic", "store", "evaluation") if tree.get(name)}


def is_evaluated(config: RunConfig, run: RunFolder) -> bool:
    """Whether eval_results.json of exactly this configuration is here, made from the weights and data that are there now."""
    found = run.read_results()
    ours = run.training_hash() in (None, config.training_hash)  # a run from elsewhere states none
    return bool(found) and ours and found.get("made_from") == made_from(config, run)
