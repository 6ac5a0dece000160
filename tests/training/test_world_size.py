"""Training by several real processes (gloo) gives what one process gives."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.training.world_size_worker import MIDDLE, everything, work_together
from tsae import cli
from tsae.config import run as configuration
from tsae.parallel.group import ALONE
from tsae.sae.reference import reference_config

WORLDS = (2, 4)
SHARDED = ("sharded", "sharded jump_relu")
INVARIANT = (
    "contrastive",
    "cosine",
    "linear",
    "other_documents",
    "l1",
    "matryoshka",
    "batch_topk",
    "topk",
    "jump_relu",
    "gated",
    "double",
    "centred",
)


def torchrun(processes: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *launcher, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    """What 1, 2 and 4 processes made of the same work."""
    folder = tmp_path_factory.mktemp("world-size")
    found = {1: everything(ALONE, folder)}
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.training.world_size_worker"])
    processes = [context.Process(target=work_together, args=(rank, folder)) for rank in range(max(WORLDS))]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * len(processes)
    return found | {world: torch.load(folder / f"world_{world}.pt", weights_only=True) for world in WORLDS}


def distance(found: Tensor, expected: Tensor) -> float:
    """Relative to the expected tensor's norm."""
    return float((found - expected).double().norm() / expected.double().norm().clamp_min(1e-30))


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("case", [*INVARIANT, *SHARDED])
def test_losses_and_weights_do_not_depend_on_world_size(
    results: dict[int, dict[str, Any]], case: str, world: int
) -> None:
    alone, together = results[1][case], results[world][case]
    for expected, found in zip(alone["terms"], together["terms"], strict=True):
        for name in expected.keys() - {"bytes_handed"}:
            assert found[name] == pytest.approx(expected[name], rel=1e-5, abs=1e-6), name
    for name, expected in alone["weights"].items():
        assert distance(together["weights"][name], expected) < 1e-5, name
    assert torch.equal(together["tokens_since_fired"], alone["tokens_since_fired"])


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("case", INVARIANT)
def test_gradients_of_a_step_do_not_depend_on_world_size(
    results: dict[int, dict[str, Any]], case: str, world: int
) -> None:
    for step in ("first", "single"):
        expected, found = (
            torch.cat([gradient.flatten() for _, gradient in sorted(results[n][case][step].items())])
            for n in (1, world)
        )
        assert distance(found, expected) < 1e-6, step
    for name, value in results[1][case]["single_terms"].items():
        if name != "bytes_handed":
            assert results[world][case]["single_terms"][name] == pytest.approx(value, rel=2e-6, abs=1e-7), name


def test_the_cases_reach_every_term(results: dict[int, dict[str, Any]]) -> None:
    for case in ("contrastive", "matryoshka", "batch_topk", "topk"):
        assert any(terms["auxk_loss"] > 0 for terms in results[1][case]["terms"]), case
        assert results[1][case]["single_terms"]["auxk_loss"] > 0, case
        assert results[1][case]["terms"][-1]["threshold"] > 0, case
    for case in ("contrastive", "cosine", "l1"):
        assert results[1][case]["single_terms"]["temp_loss"] > 0, case


@pytest.mark.parametrize("world", WORLDS)
def test_global_selection_is_exact_with_ties_and_bad_guesses(results: dict[int, dict[str, Any]], world: int) -> None:
    for expected, found in zip(results[1]["selections"], results[world]["selections"], strict=True):
        for (code, cut), (own_code, own_cut) in zip(expected, found, strict=True):
            assert torch.equal(own_code, code)
            assert own_cut == cut


def test_bytes_are_counted_and_selection_costs_no_more_than_histograms(results: dict[int, dict[str, Any]]) -> None:
    def per_step(case: str, world: int = 2) -> float:
        return results[world][case]["terms"][MIDDLE]["bytes_handed"]

    weights = results[1]["contrastive"]["weights"]
    gradients = sum(4 * weights[name].numel() for name in ("W_enc", "b_enc", "W_dec", "b_dec"))
    histograms = 2 * 8 * (2**11 + 2**11 + 2**9)
    assert per_step("contrastive", world=1) == 0
    assert gradients < per_step("local") < per_step("contrastive")
    assert per_step("contrastive") < gradients + histograms + 20_000
    assert per_step("topk") < gradients + 4_000


