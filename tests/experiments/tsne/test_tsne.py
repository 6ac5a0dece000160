"""The map of feature activations: its numbers against plain definitions, its page in a real browser."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.sparse import csr_array, random_array
from sklearn.metrics import silhouette_score
from sklearn.metrics.pairwise import cosine_similarity

from tests.experiments.chromium import Browser, find_chromium
from tsae.checkpoint import RunFolder, of_new_weights
from tsae.config import run as configuration
from tsae.config.experiments import TextsConfig, TsneConfig
from tsae.config.run import RunConfig
from tsae.experiments.tsne.experiment import draw_map, purity, silhouette, unit_rows, write_page
from tsae.runtime import metadata
from tsae.runtime.errors import TsaeError
from tsae.stages import experiment_stage

RANDOM = np.random.default_rng(0)


def codes(tokens: int = 90) -> csr_array:
    return csr_array(random_array((tokens, 40), density=0.2, rng=np.random.default_rng(1), dtype=np.float32))


def test_tokens_without_an_active_latent_are_left_out():
    features = csr_array(np.array([[0, 3, 4], [0, 0, 0], [1, 0, 0]], np.float32))
    x, kept = unit_rows(features)
    assert kept.tolist() == [0, 2]
    np.testing.assert_allclose(x.toarray(), [[0, 0.6, 0.8], [1, 0, 0]], rtol=1e-6)


@pytest.mark.parametrize("dense", [False, True])
def test_the_silhouette_is_that_of_scikit_learn(dense):
    x, kept = unit_rows(codes().toarray() if dense else codes())
    label = RANDOM.integers(0, 4, len(kept))
    label[0] = 7  # a class of one token
    assert silhouette(x, label) == pytest.approx(silhouette_score(x, label, metric="cosine"), abs=1e-5)
    without = label.copy()
    without[5:20] = -1
    expected = silhouette_score(x[without >= 0], without[without >= 0], metric="cosine")
    assert silhouette(x, without) == pytest.approx(expected, abs=1e-5)
    assert np.isnan(silhouette(x, np.zeros_like(label)))


def test_purity_counts_the_nearest_tokens_of_other_texts():
    x, kept = unit_rows(codes())
    label, text = RANDOM.integers(-1, 3, len(kept)), RANDOM.integers(0, 12, len(kept))
    likeness = cosine_similarity(x)
    for own_text in (None, text):
        found, chance = [], []
        for i in np.flatnonzero(label >= 0):
            others = [
                j for j in range(len(kept)) if j != i and label[j] >= 0 and (own_text is None or text[j] != text[i])
            ]
            nearest = sorted(others, key=lambda j: -likeness[i, j])[:5]
            found.append(np.mean(label[nearest] == label[i]))
            chance.append(np.mean(label[others] == label[i]))
        assert purity(x, label, 5, own_text) == pytest.approx((np.mean(found), np.mean(chance)), abs=2e-3)


def test_planted_clusters_are_pure_and_too_few_tokens_have_no_purity():
    label = np.arange(80) % 4
    x, _ = unit_rows(csr_array(np.eye(4, dtype=np.float32)[label] + 0.01))
    assert purity(x, label, 10)[0] == 1
    assert silhouette(x, label) == pytest.approx(1, abs=1e-3)
    assert np.isnan(purity(x[:5], label[:5], 10)[0])
    assert np.isnan(purity(x, label, 10, np.zeros(80, int))[0])  # every other token is of the same text


def test_the_map_says_what_came_before_it():
    x, _ = unit_rows(codes())
    drawn = draw_map(x, 10, 5, 0)
    assert drawn.points.shape == (x.shape[0], 2)
    assert drawn.reduction.startswith("truncated SVD to 10 dimensions (")
    few = draw_map(x.toarray(), 100, 500, 0)
    assert few.reduction == "PCA to 39 dimensions (100% of the variance)"
    assert few.perplexity == (x.shape[0] - 1) / 3


@pytest.fixture
def config(
    run_config: RunConfig, labelled_text: Path, experiment_home: Path, monkeypatch: pytest.MonkeyPatch
) -> RunConfig:
    monkeypatch.setenv("TSAE_HOME", str(experiment_home))
    tsne = TsneConfig(dataset=str(labelled_text), tagger="surface", texts=15, tokens=8, seeds=2, neighbours=5)
    texts = TextsConfig(count=30, context_length=32, min_characters=50)
    return configuration.replace(run_config, experiments={"tsne": tsne, "texts": texts})


def test_every_split_and_the_residual_stream_are_mapped(config, checkpoints):
    paths = experiment_stage(config, checkpoints, "temporal", "tsne")
    paths += experiment_stage(config, checkpoints, "baseline_model", "tsne")
    assert [Path(path).name for path in paths] == [f"tsne_chunk{chunk}.json" for chunk in (0, 1, 2, 2)]
    for path in map(Path, paths):
        results = json.loads(path.read_text())
        assert set(results["headline"]) == {"semantics", "context", "syntax"}
        drawn = results["map"]
        assert len(drawn["x"]) == len(drawn["token"]) <= 15 * 8
        assert sum(results["texts"]["classes"].values()) == 30
        assert len("".join(drawn["tokens"][0]).split()) == 32  # whole words, blanks kept
        assert path.with_suffix(".png").stat().st_size > 10_000
        assert path.with_suffix(".html").exists()
        told = " | ".join(results["differs_from_released_code"])
        for difference in (
            "length 1",
            "left out",
            "dimensions (",
            "angle 0.8 and 500 steps",
            "8 tokens of 15 texts; there 30 of 200",
        ):
            assert difference in told
    assert results["reduction"].startswith("PCA")
    assert results["colourings"]["semantics"]["purity"] > results["colourings"]["semantics"]["chance"]


def test_of_texts_with_one_label_there_is_no_silhouette_and_no_probe(config, checkpoints, labelled_text, tmp_path):
    rows = [json.loads(row) for row in labelled_text.read_text().splitlines()]
    (tmp_path / "alike.jsonl").write_text(
        "".join(json.dumps({"text": row["text"], "label": "one"}) + "\n" for row in rows)
    )
    alike = dataclasses.replace(config.experiments.tsne, dataset=str(tmp_path / "alike.jsonl"))
    made = experiment_stage(configuration.replace(config, experiments={"tsne": alike}), checkpoints, "temporal", "tsne")
    for path in made:
        entry = json.loads(Path(path).read_text(), parse_constant=pytest.fail)["colourings"]["semantics"]
        assert (entry["purity"], entry["silhouette"]) == (1, None)
        assert "NaN" not in Path(path).with_suffix(".html").read_text()
    own = {"dataset": str(tmp_path / "alike.jsonl"), "tasks": ("semantics",), "tagger": "surface"}
    probe = dataclasses.replace(config.experiments.probe, **own)
    with pytest.raises(TsaeError, match=r"^probe semantics: the texts have one label, one; two or more are needed"):
        experiment_stage(configuration.replace(config, experiments={"probe": probe}), checkpoints, "temporal", "probe")


def test_texts_shorter_than_asked_for_and_dead_latents_are_one_line(config, checkpoints, tmp_path):
    long = configuration.replace(
        config, experiments={"tsne": TsneConfig(dataset=config.experiments.tsne.dataset, tagger="surface", tokens=40)}
    )
    with pytest.raises(
        TsaeError, match=r"experiments\.tsne\.tokens: no text has 40 tokens .* the longest of 30 has 31"
    ):
        experiment_stage(long, checkpoints, "temporal", "tsne")
    with pytest.raises(TsaeError, match=r"experiments\.tsne\.seeds: 0 is impossible"):
        configuration.from_mapping({"experiments": {"tsne": {"seeds": 0}}}, "here.yaml")
    run, dead = RunFolder.of(checkpoints, "batch_topk"), RunFolder.of(tmp_path, "dead")
    dead.path.mkdir(parents=True)
    dead.resolved.write_bytes(run.resolved.read_bytes())
    metadata.write(dead.config_json, of_new_weights(json.loads(run.config_json.read_text())))
    state = torch.load(run.weights, weights_only=True)
    state["threshold"] = torch.full_like(state["threshold"], 1e9)
    torch.save(state, dead.weights)
    with pytest.raises(TsaeError, match=r"only 0 of 120 tokens have an active latent in this split"):
        experiment_stage(config, tmp_path, "dead", "tsne")


HOSTILE = "</script><b>bold</b> & 'quotes' <!-- ü"


def page(folder: Path) -> Path:
    """A page of three tokens."""
    numbers = {"labels": "of a test", "purity": 0.5, "chance": 0.25, "silhouette": -0.1}
    results = {
        "subject": {"run": "a <run>", "model": "m", "layer": 1},
        "split": "high-level",
        "texts": {"dataset": "d"},
        "reduction": "none",
        "colourings": dict.fromkeys(("semantics", "context", "syntax"), numbers),
        "map": {
            **{"x": [0.0, 1.0, 2.0], "y": [0.0, 2.0, 0.0], "text": [0, 1, 1], "token": [1, 0, 2]},
            **{
                "semantics": [0, 1, 1],
                "syntax": [0, -1, 0],
                "semantics_names": ["law", HOSTILE],
                "syntax_names": ["noun"],
            },
            "tokens": [["a ", "word", " more"], ["one ", "two ", HOSTILE]],
        },
    }
    write_page(results, folder / "map.html")
    return folder / "map.html"


def test_pointing_at_a_token_shows_it_in_its_text(require, tmp_path):
    program = find_chromium()
    require("chromium", program is not None, "apt-get install chromium")
    with Browser(str(program), tmp_path / "profile") as browser:
        browser.open(page(tmp_path))
        point = (
            "(i => {{ const panel = document.getElementById('{panel}'), box = panel.getBoundingClientRect();"
            "panel.dispatchEvent(new MouseEvent('mousemove', {{clientX: box.left + at[i][0] / side * box.width,"
            "clientY: box.top + at[i][1] / side * box.height}}));"
            "return [document.querySelector('mark').textContent, document.getElementById('words').textContent,"
            "document.getElementById('labels').textContent]; }})({token})"
        )
        assert browser.run(point.format(panel="semantics", token=0)) == ["word", "… a word more", "law · text 0 · noun"]
        mark, words, labels = browser.run(point.format(panel="syntax", token=2))
        assert mark == HOSTILE
        assert words == f"… one two {HOSTILE}"
        assert labels == f"{HOSTILE} · text 1 · noun"
        assert browser.run("document.querySelectorAll('b').length") == 0
        assert browser.run("document.querySelector('h1').textContent") == "a <run>, high-level: 3 tokens"
        browser.click(".keys button")
        assert browser.run("panels[0].chosen") == 0
        assert browser.requests == [page(tmp_path).as_uri()] or all(
            not url.startswith("http") for url in browser.requests
        )
