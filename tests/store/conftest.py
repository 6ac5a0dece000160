"""Stores whose activations say where they stand, so that every number that comes back can be checked, and a small
language model and text to harvest for real."""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tsae.config import run as configuration
from tsae.config.run import RunConfig
from tsae.config.sections import StoreConfig
from tsae.data.contexts import Contexts
from tsae.store.harvest import harvest
from tsae.store.reader import Store
from tsae.store.writer import finalise, prepare, write_shard

SEQUENCE, POSITION, DOCUMENT = 0, 1, 2
CONTEXT = 64
VOCABULARY = 320

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def speak() -> Callable[..., torch.Tensor]:
    """Make [N, L, dim] float32 activations whose first values are the sequence, the position and the document."""

    def speak(document: np.ndarray, dim: int) -> torch.Tensor:
        sequences, length = document.shape
        activations = torch.rand(sequences, length, dim, generator=torch.Generator().manual_seed(0))
        activations[..., SEQUENCE] = torch.arange(sequences)[:, None]
        activations[..., POSITION] = torch.arange(length)
        activations[..., DOCUMENT] = torch.from_numpy(document.astype(np.float32))
        return activations

    return speak


@pytest.fixture(scope="session")
def contexts_of() -> Callable[..., Contexts]:
    """Make contexts of a document map [N, L]; a sequence is as long as its last position that belongs to a document."""

    def contexts_of(document: np.ndarray, heldout: int = 0) -> Contexts:
        length = document.shape[1]
        lengths = np.where(document >= 0, np.arange(length) + 1, 0).max(1).astype(np.int32)
        tokens = np.arange(document.size, dtype=np.int32).reshape(document.shape)
        label = np.zeros(int(document.max()) + 1, np.int32)
        return Contexts(tokens, lengths, document.astype(np.int32), label, ("prose",), heldout, "synthetic")

    return contexts_of


@pytest.fixture(scope="session")
def ragged() -> np.ndarray:
    """[1003, 32] documents: BOS, then one or two documents, then padding."""
    random, document = np.random.default_rng(0), np.full((1003, 32), -1, np.int32)
    for row in range(len(document)):
        end, cut = random.integers(3, 33), random.integers(2, 32)
        document[row, 1:end] = 2 * row
        document[row, min(cut, end) : end] = 2 * row + 1
    return document


@pytest.fixture(scope="session")
def write_store(
    tmp_path_factory: pytest.TempPathFactory, speak: Callable[..., torch.Tensor], contexts_of: Callable[..., Contexts]
) -> Callable[..., Store]:
    """Write a complete store with speaking activations for a document map, shards in reverse order, and open it."""

    def write(document: np.ndarray, *, heldout: int = 0, dtype: Any = "float32", dim: int = 64) -> Store:
        settings = StoreConfig(dtype=dtype, shard_mb=1)
        path = tmp_path_factory.mktemp("synthetic") / "store"
        layout = prepare(path, contexts_of(document, heldout), dim, store=settings)
        activations = speak(document, dim)
        for shard in reversed(range(layout.geometry.shards)):
            rows = layout.geometry.sequences_of(shard)
            write_shard(layout, shard, activations[rows.start : rows.stop].split(100))
        finalise(layout)
        return Store.open(layout.path)

    return write


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random GPT-NeoX in the hub's format."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    from tsae.lm.embedded_text import train_tokenizer

    folder = tmp_path_factory.mktemp("model")
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    lm = GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=VOCABULARY, max_position_embeddings=CONTEXT, **sizes))
    lm.save_pretrained(folder)
    train_tokenizer(["a small text about small things"], VOCABULARY, CONTEXT).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents of many lengths as jsonl."""
    path = tmp_path_factory.mktemp("text") / "prose.jsonl"
    random = np.random.default_rng(0)
    words = [
        "a",
        "small",
        "text",
        "about",
        "large",
        "things",
        "that",
        "nobody",
        "has",
        "ever",
        "written",
        "down",
        "before",
        "today",
    ]
    with path.open("w") as stream:
        for size in random.integers(20, 120, 300):
            stream.write(json.dumps({"text": " ".join(random.choice(words, size))}) + "\n")
    return path


@pytest.fixture(scope="session")
def make_config(model_folder: Path, text_file: Path) -> Callable[..., RunConfig]:
    """The configuration of a harvest into a given folder; more sections may be given."""

    def make(path: Path, **sections: dict[str, Any]) -> RunConfig:
        tree = {
            "model": {"name": str(model_folder), "layer": 0, "device": "cpu", "batch_size": 16},
            "data": {"source": str(text_file), "context_length": CONTEXT, "min_length": 8},
            "store": {"path": str(path), "shard_mb": 1},
        }
        merged = {name: {**tree.get(name, {}), **sections.get(name, {})} for name in {*tree, *sections}}
        return configuration.from_mapping(merged, "test")

    return make


@pytest.fixture(scope="session")
def start_harvest() -> Callable[..., multiprocessing.Process]:
    """Start `harvest(config, task, tasks)` in a process of its own, forked from a server that has the imports done."""
    os.environ["OMP_NUM_THREADS"] = "1"
    context = multiprocessing.get_context("forkserver")
    heavy = ["tsae.store.harvest", "tsae.store.writer", "tsae.data.contexts", "zarr", "nnsight"]
    context.set_forkserver_preload([*heavy, "transformers.models.gpt_neox.modeling_gpt_neox"])

    def start(config: RunConfig, task: int = 0, tasks: int = 1) -> multiprocessing.Process:
        process = context.Process(target=harvest, args=(config, task, tasks))
        process.start()
        return process  # type: ignore[return-value]

    return start


@pytest.fixture(scope="session")
def harvested(
    tmp_path_factory: pytest.TempPathFactory,
    make_config: Callable[..., RunConfig],
    start_harvest: Callable[..., multiprocessing.Process],
) -> Path:
    """A store harvested without disturbance."""
    path = tmp_path_factory.mktemp("stores") / "undisturbed"
    process = start_harvest(make_config(path))
    process.join()
    assert process.exitcode == 0
    return path
