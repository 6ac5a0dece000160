"""The command line itself: words that it does not know, and how it ends when it is interrupted."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path

import pytest
import yaml

from tsae import cli
from tsae.cli import main


@pytest.mark.parametrize(
    ("arguments", "near"),
    [(["trian"], "'train'"), (["store", "verfy"], "'verify'"), (["bench", "--preset", "pythai"], "'pythia'")],
)
def test_a_mistyped_word_is_told_the_nearest_one(
    arguments: list[str], near: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert f"did you mean {near}?" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("words", [["train", "a.yaml", "--run-nam", "k"], ["sweep", "seeds", "--dry"]])
def test_an_option_is_not_taken_by_half_its_name(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said.startswith(f"tsae {words[0]}: error: unrecognized arguments: --")
    assert f"did you mean '{'--run-name' if words[0] == 'train' else '--dry-run'}'?" in said


def way_out_that_fails(interrupt: BaseException) -> None:
    """As matplotlib's PDF does it when it is left half begun."""
    try:
        raise interrupt
    finally:
        raise AttributeError("'Stream' object has no attribute 'pos'")


def test_what_fails_on_the_way_out_of_an_interrupt_does_not_hide_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "load_dotenv", lambda: way_out_that_fails(KeyboardInterrupt()))
    assert main(["status"]) == 130
    assert capsys.readouterr().err == "tsae: interrupted; the same command continues\n"
    monkeypatch.setattr(cli, "load_dotenv", lambda: way_out_that_fails(ValueError()))
    with pytest.raises(AttributeError):
        main(["status"])


def test_a_run_of_other_settings_is_refused_before_a_store_is_made_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TSAE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MPLBACKEND", "module://not.here")  # as a notebook's kernel leaves it to commands
    world = {"sequences": 64, "activation_dim": 16, "n_slow": 6, "n_fast": 12}
    training = {"steps": 4, "batch_size": 16, "warmup_steps": 1, "threshold_start_step": 1, "device": "cpu"}
    tree = {"data": {"source": "synthetic", "context_length": 16}, "synthetic": world, "training": training}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({**tree, "sae": {"dict_size": 40, "k": 4}}))
    assert main(["train", str(tmp_path / "run.yaml")]) == 0
    assert main(["evaluate", str(tmp_path / "run.yaml"), "evaluation.sequences=8"]) == 0
    stores = list((tmp_path / "home/stores").iterdir())
    capsys.readouterr()
    assert main(["train", str(tmp_path / "run.yaml"), "data.seed=7"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "holds a run of another configuration (data.seed is 0 there, 7 here)" in said
    assert list((tmp_path / "home/stores").iterdir()) == stores


def test_products_are_float32_whatever_an_image_says() -> None:
    script = "from tsae.cli import main; main(['measures']); import torch; print(torch.get_float32_matmul_precision())"
    variables = {**os.environ, "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1"}
    done = subprocess.run([sys.executable, "-c", script], env=variables, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "highest"


class Whatever:
    """Can be referred to weakly."""


def test_an_interrupt_is_not_lost_where_python_passes_over_errors(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def wait() -> None:
        thing = Whatever()
        _watched = weakref.ref(thing, lambda _: signal.raise_signal(signal.SIGINT))
        del thing  # what its end raises is ignored
        time.sleep(60)
        pytest.fail("nobody heard it")

    monkeypatch.setattr(cli, "load_dotenv", wait)
    assert main(["status"]) == 130
    assert capsys.readouterr().err == "tsae: interrupted; the same command continues\n"


def test_the_module_is_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tsae", "runs", "nowhere"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr == "tsae: nowhere: no such folder; one that runs and sweeps lie under is expected\n"
