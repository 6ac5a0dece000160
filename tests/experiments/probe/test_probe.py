"""Probes: chosen on training tokens, split without leaks, compared with controls, made by one command."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.sparse import csr_array

from tsae.checkpoint import RunFolder, of_new_weights
from tsae.cli import main
from tsae.config import run as configuration
from tsae.config.experiments import ProbeConfig, TextsConfig
from tsae.config.run import RunConfig
from tsae.experiments import driver
from tsae.experiments.probe import fit as probe_fit
from tsae.experiments.probe.figure import runs_beside, splits_beside
from tsae.experiments.probe.samples import Samples, split
from tsae.runtime import metadata
from tsae.runtime.errors import TsaeError
from tsae.stages import experiment_stage

CLASSES = 4


def planted(tokens: int, latents: int, active: int, seed: int = 0) -> tuple[csr_array, np.ndarray]:
    """Sparse codes in which latent 10 · c is active on tokens of class c, and others at random; and the classes."""
    random = np.random.default_rng(seed)
    label = np.arange(tokens) % CLASSES
    columns = random.integers(CLASSES * 10, latents, (tokens, active))
    columns[:, 0] = 10 * label
    values = random.random((tokens, active)).astype(np.float32) + 0.5
    rows = np.repeat(np.arange(tokens), active)
    return csr_array((values.ravel(), (rows, columns.ravel())), shape=(tokens, latents)), label


def halves(tokens: int) -> tuple[np.ndarray, np.ndarray]:
    return np.arange(tokens // 2), np.arange(tokens // 2, tokens)


def test_one_planted_feature_a_class_is_found_and_shuffled_labels_give_chance():
    features, label = planted(800, 300, 4)
    data = probe_fit.take(features, label, *halves(800))
    assert probe_fit.rank(data, data.train_label, 1, signed=True)[:, 0].tolist() == [0, 10, 20, 30]
    scores = probe_fit.sparse_probes(data, data.train_label, (1, 5))
    assert scores[1].one_vs_rest == scores[5].accuracy == scores[5].balanced_accuracy == 1
    shuffles = [np.random.default_rng(seed).permutation(data.train_label) for seed in range(12)]
    for probe in (
        lambda label: probe_fit.sparse_probes(data, label, (5,))[5],
        lambda label: probe_fit.dense_probe(data, label),
    ):
        assert abs(np.mean([probe(label).balanced_accuracy for label in shuffles]) - 1 / CLASSES) < 0.12
    assert probe_fit.dense_probe(data, data.train_label).accuracy > 0.85
    assert probe_fit.reference_probe(data, data.train_label, 1).accuracy == 1
    assert probe_fit.majority(data).balanced_accuracy == 1 / CLASSES


def test_the_dense_stream_is_probed_by_the_same_rules():
    features, label = planted(800, 300, 4)
    sparse = probe_fit.take(features, label, *halves(800))
    dense = probe_fit.take(features.toarray(), label, *halves(800))
    assert probe_fit.sparse_probes(dense, label[:400], (1, 5)) == probe_fit.sparse_probes(sparse, label[:400], (1, 5))
    assert probe_fit.dense_probe(dense, label[:400]).accuracy > 0.85


def test_features_are_chosen_on_the_training_tokens_alone():
    features, label = planted(800, 300, 4)
    train, test = halves(800)
    telling = features.tolil()
    for name in range(CLASSES):  # latents that would give the class away, on test tokens only
        telling[400 + np.flatnonzero(label[400:] == name), 35 + name] = 100.0
    data = probe_fit.take(telling.tocsr(), label, train, test)
    assert probe_fit.rank(data, data.train_label, 1, signed=False)[:, 0].tolist() == [0, 10, 20, 30]


def test_balanced_accuracy_weighs_classes_alike():
    data = probe_fit.Split(np.zeros((1, 1)), np.zeros(1, int), np.zeros((10, 1)), np.array([0] * 8 + [1] * 2), 2)
    assert probe_fit.accuracies(np.zeros(10, int), data) == (0.8, 0.5)


def test_a_hundred_thousand_tokens_of_16384_latents_never_become_dense():
    features, label = planted(100_000, 16_384, 20)
    tracemalloc.start()
    data = probe_fit.take(features, label, *halves(100_000))
    scores = probe_fit.sparse_probes(data, data.train_label, (5,))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert scores[5].accuracy == 1
    assert peak < 0.1 * 4 * 100_000 * 16_384


def samples(groups: int, each: int) -> Samples:
    """Tokens of texts, `each` in a row; the label is the group's number modulo 3."""
    group = np.repeat(np.arange(groups), each)
    names = ("a", "b", "c")
    return Samples(group, np.tile(np.arange(each), groups), group % 3, group, names, (), "test")


