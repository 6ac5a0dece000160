"""Everything that tsae writes, once and small: a store, finished runs, one that was interrupted, a sweep with its report."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tsae import plotting
from tsae.cli import main
from tsae.runtime.errors import TsaeError
from tsae.store.pairs import Waits
from tsae.training import run as training
from tsae.training.resume import ResumeStates

WORLD = {
    "data": {"source": "synthetic", "context_length": 32},
    "synthetic": {"sequences": 96, "activation_dim": 16, "n_slow": 6, "n_fast": 12},
    "sae": {"dict_size": 40, "k": 4},
    "training": {
        **{
            "steps": 30,
            "batch_size": 32,
            "warmup_steps": 2,
            "threshold_start_step": 4,
            "log_every": 3,
            "device": "cpu",
        },
        **{"save_steps": [10], "resume_every": 8},
    },
    "evaluation": {"sequences": 16, "batch_size": 16},
}
SWEEP = {"base": "world.yaml", "stages": ["harvest", "train", "evaluate", "report"], "grid": {"sae.k": [3, 4]}}


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which it was made; `home` is its TSAE_HOME."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "world.yaml").write_text(yaml.safe_dump(WORLD))
    (folder / "sweep.yaml").write_text(yaml.safe_dump(SWEEP))
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        patched.setenv("TSAE_HOME", "home")
        assert main(["sweep", "sweep.yaml", "--executor", "debug"]) == 0
        assert main(["evaluate", "world.yaml"]) == 2  # not trained
        assert main(["train", "world.yaml"]) == 0
        assert main(["evaluate", "world.yaml"]) == 0
        assert main(["calibrate", "home/checkpoints/world"]) == 0
        # Without its end, as a run that was killed at the last step.
        patched.setattr(training._Training, "_finish", killed)
        # A state that is due while the disk is still at the one before is left out; here those of steps 16 and 24 are wanted.
        patched.setattr(ResumeStates, "busy", False)
        assert main(["train", "world.yaml", "--run-name", "part"]) == 2
    return folder


def killed(run: training._Training, _: Waits) -> None:
    run._states.wait()  # for the state of the last step, which is written beside it
    raise TsaeError("killed")


@pytest.fixture
def folder(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of it, to be damaged; the working directory. Reports draw no figures for print, half of what they take."""
    copy = shutil.copytree(made, tmp_path / "made")
    monkeypatch.setattr(plotting, "PRINT", ())
    monkeypatch.chdir(copy)
    monkeypatch.setenv("TSAE_HOME", "home")
    yield copy
    shutil.rmtree(copy)
