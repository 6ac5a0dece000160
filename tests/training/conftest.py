"""A short run on normalised activations."""

from __future__ import annotations

from pathlib import Path

import pytest

from tsae.config import run as configuration
from tsae.config.run import RunConfig
from tsae.store.harvest import harvest

TRAINING = {
    "steps": 60,
    "batch_size": 64,
    "lr": 0.003,
    "warmup_steps": 5,
    "threshold_start_step": 10,
    "threshold_beta": 0.9,
    "device": "cpu",
    "normalize": "mean_squared_norm",
}


@pytest.fixture
def normalised(tiny_model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run of 60 steps on normalised activations, on a store that the tests of this folder share."""
    store = tmp_path_factory.getbasetemp() / "training-store"
    tree = {
        "model": {"name": str(tiny_model), "layer": 1, "device": "cpu"},
        "data": {"source": str(text), "context_length": 32, "min_length": 8, "holdout": 0.2},
        "store": {"path": str(store)},
        "sae": {"dict_size": 96, "k": 4},
        "training": TRAINING,
        "evaluation": {"loss_recovered": False},
    }
    made = configuration.from_mapping(tree, "test")
    harvest(made)
    return made
