"""A run folder with a real (random) dictionary and the files that training and evaluation leave."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tsae.checkpoint import RunFolder, save_dictionary
from tsae.config import run as configuration
from tsae.config import schema
from tsae.runtime.files import write_json, write_text
from tsae.sae.dictionary import Dictionary
from tsae.sae.init import random_dictionary
from tsae.sae.reference import reference_config

ACTIVATION_DIM, DICT_SIZE = 16, 80

MakeRun = Callable[..., tuple[Path, Dictionary]]


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """Writes a finished run of a temporal dictionary; keyword arguments replace settings of the model and the text."""

    def make(name: str = "run", model: dict[str, Any] | None = None, data: dict[str, Any] | None = None) -> Any:
        config = configuration.from_mapping(
            {
                "model": {"name": "google/gemma-2-2b", "layer": 12, **(model or {})},
                "data": {"source": "monology/pile-uncopyrighted", "context_length": 256, **(data or {})},
                "sae": {"dict_size": DICT_SIZE, "k": 5},
                "training": {"save_steps": [10]},
            },
            "test",
        )
        dictionary = random_dictionary("TemporalMatryoshkaBatchTopKSAE", ACTIVATION_DIM, DICT_SIZE)
        run = RunFolder.of(tmp_path / "checkpoints", name)
        write_json(run.config_json, reference_config(config, ACTIVATION_DIM))
        save_dictionary(run.weights, dictionary)
        save_dictionary(
            run.checkpoint(10), random_dictionary(type(dictionary).__name__, ACTIVATION_DIM, DICT_SIZE, seed=7)
        )
        store = {"model": {"hook_path": "model.layers.12"}, "settings": {"data": {"bos": "auto"}}}
        write_json(run.provenance, {"host": "secret-host", "tsae": {"commit": "abc"}, "store": store})
        results = {"l0": 5.25, "l0_group": [2.0, 3.25], "frac_variance_explained_pooled": 0.75}
        write_json(run.eval_results, {**results, "half_width_95": {"l0": 0.5}, "contexts": 9, "documents": 4})
        write_text(run.resolved, yaml.safe_dump({"training_hash": "x", **schema.to_plain(config)}))
        return run.path.parent, dictionary

    return make


@pytest.fixture
def activations() -> torch.Tensor:
    """[8, 3, D]"""
    return torch.randn(8, 3, ACTIVATION_DIM, generator=torch.Generator().manual_seed(3))
