"""`tsae align` on small real runs: planted pairs in a file of the data set's form."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path
from typing import Any

import pytest

from tsae.checkpoint import RunFolder
from tsae.config import run as configuration
from tsae.config.run import RunConfig
from tsae.experiments import driver
from tsae.runtime.errors import TsaeError

ENDINGS = ("ba", "do", "fe", "gi", "nu")


def words(syllables: str, count: int, generator: random.Random) -> str:
    return " ".join(generator.choice(syllables.split()) + generator.choice(ENDINGS) for _ in range(count))


@pytest.fixture(scope="session")
def pair_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """80 pairs: chosen responses on one topic, rejected ones on another and longer; a prompt on a third."""
    generator, path = random.Random(2), tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    lines = []
    for _ in range(80):
        opening = f"\n\nHuman: {words('se ta', 5, generator)}\n\nAssistant:"
        chosen, rejected = (
            words(topic, generator.randint(low, high), generator)
            for topic, low, high in (("ka lo", 4, 10), ("mi ru", 5, 13))
        )
        lines.append(json.dumps({"chosen": f"{opening} {chosen}", "rejected": f"{opening} {rejected}"}))
    path.write_text("\n".join(lines))
    return path


@pytest.fixture
def config(run_config: RunConfig, pair_file: Path, experiment_home: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    monkeypatch.setenv("TSAE_HOME", str(experiment_home))
    return with_settings(run_config, dataset=str(pair_file))


def with_settings(config: RunConfig, **settings: Any) -> RunConfig:
    tree = {"experiments": {"align": {"bootstrap": 100, "min_pairs": 5, "max_tokens": 40, **settings}}}
    return configuration.replace(
        config, experiments={"align": configuration.from_mapping(tree, "here").experiments.align}
    )


def measured(config: RunConfig, folder: Path, chunk: int = 2, name: str = "temporal") -> dict[str, Any]:
    (path,) = driver.run("align", config, RunFolder.of(folder, name), [chunk])
    results: dict[str, Any] = json.loads(Path(path).read_text())
    return results


def test_latents_of_the_two_topics_are_found_and_outlast_the_control_for_length(
    config: RunConfig, checkpoints: Path
) -> None:
    results = measured(config, checkpoints)
    assert results["pairs"] == 80
    assert 4 <= results["response_tokens"]["chosen"] < results["response_tokens"]["rejected"] <= 13
    assert results["latents"]["significant"] > 0
    strongest = results["table"][0]
    assert strongest["label"] == "beyond length"
    assert strongest["low"] < strongest["mean_difference"] < strongest["high"]
    assert len(strongest["examples"]) == 3
    assert set(results["table"][0]["examples"][0]["chosen"].split()[0][:2].split()) <= {"ka", "lo"}
    counts = results["latents"]
    assert counts["beyond length"] + counts["length-driven"] + counts["undecided"] == counts["significant"]
    assert len(results["all_tested"]["rows"]) == counts["tested"]


def test_the_table_and_the_figure_stand_beside_the_results(config: RunConfig, checkpoints: Path) -> None:
    results = measured(config, checkpoints, 0)
    run = RunFolder.of(checkpoints, "temporal")
    with open(run.result("alignment_chunk0", "csv"), newline="") as stream:
        table = list(csv.DictReader(stream))
    assert [int(row["latent"]) for row in table] == [row["latent"] for row in results["table"]]
    assert max(int(row["latent"]) for row in table) < 12
    assert run.result("alignment_chunk0", "png").stat().st_size > 10_000


def test_where_nothing_is_significant_the_largest_difference_is_drawn(config: RunConfig, checkpoints: Path) -> None:
    results = measured(with_settings(config, dataset=config.experiments.align.dataset, level=1e-300), checkpoints)
    assert results["latents"]["significant"] == 0
    assert [(shown["latent"], shown["label"]) for shown in results["scatter"]] == [
        (results["table"][0]["latent"], "not significant")
    ]


def test_dictionaries_share_one_harvest_of_the_pairs(
    config: RunConfig, checkpoints: Path, experiment_home: Path
) -> None:
    measured(config, checkpoints)
    before = sorted((experiment_home / "stores").iterdir())
    other = configuration.replace(config, sae={"kind": "batch_topk"})
    assert measured(other, checkpoints, 2, "batch_topk")["pairs"] == 80
    assert sorted((experiment_home / "stores").iterdir()) == before


def test_explanations_that_came_later_are_named_in_the_table(
    config: RunConfig, checkpoints: Path, tmp_path: Path
) -> None:
    assert measured(config, checkpoints)["table"][0]["explanation"] is None
    explanations = tmp_path / "explanations.json"
    explanations.write_text(json.dumps({str(latent): f"about {latent}" for latent in range(64)}))
    (path,) = driver.run("align", config, RunFolder.of(checkpoints, "temporal"), [2], explanations=explanations)
    row = json.loads(Path(path).read_text())["table"][0]
    assert row["explanation"] == f"about {row['latent']}"
    assert measured(config, checkpoints)["table"][0]["explanation"] is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pairs": 5}, "at least 20 pairs"),
        ({"level": 1.5}, "a rate between 0 and 1"),
        ({"min_pairs": 1000}, "no latent of the split is active in 1000 pairs"),
        ({"dataset": "missing.jsonl"}, "missing.jsonl"),
    ],
)
def test_what_cannot_be_is_one_clear_line(
    config: RunConfig, checkpoints: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(TsaeError, match=message):
        measured(with_settings(config, **{"dataset": config.experiments.align.dataset, **settings}), checkpoints)


def test_too_few_pairs_and_missing_columns_are_named(config: RunConfig, checkpoints: Path, tmp_path: Path) -> None:
    few, other = tmp_path / "few.jsonl", tmp_path / "other.jsonl"
    few.write_text("".join(Path(config.experiments.align.dataset).read_text().splitlines(keepends=True)[:9]))
    other.write_text(json.dumps({"good": "a", "bad": "b"}))
    with pytest.raises(TsaeError, match="9 pairs with two responses are too few"):
        measured(with_settings(config, dataset=str(few)), checkpoints)
    with pytest.raises(TsaeError, match="columns found: good, bad"):
        measured(with_settings(config, dataset=str(other)), checkpoints)