def test_texts_stand_on_one_side_of_a_split_and_every_class_on_both():
    found = samples(30, 4)
    for seed in range(5):
        train, test = split(found, ProbeConfig(), "semantics", seed)
        assert not set(found.group[train]) & set(found.group[test])
        assert len(train) + len(test) == 120
        assert set(found.label[train]) == set(found.label[test]) == {0, 1, 2}
    assert not np.array_equal(test, split(found, ProbeConfig(), "semantics", 0)[1])


def test_tokens_of_one_text_are_split_with_a_gap():
    group = np.repeat(np.arange(3), 40)
    found = Samples(group, np.tile(np.arange(40), 3), group, group, ("x", "y", "z"), (), "test")
    for seed in range(20):
        train, test = split(found, ProbeConfig(gap=5), "context", seed)
        for name in range(3):
            mine = [found.positions[part[found.label[part] == name]] for part in (train, test)]
            assert len(mine[1]) == 10
            assert np.abs(mine[0][:, None] - mine[1]).min() == 5


def test_the_released_codes_split_is_of_tokens():
    train, test = split(samples(30, 4), ProbeConfig(protocol="reference"), "semantics", 0)
    assert len(test) == 30
    assert set(samples(30, 4).group[train]) & set(samples(30, 4).group[test])


@pytest.mark.parametrize(
    "changes", [{"features": ()}, {"features": (0,)}, {"seeds": 0}, {"test_share": 1.0}, {"tasks": ()}, {"gap": 0}]
)
def test_impossible_settings_are_named(changes):
    with pytest.raises(TsaeError, match=rf"experiments\.probe\.{next(iter(changes))}.*: .+ is impossible; .+"):
        configuration.from_mapping({"experiments": {"probe": changes}}, "here.yaml")


