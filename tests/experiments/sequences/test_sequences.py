"""`tsae sequences` on small real runs: what it writes, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tsae.checkpoint import RunFolder
from tsae.config import run as configuration
from tsae.config.run import RunConfig
from tsae.evaluation.measures import REGISTRY
from tsae.experiments import driver
from tsae.runtime.errors import TsaeError

SMALL = {"splices": 12, "bootstrap": 100, "passage_tokens": 10, "top": 4}


@pytest.fixture
def config(
    run_config: RunConfig, labelled_text: Path, experiment_home: Path, monkeypatch: pytest.MonkeyPatch
) -> RunConfig:
    monkeypatch.setenv("TSAE_HOME", str(experiment_home))
    return with_settings(run_config, dataset=str(labelled_text))


def with_settings(config: RunConfig, **settings: Any) -> RunConfig:
    sequences = configuration.from_mapping({"experiments": {"sequences": {**SMALL, **settings}}}, "here").experiments
    return configuration.replace(config, experiments={"sequences": sequences.sequences})


def measured(config: RunConfig, folder: Path, chunk: int, name: str = "temporal") -> dict[str, Any]:
    (path,) = driver.run("sequences", config, RunFolder.of(folder, name), [chunk])
    results: dict[str, Any] = json.loads(Path(path).read_text())
    return results


def test_a_split_is_scored_beside_its_controls(config: RunConfig, checkpoints: Path) -> None:
    results = measured(config, checkpoints, 2)
    run = RunFolder.of(checkpoints, "temporal")
    assert results["splices"] == 12
    assert set(results["headline"]) == set(results["half_width_95"])
    assert {f"sequences_chunk0/{name}" for name in results["headline"]} <= set(REGISTRY)
    assert 0.5 <= results["headline"]["phase_auc"] <= 1
    assert results["one_text"]["contexts"] == 12
    assert 0 < results["smoothest_latents"]["latents"] < 64
    # The tiny model's texts are bags of words on a topic, so topics show in spliced contexts alone.
    assert results["scores"]["phase_auc"]["mean"] > results["one_text"]["scores"]["phase_auc"]["mean"]
    assert len(results["contexts"][0]["passages"]) == len(set(results["contexts"][0]["passages"])) == 3
    assert run.result("sequences_chunk2", "png").stat().st_size > 10_000
    page = run.result("sequences_chunk2", "html").read_text()
    data = page.partition('id="data">')[2].partition("</script>")[0]
    assert json.loads(data) == results["contexts"]
    assert "http" not in page


def test_every_split_reads_the_same_contexts(config: RunConfig, checkpoints: Path) -> None:
    found = [measured(config, checkpoints, chunk)["contexts"][0] for chunk in (0, 1)]
    assert found[0]["tokens"] == found[1]["tokens"]
    assert max(map(int, found[0]["activations"])) < 12 <= min(map(int, found[1]["activations"]))


def test_own_texts_and_chosen_latents_are_shown(config: RunConfig, checkpoints: Path, tmp_path: Path) -> None:
    file = tmp_path / "first.txt"
    file.write_text("kaba kado kafe kagi kanu loba lodo lofe logi lonu")
    second = "miba mido mife migi minu ruba rudo rufe rugi runu seba sedo"
    results = measured(
        with_settings(config, dataset=config.experiments.sequences.dataset, texts=[str(file), second], latents=[3, 63]),
        checkpoints,
        0,
    )
    context = results["contexts"][0]
    assert context["passages"] == ["first", "miba mido mife migi …"]
    assert context["top"] == [3, 63]
    assert [token.strip() for token in context["tokens"][:2]] == ["kaba", "kado"]
    assert context["starts"] == [0, 10]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"splices": 3}, "splices: 3 is impossible"),
        ({"texts": ["only one"]}, "one text has no border"),
        ({"texts": ["kaba kado", "miba mido mife"]}, "has 2 tokens; 10 are asked for"),
        ({"texts": ["/nowhere/text.txt", "miba mido"]}, "/nowhere/text.txt: cannot be read"),
        ({"passages": 5}, "5 labels with a text of .* tokens are needed, 3 of 3 have one"),
        ({"passage_tokens": 50}, "3 passages of 50 tokens are impossible"),
        ({"labels": ["north", "west"]}, "no text is labelled 'west'; labels found: east, north, south"),
        ({"latents": [64]}, "latents are counted from 0 to 63"),
    ],
)
def test_what_cannot_be_is_one_clear_line(
    config: RunConfig, checkpoints: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(TsaeError, match=message):
        measured(with_settings(config, **{"dataset": config.experiments.sequences.dataset, **settings}), checkpoints, 2)
