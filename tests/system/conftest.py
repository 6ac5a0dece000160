"""A small run, its store, and processes that start at once because a server has the imports done."""

from __future__ import annotations

import json
import multiprocessing
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.system.dying import as_rank
from tsae.config import run as configuration
from tsae.config import schema
from tsae.config.run import RunConfig
from tsae.store.harvest import harvest

PRELOADED = [
    "dying",
    "tsae.cli",
    "tsae.parallel.rendezvous",
    "accelerate.state",
    "tsae.training.run",
    "tsae.evaluation.driver",
    "nnsight",
    "transformers.models.gpt_neox.modeling_gpt_neox",
]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty TSAE_HOME."""
    monkeypatch.setenv("TSAE_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home"


@pytest.fixture(scope="session")
def unharvested(tiny_model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run of 60 steps with an intermediate checkpoint and resumable states at odd places."""
    tree = {
        "model": {"name": str(tiny_model), "layer": 1, "device": "cpu", "batch_size": 8},
        "data": {"source": str(text), "context_length": 32, "min_length": 8, "holdout": 0.2},
        "store": {"path": str(tmp_path_factory.mktemp("stores") / "store")},
        "sae": {"dict_size": 96, "k": 4},
        "training": {
            "steps": 60,
            "batch_size": 64,
            "lr": 0.003,
            "warmup_steps": 5,
            "threshold_start_step": 10,
            "threshold_beta": 0.9,
            "dead_after": 250,
            "log_every": 3,
            "save_steps": [20, 41],
            "resume_every": 7,
            "device": "cpu",
        },
        "evaluation": {"batch_size": 4, "loss_recovered": False},
    }
    return configuration.from_mapping(tree, "test")


@pytest.fixture(scope="session")
def config(unharvested: RunConfig) -> RunConfig:
    """The same with its store."""
    harvest(unharvested)
    return unharvested


@pytest.fixture(scope="session")
def run_process() -> Callable[..., int]:
    """Run `function(*arguments)` of the module `dying` in a process of its own; returns its exit code."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)

    def run(function: Callable[..., Any], *arguments: Any) -> int:
        process = context.Process(target=function, args=arguments)
        process.start()
        process.join()
        assert process.exitcode is not None
        return process.exitcode

    return run


def joined(processes: Sequence[Any]) -> list[int]:
    """The exit codes of processes that end; the test fails where one does not."""
    for process in processes:
        process.join(timeout=120)
    for process in processes:
        if process.exitcode is None:
            process.kill()
            process.join()
            pytest.fail("a process waits for ever")
    return [process.exitcode for process in processes]


@pytest.fixture
def run_ranks(tmp_path: Path) -> Callable[..., list[int]]:
    """Run a `tsae` command, or `target`, in several processes at once; returns their exit codes.

    `disturbed` is what `target` takes besides. What each writes to stderr is in `rank<n>.err`.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)

    def run(world: int, arguments: Sequence[str], target: Callable[..., None] = as_rank, **disturbed: Any) -> list[int]:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        processes = [
            context.Process(target=target, args=(rank, world, port, tmp_path, [*map(str, arguments)]), kwargs=disturbed)
            for rank in range(world)
        ]
        for process in processes:
            process.start()
        return joined(processes)

    return run


@pytest.fixture
def config_file(config: RunConfig, tmp_path: Path) -> Path:
    """The file of `config`."""
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(schema.to_plain(config)))
    return path
