"""A training that reads a window of a rolling store, killed at random moments or made by two processes, ends with the bits
of one that reads the full store."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.conftest import WORDS
from tests.system.dying import MOMENTS, train_and_die
from tsae import stages
from tsae.checkpoint import RunFolder
from tsae.config import run as configuration
from tsae.config import schema
from tsae.config.run import RunConfig
from tsae.evaluation.driver import evaluate
from tsae.store.harvest import harvest
from tsae.store.layout import StoreLayout
from tsae.store.rolling import ShardMaker, open_store
from tsae.store.window import held
from tsae.training.run import train
from tsae.training.waits import write_waits

KILLS = int(os.environ.get("TSAE_KILLS", "6"))
WINDOW = 600_000


@pytest.fixture
def both(unharvested: RunConfig, tmp_path: Path) -> tuple[RunConfig, RunConfig]:
    """A run of an epoch on a full store, and on a rolling one with a window of a tenth; neither needs statistics."""
    random_words, text = random.Random(0), tmp_path / "text.jsonl"
    with text.open("w") as stream:
        for _ in range(1000):
            stream.write(json.dumps({"text": " ".join(random_words.choices(WORDS, k=70))}) + "\n")
    tree = schema.to_plain(unharvested)
    tree["data"] |= {"source": str(text), "holdout": 0.1}
    tree["objective"] = {"preset": "reference"}
    tree["training"] |= {"batch_size": 1024, "pool_sequences": 300}
    made = []
    for window in (None, f"{WINDOW // 1000}kB"):
        tree["store"] = {"path": str(tmp_path / f"store_{window}"), "window": window}
        made.append(configuration.from_mapping(json.loads(json.dumps(tree)), "test"))
        harvest(made[-1])
    return made[0], made[1]


def weights(run: RunFolder) -> list[bytes]:
    """Of the final dictionary and of those before it, and the measures of each step."""
    files = [run.weights, run.metrics, *sorted(run.checkpoint(0).parent.iterdir())]
    return [path.read_bytes() for path in files]


def test_kills_and_lost_shards_end_in_the_bits_of_the_full_store(
    both: tuple[RunConfig, RunConfig], tmp_path: Path, run_process: Callable[..., int]
) -> None:
    full, rolling = both
    layout = StoreLayout(str(rolling.store.path))
    size = layout.geometry.shard_bytes(0)
    assert layout.kept.start * size > 5 * WINDOW
    undisturbed = RunFolder.of(tmp_path, "undisturbed")
    train(full, undisturbed)
    random_moments, kills, finished = random.Random(1), Counter[str](), 0
    while sum(kills.values()) < KILLS:
        run = RunFolder.of(tmp_path, f"killed{finished}")
        moment = MOMENTS[sum(kills.values()) % len(MOMENTS)]
        code = run_process(train_and_die, rolling, run, moment, random_moments.randint(1, 60))
        assert code in (0, -signal.SIGKILL)
        kills[moment] += code != 0
        here = held(layout)
        assert len(here) * size <= WINDOW
        if here:
            shutil.rmtree(layout.shards / str(random_moments.choice(here)))
        if code == 0:
            assert weights(run) == weights(undisturbed)
            finished += 1
    last = RunFolder.of(tmp_path, f"killed{finished}")
    train(rolling, last)
    assert weights(last) == weights(undisturbed)
    found, expected = evaluate(rolling, last), evaluate(full, undisturbed)
    about = {"config_hash", "made_from", "measured_with", "digest"}
    assert found.keys() - about == expected.keys() - about
    assert {key: found[key] for key in found.keys() - about} == {key: expected[key] for key in found.keys() - about}


def windowed(both: tuple[RunConfig, RunConfig], tmp_path: Path) -> RunConfig:
    """What trains on a window that holds its pools, and whose language model's batches end within shards."""
    store = {"path": str(tmp_path / "store"), "window": "1300kB"}
    rolling = configuration.replace(both[1], store=store, model={"batch_size": 48})
    harvest(rolling)
    return rolling


def test_the_language_model_reads_every_context_once(
    both: tuple[RunConfig, RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rolling = windowed(both, tmp_path)
    contexts, batches, read = Counter[int](), list[int](), ShardMaker._read

    def counted(maker: ShardMaker, sequences: np.ndarray) -> Tensor:
        before = maker._made
        block = read(maker, sequences)
        if maker._made > before:
            contexts.update(sequences.tolist())
            batches.append(len(sequences))
        return block

    monkeypatch.setattr(ShardMaker, "_read", counted)
    train(rolling, RunFolder.of(tmp_path, "run"))
    layout = StoreLayout(str(rolling.store.path))
    training = layout.kept.start * layout.geometry.shard_sequences
    assert layout.geometry.shard_sequences % rolling.model.batch_size
    assert set(contexts.values()) == {1}
    assert len(contexts) > 0.7 * training
    contexts.clear()
    batches.clear()
    store = open_store(rolling)
    for first in range(0, training, 5):  # in the order of the text, as moments are summed
        store.read(range(first, min(first + 5, training)))
    assert set(contexts.values()) == {1}
    assert set(batches[:-1]) == {rolling.model.batch_size}  # full ones


def test_a_run_tells_of_each_pool_before_it_is_whole(
    both: tuple[RunConfig, RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rolling, run = windowed(both, tmp_path), RunFolder.of(tmp_path, "run")
    whole = []

    def written(*arguments: Any) -> None:
        whole.append(run.weights.exists())
        write_waits(*arguments)

    monkeypatch.setattr("tsae.training.run.write_waits", written)
    train(rolling, run)
    assert whole == [False]  # whoever is killed while it writes comes back
    waited = [json.loads(line) for line in (run.path / "window.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in waited]
    assert len(steps) > 3
    assert steps == sorted(set(steps))
    assert steps[-1] < rolling.training.steps
    assert 0 < max(line["held_bytes"] for line in waited) <= 1_300_000
    assert all(line["training_waited"] * line["harvest_waited"] == 0 for line in waited)
    assert (run.path / "window.png").exists()


def test_two_processes_read_one_window(
    both: tuple[RunConfig, RunConfig], tmp_path: Path, run_ranks: Callable[..., list[int]]
) -> None:
    full, rolling = both
    runs = []
    for name, config in (("full", full), ("rolling", rolling)):
        file = tmp_path / f"{name}.yaml"
        file.write_text(json.dumps(schema.to_plain(config)))
        arguments = ["train", str(file), "--checkpoints-path", str(tmp_path), "--run-name", name]
        assert run_ranks(2, arguments) == [0, 0]
        runs.append(RunFolder.of(tmp_path, name))
    states = [torch.load(run.weights, weights_only=True) for run in runs]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    told = (tmp_path / "rank0.err").read_text()
    assert "was the limit: of" in told or "before the first step" in told
    layout = StoreLayout(str(rolling.store.path))
    assert len(held(layout)) * layout.geometry.shard_bytes(0) <= WINDOW


def test_a_rolling_store_is_harvested_by_two_jobs(both: tuple[RunConfig, RunConfig], tmp_path: Path) -> None:
    config = configuration.replace(both[1], store={"path": str(tmp_path / "store")})
    stages.harvest_stage(config, 0, 2)
    assert not stages.is_harvested(config)
    stages.harvest_stage(config, 1, 2)
    assert stages.is_harvested(config)
    run = RunFolder.of(tmp_path, "run")
    train(config, run)
    assert run.is_trained(config)
