"""When an experiment is made again: other texts under the same name, and results that are damaged."""

from __future__ import annotations

import json
import logging
from functools import lru_cache
from importlib import import_module
from pathlib import Path

import pytest

from tsae.checkpoint import RunFolder
from tsae.config import run as configuration
from tsae.config.experiments import AlignConfig
from tsae.config.run import RunConfig
from tsae.experiments import driver


@pytest.fixture
def pairs(tmp_path: Path, labelled_text: Path) -> Path:
    """30 pairs of responses."""
    texts = [json.loads(line)["text"].split() for line in labelled_text.read_text().splitlines()]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(line(*words) for words in zip(texts[:30], texts[30:60], strict=True)))
    return path


def line(chosen: list[str], rejected: list[str]) -> str:
    opening = "\n\nHuman: seba\n\nAssistant:"
    sides = {"chosen": chosen[:8], "rejected": rejected[:10]}
    return json.dumps({side: f"{opening} {' '.join(words)}" for side, words in sides.items()}) + "\n"


@pytest.fixture
def config(run_config: RunConfig, pairs: Path, experiment_home: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    monkeypatch.setenv("TSAE_HOME", str(experiment_home))
    align = AlignConfig(dataset=str(pairs), bootstrap=100, min_pairs=2, max_tokens=40)
    return configuration.replace(run_config, experiments={"align": align})


def test_an_edited_file_of_texts_has_other_results(
    config: RunConfig, checkpoints: Path, pairs: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = RunFolder.of(checkpoints, "batch_topk")
    (path,) = map(Path, driver.run("align", config, run))
    made = path.stat().st_mtime_ns
    with caplog.at_level(logging.INFO, "tsae"):
        driver.run("align", config, run)
    assert path.stat().st_mtime_ns == made
    assert f"{path}: complete already" in caplog.text
    pairs.write_text("".join(pairs.read_text().splitlines(keepends=True)[:25]))
    driver.run("align", config, run)
    assert json.loads(path.read_text())["pairs"] == 25


@pytest.mark.parametrize("damage", [b"", b'{"made_from": ', b"[]", b"\xff"])
def test_damaged_results_are_made_again(config: RunConfig, checkpoints: Path, damage: bytes) -> None:
    run = RunFolder.of(checkpoints, "batch_topk")
    (path,) = map(Path, driver.run("align", config, run))
    whole = path.read_bytes()
    path.write_bytes(damage)
    assert driver.files_of(run, config, "align") == []
    driver.run("align", config, run)
    assert path.read_bytes() == whole


def test_a_sweep_makes_again_what_shows_other_explanations(config: RunConfig, checkpoints: Path) -> None:
    run, own = RunFolder.of(checkpoints, "batch_topk"), configuration.replace(config, sae={"kind": "batch_topk"})
    driver.run("align", own, run)
    assert driver.is_done(own, run, "align")
    explanations = run.result("explanations", "json")
    try:
        explanations.write_text('{"3": "about sea"}')
        assert not driver.is_done(own, run, "align")
        driver.run("align", own, run)
        assert driver.is_done(own, run, "align")
    finally:
        explanations.unlink()
    assert not driver.is_done(own, run, "align")


def test_what_an_experiment_keeps_goes_with_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = import_module("tsae.experiments.probe.experiment")
    kept = lru_cache(maxsize=1)(lambda: object())
    monkeypatch.setattr(experiment, "_material", kept)
    kept()
    assert kept.cache_info().currsize == 1
    driver.forget("probe")
    assert kept.cache_info().currsize == 0
