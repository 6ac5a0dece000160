"""What a new experiment costs: a module, and one line in the table. The driver, the command and the report take it."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tsae import cli
from tsae.checkpoint import RunFolder
from tsae.config.run import RunConfig
from tsae.experiments import driver, registry
from tsae.experiments.registry import Experiment

MODULE = '''"""How often the latents of a split fire on the first stored sequences."""

from tsae import plotting
from tsae.experiments.shared.firings import collect
from tsae.store.layout import store_path
from tsae.store.reader import Store


def measure(subject, settings, chunk):
    store = Store.open(store_path(subject.config), subject.config)
    firings = collect(subject, store, range(8), "rates")
    rates = (firings.counts / firings.n_tokens)[subject.latents(chunk)]
    return {"headline": {"mean_rate": float(rates.mean())}, "rates": rates.tolist()}


def draw(results, path):
    with plotting.figure(path, 1, 1, (4, 3)) as (_, (axes,)):
        axes.hist(results["rates"])
'''


@pytest.fixture
def rates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An experiment of a user's own: its module can be imported, and the table has its line."""
    (tmp_path / "my_rates.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    line = Experiment("rates", True, False, "count how often latents fire", module="my_rates")
    monkeypatch.setitem(registry.EXPERIMENTS, "rates", line)
    yield
    sys.modules.pop("my_rates", None)


@pytest.mark.usefixtures("rates")
def test_a_new_experiment_is_a_module_and_a_line(
    run_config: RunConfig, checkpoints: Path, experiment_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TSAE_HOME", str(experiment_home))
    run = RunFolder.of(checkpoints, "temporal")
    assert not driver.is_done(run_config, run, "rates")
    made = [Path(path) for path in driver.run("rates", run_config, run)]
    assert [path.name for path in made] == ["rates_chunk0.json", "rates_chunk1.json", "rates_chunk2.json"]
    assert driver.is_done(run_config, run, "rates")
    for path in made:
        assert json.loads(path.read_text())["experiment"] == "rates"
        assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    shown = driver.headlines(run, run_config)
    high, low, both = (shown[f"rates_chunk{chunk}/mean_rate"][0] for chunk in (0, 1, 2))
    assert min(high, low) < both < max(high, low)


@pytest.mark.usefixtures("rates")
def test_the_command_of_a_new_experiment_is_there(
    checkpoints: Path, experiment_home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TSAE_HOME", str(experiment_home))
    flags = ["--run-name", "batch_topk", "--checkpoints-path", str(checkpoints)]
    assert cli.main(["rates", *flags]) == 0
    (path,) = map(Path, capsys.readouterr().out.split())
    assert path.name == "rates_chunk2.json"
    assert json.loads(path.read_text())["headline"]["mean_rate"] > 0
    assert cli.main(["rates", "--run-name", "baseline_model", "--checkpoints-path", str(checkpoints)]) == 2
    assert "tsae rates is about latents" in capsys.readouterr().err
