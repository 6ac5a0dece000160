"""From text to a report's numbers on a GPU that is not there; `test_pretended_gpu.py` runs this file in a process of its own.

Without Triton: torch's operations are quick, and the kernels' places are those of `cases_of_steps.py`.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from transformers import masking_utils

from tests.pretended_gpu.order import Order, Waits
from tsae import cli
from tsae.config import run as configuration
from tsae.lm.model import begin_reading, load_language_model
from tsae.store import geometry, pools
from tsae.store.pools import GpuPools, StagedPools
from tsae.training import resume

WORDS = {"north": "kaba kado kafe logi lonu", "south": "seba sedo tafe tagi tanu"}
TEXTS = {"count": 60, "context_length": 32, "min_characters": 20}
PROBE = {"tasks": ["semantics", "context"], "tokens": 200, "context_texts": 4, "seeds": 1, "features": [2]}
TSNE = {"tagger": "surface", "texts": 20, "tokens": 5, "seeds": 1, "perplexity": 5, "neighbours": 3}
STEER = {"prompts": ["kaba"], "text_prompts": 1, "prompt_tokens": 3, "tokens": 4, "multiples": [1], "bootstrap": 100}
EXPERIMENTS = {"texts": TEXTS, "probe": PROBE, "tsne": TSNE, "steer": STEER}
EXPERIMENTS |= {"sequences": {"passages": 2, "splices": 10, "passage_tokens": 10, "bootstrap": 100}}
EXPERIMENTS |= {"align": {"bootstrap": 100, "min_pairs": 2, "max_tokens": 40}}


@pytest.fixture(autouse=True)
def _many_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """A store of 0.2 MB is in pieces, as a real one is."""
    monkeypatch.setattr(geometry, "SMALLEST_CHUNK", 2**14)
    monkeypatch.setattr(geometry, "SMALLEST_SHARD", 2**15)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture
def tsae(home: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Runs a command, which has to succeed."""
    monkeypatch.setenv("TSAE_HOME", str(home))

    def run(*words: str) -> None:
        assert cli.main(list(words)) == 0

    return run


@pytest.fixture(scope="module")
def config(home: Path, tiny_model: Path) -> Path:
    generator, rows, pairs = random.Random(1), [], []
    for index in range(120):
        topic = list(WORDS)[index % 2]
        rows.append({"text": " ".join(generator.choices(WORDS[topic].split(), k=40)), "domain": topic})
        chosen, rejected = (" ".join(generator.choices(words.split(), k=6)) for words in WORDS.values())
        opening = "\n\nHuman: kaba seba\n\nAssistant: "
        pairs.append({"chosen": opening + chosen, "rejected": opening + rejected})
    for name, lines in (("texts", rows), ("pairs", pairs)):
        (home / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    texts = str(home / "texts.jsonl")
    labelled = ("probe", "tsne", "sequences", "steer")
    experiments = {
        name: {**settings, "dataset": texts} if name in labelled else settings for name, settings in EXPERIMENTS.items()
    }
    experiments["align"] = {**experiments["align"], "dataset": str(home / "pairs.jsonl")}
    tree = {
        "model": {"name": str(tiny_model), "layer": 1, "batch_size": 8},
        "data": {"source": texts, "label_field": "domain", "context_length": 32},
        "store": {"shard_mb": 1},
        "sae": {"dict_size": 64, "k": 4},
        "training": {"steps": 12, "batch_size": 64, "resume_every": 4, "pool_sequences": 32, "cuda_graphs": False},
        "evaluation": {"loss_sequences": 4},
        "experiments": experiments,
    }
    path = home / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def test_a_run_from_text_to_its_experiments(tsae: Callable[..., None], config: Path, home: Path) -> None:
    tsae("train", str(config), "--run-name", "whole")
    tsae("evaluate", "whole")
    for experiment in ("probe", "tsne", "sequences", "features", "align", "steer", "explain"):
        tsae(experiment, "--run-name", "whole")
    found = {path.name for path in (home / "checkpoints" / "whole" / "trainer_0").glob("*.json")}
    assert {"eval_results.json", "probing_chunk0.json", "alignment_chunk2.json", "autointerp.json"} <= found


def test_a_batch_is_read_without_waiting(config: Path, order: Order, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = load_language_model(configuration.load(config).model)
    # Transformers asks the GPU whether rows are packed, in each of its forward passes.
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", lambda _: None)
    tokens, lengths = torch.arange(64).view(2, 32) % 30, torch.tensor([32, 5])
    with order.recording():
        end = begin_reading([lm], tokens, lengths)
        with pytest.raises(Waits):
            end()
    assert torch.equal(end()[0], lm.read(tokens, lengths))


@pytest.mark.parametrize(("share", "way"), [(1.0, GpuPools), (0.0, StagedPools)])
@pytest.mark.parametrize("window", [None, "1800"])
def test_batches_and_states_wait_for_what_they_need(
    share: float,
    way: type,
    window: str | None,
    tsae: Callable[..., None],
    config: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = []
    build = way.__init__
    monkeypatch.setattr(way, "__init__", lambda self, *given: (made.append(way), build(self, *given))[1])
    monkeypatch.setattr(pools, "MOST_OF_FREE", share)
    monkeypatch.setattr(resume, "MOST_OF_FREE", share)
    # Steps that read nothing back, since with each number that the host waits for it has waited for all before it.
    settings = ["sae.kind=standard", "training.engine=dense", "training.steps=50", "training.pool_sequences=16"]
    settings += [] if window is None else [f"store.window={window}"]
    tsae("train", str(config), "--run-name", f"{way.__name__}-{window}", *settings)
    assert made
