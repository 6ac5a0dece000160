"""Small real runs on the tiny language model, and labelled text for them."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from tsae.config import run as configuration
from tsae.config.run import RunConfig
from tsae.stages import harvest_stage, train_stage

TOPICS = {"north": "ka lo", "east": "mi ru", "south": "se ta"}
"""Topic → the syllables that begin most of its words."""
ENDINGS = ("ba", "do", "fe", "gi", "nu")


@pytest.fixture(scope="session")
def labelled_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 documents of 40 words on three topics, as rows with the columns text and domain."""
    generator, path = random.Random(1), tmp_path_factory.mktemp("labelled") / "topics.jsonl"
    every = " ".join(TOPICS.values()).split()
    rows = []
    for index in range(120):
        topic = list(TOPICS)[index % 3]
        own = TOPICS[topic].split()
        words = [
            generator.choice(own if generator.random() < 0.8 else every) + generator.choice(ENDINGS) for _ in range(40)
        ]
        rows.append({"text": " ".join(words), "domain": topic})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def experiment_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """TSAE_HOME of the runs below; a test that runs an experiment sets the variable to it, or to a copy."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="session")
def run_config(tiny_model: Path, labelled_text: Path, experiment_home: Path) -> RunConfig:
    """A T-SAE of 64 latents on block 1 of the tiny model."""
    tree = {
        "model": {"name": str(tiny_model), "layer": 1, "device": "cpu"},
        "data": {"source": str(labelled_text), "label_field": "domain", "context_length": 32},
        "store": {"path": str(experiment_home / "store")},
        "sae": {"dict_size": 64, "k": 4},
        "training": {"steps": 150, "batch_size": 64, "lr": 3e-3, "device": "cpu"},
    }
    return configuration.from_mapping(tree, "here")


@pytest.fixture(scope="session")
def checkpoints(run_config: RunConfig, experiment_home: Path) -> Path:
    """A folder of runs: `temporal`, and `batch_topk` with one group of latents."""
    harvest_stage(run_config)
    folder = experiment_home / "checkpoints"
    for kind in ("temporal", "batch_topk"):
        train_stage(configuration.replace(run_config, sae={"kind": kind}), folder, kind)
    return folder