@pytest.mark.parametrize("world", WORLDS)
def test_gradients_are_summed_while_others_are_made_and_nothing_waits_behind_them(
    results: dict[int, dict[str, Any]], world: int
) -> None:
    for case, done in results[world]["exchanges"].items():
        by_penalty = "jump_relu" in case or case == "gated"
        summed = r"b+\)w+" if by_penalty else r"b+\(b+w+"
        spread = "xb+w+" if case in SHARDED else ""
        assert re.fullmatch(f"x+{summed}{spread}x+", done), (case, done)


def test_local_scopes_depend_on_world_size(results: dict[int, dict[str, Any]]) -> None:
    alone, together = results[1]["local"]["terms"][0], results[2]["local"]["terms"][0]
    assert together["n_active"] == alone["n_active"]
    assert together["temp_loss"] != pytest.approx(alone["temp_loss"], rel=1e-3)


def test_local_scopes_are_recorded_and_make_another_run() -> None:
    settings = {"selection": "local", "negatives": "local"}
    config, local = (configuration.from_mapping({"training": training}, "test") for training in ({}, settings))
    assert settings.items() <= reference_config(local, 8)["trainer"].items()
    assert local.training_hash != config.training_hash


@pytest.mark.parametrize("world", WORLDS)
def test_shares_of_different_lengths_are_put_together_in_order(results: dict[int, dict[str, Any]], world: int) -> None:
    assert torch.equal(results[world]["ragged"], torch.cat([torch.arange(3 * rank) for rank in range(world)]))


@pytest.fixture
def config_file(tiny_model: Path, text: Path, tmp_path: Path) -> Path:
    tree = {
        "model": {"name": str(tiny_model), "layer": 1, "device": "cpu"},
        "data": {"source": str(text), "context_length": 32, "min_length": 8, "holdout": 0.2},
        "store": {"path": str(tmp_path / "store")},
        "sae": {"dict_size": 96, "k": 4},
        "training": {
            "steps": 30,
            "batch_size": 64,
            "lr": 0.003,
            "warmup_steps": 5,
            "threshold_start_step": 10,
            "threshold_beta": 0.9,
            "resume_every": 10,
            "save_steps": [20],
            "device": "cpu",
        },
    }
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(tree))
    return path


def test_the_command_line_trains_with_torchrun_as_with_one_process(config_file: Path, tmp_path: Path) -> None:
    def arguments(name: str, processes: int) -> list[str]:
        where = ["--checkpoints-path", str(tmp_path / "runs"), "--run-name", name]
        return ["train", str(config_file), f"training.processes={processes}", *where]

    done = torchrun(2, "-m", "tsae.cli", *arguments("together", 2))
    assert done.returncode == 0, done.stderr[-3000:]
    together, alone = (tmp_path / "runs" / name / "trainer_0" for name in ("together", "alone"))
    assert done.stdout.splitlines() == [str(together)]
    assert cli.main(arguments("alone", 1)) == 0
    assert cli.main(arguments("refused", 3)) == 2
    for name in ("ae.pt", "checkpoints/ae_20.pt"):
        expected, found = (torch.load(folder / name, weights_only=True) for folder in (alone, together))
        assert all(distance(found[key].float(), expected[key].float()) < 1e-5 for key in expected), name
    lines = [
        [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (alone, together)
    ]
    for expected, found in zip(*lines, strict=True):
        assert expected.pop("bytes_handed") == 0 < found.pop("bytes_handed")
        assert expected.pop("digest") != found.pop("digest")
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert {path.name for path in together.iterdir()} == {path.name for path in alone.iterdir()}
