"""A run on the tiny language model."""

from __future__ import annotations

from pathlib import Path

import pytest

from tsae.config import run as configuration
from tsae.config.run import RunConfig


@pytest.fixture
def config(tiny_model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run on the tiny model, its store in a folder that all tests of the session share."""
    store = tmp_path_factory.getbasetemp() / "evaluation-store"
    return configuration.from_mapping(
        {
            "model": {"name": str(tiny_model), "layer": 1},
            "data": {"source": str(text), "context_length": 32, "min_length": 8, "holdout": 0.3},
            "store": {"path": str(store), "dtype": "float32"},
            "sae": {"dict_size": 64, "k": 6},
            "evaluation": {"sequences": 1000, "batch_size": 7, "loss_sequences": 20},
        },
        "test",
    )
