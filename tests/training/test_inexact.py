"""A training that was begun with another version of torch or tsae goes on only when that is asked for, and says so."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tsae.checkpoint import RunFolder
from tsae.config import run as configuration
from tsae.config.run import RunConfig
from tsae.evaluation.driver import evaluate
from tsae.runtime import metadata
from tsae.runtime.errors import TsaeError
from tsae.training.resume import ResumeStates
from tsae.training.run import train
from tsae.training.trainer import Terms, Trainer

AT = "from step 28 with another version of torch (0.1+other, then "


@pytest.fixture
def config(normalised: RunConfig) -> RunConfig:
    """A run of 60 steps, resumable from each seventh."""
    return configuration.replace(normalised, training={"resume_every": 7})


def train_until(step: int, config: RunConfig, run: RunFolder, inexact: bool = False) -> None:
    """Train, and die before update `step`."""

    def dying(trainer: Trainer, *batch: Any) -> Callable[[], Terms]:
        if trainer.steps_done == step:
            raise KeyboardInterrupt
        return whole(trainer, *batch)

    whole = Trainer.advance
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Trainer, "advance", dying)
        patched.setattr(ResumeStates, "busy", False)  # a state is waited for, not left out, where the disk is slow
        with pytest.raises(KeyboardInterrupt):
            train(config, run, inexact)
    deadline = time.monotonic() + 60
    while (run.resume / "latest").read_text() != f"step_{step // 7 * 7}":
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def interrupted(config: RunConfig, tmp_path: Path) -> RunFolder:
    """The run, whose process died at step 30."""
    run = RunFolder.of(tmp_path, "begun")
    train_until(30, config, run)
    return run


def saved_with(run: RunFolder, **versions: str) -> None:
    """Have the states of `run` say that they were saved with other `versions`."""
    for path in run.resume.glob("*/state.json"):
        record = json.loads(path.read_text())
        record["belongs_to"] |= {f"version of {name}": version for name, version in versions.items()}
        metadata.write(path, record)


def test_a_state_of_another_torch_is_refused_and_continued_when_asked_for(
    config: RunConfig, interrupted: RunFolder, tmp_path: Path
) -> None:
    exact = RunFolder.of(tmp_path, "exact")
    shutil.copytree(interrupted.path, exact.path)
    train(config, exact)
    saved_with(interrupted, torch="0.1+other")
    with pytest.raises(
        TsaeError, match=r"another version of torch \(0\.1\+other, now .*continue all the same with --inexact"
    ):
        train(config, interrupted)
    assert (interrupted.resume / "latest").read_text() == "step_28"
    train(config, interrupted, inexact=True)
    assert interrupted.weights.read_bytes() == exact.weights.read_bytes()  # by the same torch, in truth
    (said,) = json.loads(interrupted.provenance.read_text())["inexact"]
    assert said.startswith(AT)
    assert evaluate(config, interrupted)["trained_inexactly"] == [said]
    assert "inexact" not in json.loads(exact.provenance.read_text())
    assert "trained_inexactly" not in evaluate(config, exact)


def test_what_went_on_inexactly_says_so_after_exact_continuations_too(
    config: RunConfig, interrupted: RunFolder
) -> None:
    saved_with(interrupted, torch="0.1+other", tsae="0.0")
    train_until(40, config, interrupted, inexact=True)
    train(config, interrupted)
    said = json.loads(interrupted.provenance.read_text())["inexact"]
    assert [line.partition(" (")[0] for line in said] == [
        "from step 28 with another version of tsae",
        "from step 28 with another version of torch",
    ]


def test_another_configuration_or_store_is_no_matter_of_exactness(config: RunConfig, interrupted: RunFolder) -> None:
    for path in interrupted.resume.glob("*/state.json"):
        record = json.loads(path.read_text())
        record["belongs_to"]["activation store"] = f"another {record['belongs_to']['activation store']}"
        metadata.write(path, record)
    with pytest.raises(TsaeError, match=r"saved with another activation store .*go back to that, or remove"):
        train(config, interrupted, inexact=True)
