"""Trackers: what they lack is said before anything starts, and what becomes of them is no matter of the training."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tsae.checkpoint import RunFolder
from tsae.config import run as configuration
from tsae.config.run import RunConfig
from tsae.training.run import train

WORLD = """
data: {source: synthetic, context_length: 32}
synthetic: {sequences: 64}
sae: {dict_size: 64, k: 4}
training: {steps: 30, batch_size: 64, device: cpu, trackers: [wandb]}
"""
KEY = "0123456789" * 4
NAMED = """
import sys
import wandb
from tsae import cli

def init(whole=wandb.init, **settings):
    print("W&B", [settings[name] for name in ("project", "entity", "group", "name")], file=sys.stderr)
    return whole(**settings)

wandb.init = init
sys.exit(cli.main(sys.argv[1:]))
"""


def tsae(folder: Path, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run a command of a user who knows nothing of W&B but what `environ` says."""
    pytest.importorskip("wandb", reason="needs W&B's client: pip install 'tsae[wandb]'")
    known = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    places = {"HOME": str(folder / "user"), "TSAE_HOME": str(folder / "home")}
    (folder / "world.yaml").write_text(WORLD)
    command = [sys.executable, "-c", NAMED, *arguments]
    return subprocess.run(
        command, cwd=folder, env=known | places | environ, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("command", ["train", "sweep"])
def test_without_a_key_nothing_starts(tmp_path: Path, command: str) -> None:
    given = ["world.yaml"]
    if command == "sweep":
        given = ["sweep.yaml", "--executor", "local"]
        (tmp_path / "sweep.yaml").write_text("name: keys\nbase: world.yaml\ngrid: {sae.k: [4, 5]}\n")
    ended = tsae(tmp_path, command, *given)
    assert ended.returncode == 2
    assert re.fullmatch(r"tsae: training\.trackers: W&B has no key here; .*WANDB_API_KEY .*\n", ended.stderr)
    assert not list((tmp_path / "home").rglob("*.*"))


def test_a_key_that_cannot_be_one_is_named_before_anything_starts(tmp_path: Path) -> None:
    ended = tsae(tmp_path, "train", "world.yaml", WANDB_API_KEY="short")
    assert ended.returncode == 2
    assert "W&B does not take the key that it finds" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert not (tmp_path / "home").exists()


def test_a_server_that_is_not_there_costs_a_warning(tmp_path: Path) -> None:
    ended = tsae(tmp_path, "train", "world.yaml", WANDB_API_KEY=KEY, WANDB_BASE_URL="http://127.0.0.1:9")
    assert ended.returncode == 0, ended.stderr
    assert "world: W&B's server does not take the run (http://127.0.0.1:9: " in ended.stderr
    run = RunFolder.of(tmp_path / "home" / "checkpoints", "world")
    assert run.weights.exists()
    assert len(list(run.path.glob("wandb/offline-run-*/*.wandb"))) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["home", "user", "world.yaml"]


@pytest.mark.parametrize(
    ("given", "environ", "named"),
    [
        (["--run-name", "one"], {}, ["tsae", None, None, "one"]),
        (["--run-name", "two/b"], {"WANDB_PROJECT": "mine"}, ["mine", None, "two", "b"]),
        (
            ["--run-name", "k=4,seed=0", "--checkpoints-path", "home/checkpoints/sweep-of-k", "training.wandb_project=p",
             "training.wandb_entity=we"],
            {"WANDB_PROJECT": "mine"},
            ["p", "we", "sweep-of-k", "k=4,seed=0"],
        ),
    ],
)  # fmt: skip
def test_a_run_has_its_own_name_and_its_sweep_s(
    tmp_path: Path, given: list[str], environ: dict[str, str], named: list[str | None]
) -> None:
    ended = tsae(tmp_path, "train", "world.yaml", *given, WANDB_MODE="offline", **environ)
    assert ended.returncode == 0, ended.stderr
    assert f"W&B {named}" in ended.stderr


def test_a_tracker_that_fails_is_told_no_more(
    normalised: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from accelerate.tracking import TensorBoardTracker

    told: list[int] = []

    def failing(_: object, values: dict[str, float], step: int) -> None:
        assert "fve" in values
        told.append(step)
        if step >= 10:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(TensorBoardTracker, "log", failing)
    run = RunFolder.of(tmp_path, "run")
    with caplog.at_level(logging.WARNING, "tsae"):
        train(configuration.replace(normalised, training={"trackers": ("tensorboard",)}), run)
    assert told == [0, 10]
    assert "tensorboard: OSError: [Errno 28] No space left on device; the training goes on without it" in caplog.text
    assert [json.loads(line)["step"] for line in run.metrics.read_text().splitlines()][-1] == 59