@pytest.fixture(autouse=True)
def home(experiment_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shared runs' home, and a tagger that knows a word by its ending."""
    monkeypatch.setenv("TSAE_HOME", str(experiment_home))
    tagger = (
        "import re\ndef tag(text):\n    return [(m.start(), m.end(), m[0][-2:]) for m in re.finditer('[a-z]+', text)]\n"
    )
    (tmp_path / "ending_tagger.py").write_text(tagger)
    monkeypatch.syspath_prepend(str(tmp_path))


@pytest.fixture
def config(run_config: RunConfig, labelled_text: Path) -> RunConfig:
    probe = ProbeConfig(dataset=str(labelled_text), tagger="ending_tagger:tag", tokens=400, context_texts=5, gap=2)
    texts = TextsConfig(count=60, context_length=32, min_characters=50)
    return configuration.replace(run_config, experiments={"probe": probe, "texts": texts})


def read(checkpoints: Path, run: str, stem: str) -> dict:
    return json.loads(RunFolder.of(checkpoints, run).result(stem, "json").read_text())


def test_all_splits_of_a_run_are_probed_once(config, checkpoints, monkeypatch):
    experiment_stage(config, checkpoints, "temporal", "probe")
    for chunk, candidates in ((0, 12), (1, 52), (2, 64)):
        results = read(checkpoints, "temporal", f"probing_chunk{chunk}")
        assert results["candidate_features"] == candidates
        assert set(results["headline"]) == {"semantics", "context", "syntax"}
        assert RunFolder.of(checkpoints, "temporal").result(f"probing_chunk{chunk}", "png").stat().st_size > 10_000
    tasks = results["tasks"]
    assert set(tasks["semantics"]["classes"]) == {"north", "east", "south"}
    assert set(tasks["syntax"]["classes"]) == {"ba", "do", "fe", "gi", "nu"}
    assert tasks["semantics"]["majority_balanced_accuracy"] == pytest.approx(1 / 3)
    for task in tasks.values():
        assert [entry["features"] for entry in task["probes"]] == [1, 5, 10, 20, "all"]
        assert task["probes"][3]["balanced_accuracy"] > task["probes"][3]["shuffled_balanced_accuracy"]
        assert all(entry["accuracy_half_width"] is not None for entry in task["probes"])
    assert driver.is_done(config, RunFolder.of(checkpoints, "temporal"), "probe")
    beside = {}
    monkeypatch.setattr("tsae.experiments.probe.experiment.measure", None)
    monkeypatch.setattr(
        "tsae.experiments.probe.experiment.draw",
        lambda drawn, path: beside.update({drawn["split"]: [entry["split"] for entry in splits_beside(drawn, path)]}),
    )
    experiment_stage(config, checkpoints, "temporal", "probe")
    assert beside["high-level"][:2] == ["low-level", "all latents"]


def test_a_picture_is_drawn_again_only_when_what_it_shows_has_changed(config, checkpoints):
    experiment_stage(config, checkpoints, "temporal", "probe")
    paths = [RunFolder.of(checkpoints, "temporal").result(f"probing_chunk{chunk}", "png") for chunk in (0, 1)]
    before = [path.stat().st_mtime_ns for path in paths]
    beside = paths[0].with_suffix(".json")
    written = beside.read_bytes()
    driver.draw_again("probe", paths[1].with_suffix(".json"))
    assert [path.stat().st_mtime_ns for path in paths] == before
    beside.unlink()  # a line of the other picture
    driver.draw_again("probe", paths[1].with_suffix(".json"))
    beside.write_bytes(written)
    assert paths[1].stat().st_mtime_ns > before[1]
    paths[0].write_bytes(b"damaged")
    driver.draw_again("probe", beside)
    assert paths[0].stat().st_size > 10_000


def test_the_residual_stream_is_probed_by_its_own_name(config, checkpoints, labelled_text):
    shared = [
        *("--checkpoints_path", str(checkpoints), "--dataset", str(labelled_text)),
        *(
            f"experiments.probe.{name}"
            for name in ("tokens=300", "context_texts=4", "gap=2", "tagger=ending_tagger:tag")
        ),
        *(f"experiments.texts.{name}" for name in ("count=30", "context_length=32", "min_characters=50")),
    ]
    arguments = ["--run_name", "baseline_model", "--model", config.model.name, "--layer", "1"]
    assert main(["probe", *arguments, *shared]) == 0
    results = read(checkpoints, "baseline_model", "probing_chunk2")
    assert results["split"] == "residual stream"
    assert results["candidate_features"] == 32
    assert results["headline"]["syntax"] > 0.5  # a word's ending stands in its embedding


def as_released(config: RunConfig, **changes: object) -> RunConfig:
    probe = ProbeConfig(**{**vars(config.experiments.probe), "protocol": "reference", **changes})
    return configuration.replace(config, experiments={"probe": probe})


def test_the_released_codes_protocol_has_files_of_its_own(config, checkpoints):
    with pytest.raises(TsaeError, match="probe context: only 0 texts"):
        experiment_stage(as_released(config, reference_length=16), checkpoints, "batch_topk", "probe")
    (path,) = experiment_stage(as_released(config, reference_texts=60), checkpoints, "batch_topk", "probe")
    assert path.endswith("probing_reference_chunk2.json")
    results = json.loads(Path(path).read_text())
    tasks = results["tasks"]
    assert tasks["semantics"]["tokens"] == 60  # the last token of each text
    assert tasks["context"]["tokens"] == 60 * 25
    assert tasks["syntax"]["labels"] == "ending_tagger:tag, each token alone"
    assert [entry["features"] for entry in tasks["context"]["probes"]] == [10]
    told = " | ".join(results["differs_from_released_code"])
    for difference in ("60 texts; there 4000", "cut at 64 tokens; there at 2048", "60 are left; there 160", "3 random"):
        assert difference in told
    assert "syntax: ending_tagger:tag, each token alone; there parts of speech by spaCy" in told


def test_the_released_codes_protocol_keeps_rare_classes_short_texts_and_the_last_token(config, checkpoints, tmp_path):
    words = {"north": "kaba lodo", "east": "miba", "south": "tafe rugi", "once": "senu mido"}
    rows = [{"text": words[name], "domain": name} for name in ["north"] * 30 + ["east"] * 12 + ["south"] * 9 + ["once"]]
    path = tmp_path / "rare.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    released = as_released(config, dataset=str(path), tasks=("semantics", "syntax"))
    tasks = json.loads(Path(experiment_stage(released, checkpoints, "batch_topk", "probe")[0]).read_text())["tasks"]
    assert tasks["semantics"]["classes"] == {"east": 12, "north": 30, "once": 1, "south": 9}
    assert tasks["syntax"]["classes"] == {"ba": 12, "do": 31, "gi": 9}
    assert tasks["semantics"]["left_out"] == tasks["syntax"]["left_out"] == []


def test_copies_of_a_text_count_once_and_are_never_on_both_sides(config, checkpoints, labelled_text, tmp_path):
    rows = labelled_text.read_text().splitlines()

    def probe(texts: int, task: str) -> dict:
        """Of so many texts (a third of them of each class), each of them eight times."""
        (tmp_path / "copies.jsonl").write_text("\n".join(rows[:texts] * 8))
        own = ProbeConfig(
            **{**vars(config.experiments.probe), "dataset": str(tmp_path / "copies.jsonl"), "tasks": (task,)}
        )
        texts_read = TextsConfig(count=8 * texts, context_length=32, min_characters=50)
        changed = configuration.replace(config, experiments={"probe": own, "texts": texts_read})
        experiment_stage(changed, checkpoints, "temporal", "probe", chunks=[2])
        return read(checkpoints, "temporal", "probing_chunk2")["tasks"][task]

    with pytest.raises(TsaeError, match="fewer than two classes have tokens in 4 texts or more"):
        probe(9, "semantics")
    assert len(probe(12, "semantics")["classes"]) == 3
    assert len(probe(4, "context")["classes"]) == 4


def test_too_few_texts_and_a_split_that_is_not_there_are_one_line(config, checkpoints):
    few = configuration.replace(
        config, experiments={"texts": TextsConfig(count=9, context_length=32, min_characters=50)}
    )
    with pytest.raises(TsaeError, match=r"probe semantics: fewer than two classes .* raise experiments\.texts\.count"):
        experiment_stage(few, checkpoints, "temporal", "probe")
    short = configuration.replace(
        config, experiments={"texts": TextsConfig(count=60, context_length=8, min_characters=50)}
    )
    with pytest.raises(TsaeError, match=r"probe context: only 0 texts have the 10 tokens .* the longest has 7"):
        experiment_stage(short, checkpoints, "temporal", "probe")
    with pytest.raises(TsaeError, match="--chunk 0"):
        experiment_stage(config, checkpoints, "batch_topk", "probe", chunks=[0])


def entry(run: str, split: str, **changes: object) -> dict:
    """The part of a result that decides which others stand in its figure."""
    return {
        "experiment": "probe",
        "split": split,
        "settings": {"seeds": 3},
        "subject": {"run": run, "model": "m", "layer": 1},
        "texts": {"dataset": "d", "classes": {"a": 1}},
        **changes,
    }


def test_a_figure_shows_only_what_was_probed_alike(tmp_path):
    results = {
        ("one", 0): entry("one", "high-level"),
        ("one", 1): entry("one", "low-level", settings={"seeds": 5}),
        ("baseline_model", 2): entry("baseline_model", "residual stream"),
        ("two", 2): entry("two", "all latents"),
        ("three", 2): entry("three", "all latents", texts={"dataset": "other", "classes": {"a": 1}}),
        ("four", 2): entry("four", "all latents", subject={"run": "four", "model": "m", "layer": 2}),
    }
    for (run, chunk), content in results.items():
        folder = tmp_path / run / "trainer_0"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"probing_chunk{chunk}.json").write_text(json.dumps(content))
    mine, path = entry("one", "all latents"), tmp_path / "one" / "trainer_0" / "probing_chunk2.png"
    assert [found["split"] for found in splits_beside(mine, path)] == ["high-level", "residual stream"]
    assert [found["subject"]["run"] for found in runs_beside(mine, path)] == ["two"]


def test_a_split_of_dead_latents_is_one_line(config, checkpoints, tmp_path):
    run, dead = RunFolder.of(checkpoints, "batch_topk"), RunFolder.of(tmp_path, "dead")
    dead.path.mkdir(parents=True)
    dead.resolved.write_bytes(run.resolved.read_bytes())
    metadata.write(dead.config_json, of_new_weights(json.loads(run.config_json.read_text())))
    state = torch.load(run.weights, weights_only=True)
    torch.save({**state, "threshold": torch.full_like(state["threshold"], 1e9)}, dead.weights)
    with pytest.raises(TsaeError, match="probe semantics: no latent of this split is active on any of"):
        experiment_stage(config, tmp_path, "dead", "probe")
