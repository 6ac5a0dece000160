"""A page of latents in the layout of Neuronpedia's importer, whose records have these fields (as of its converters in 2026)."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.experiments.features.test_features import run
from tsae.checkpoint import RunFolder
from tsae.cli import main
from tsae.experiments.features import neuronpedia
from tsae.experiments.features.data import unpack

__all__ = ["run"]

OF_ALL = {"modelId", "layer", "index", "createdAt"}
FEATURE = OF_ALL | {
    *("creatorId", "maxActApprox", "hasVector", "vector", "vectorLabel", "hookName", "frac_nonzero"),
    *("topkCosSimIndices", "topkCosSimValues", "pos_str", "pos_values", "neg_str", "neg_values"),
    *("neuron_alignment_indices", "neuron_alignment_values", "neuron_alignment_l1"),
    *("correlated_neurons_indices", "correlated_neurons_pearson", "correlated_neurons_l1"),
    *("correlated_features_indices", "correlated_features_pearson", "correlated_features_l1"),
    *("freq_hist_data_bar_heights", "freq_hist_data_bar_values"),
    *("logits_hist_data_bar_heights", "logits_hist_data_bar_values", "decoder_weights_dist"),
}
ACTIVATION = OF_ALL | {
    *("id", "creatorId", "tokens", "values", "maxValue", "maxValueTokenIndex", "minValue"),
    *("dfaValues", "dfaTargetIndex", "dfaMaxValue", "lossValues", "logitContributions"),
    *("binMin", "binMax", "binContains", "qualifyingTokenIndex", "dataIndex", "dataSource"),
}
EXPLANATION = OF_ALL | {"id", "description", "authorId", "typeName", "explanationModelName"}


@pytest.fixture(scope="module")
def exported(run: RunFolder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("export") / "out"
    assert main(["export", str(run.path), "--format", "neuronpedia", "--out", str(out)]) == 0
    (model,) = out.iterdir()
    (source,) = model.iterdir()
    assert (model.name, source.name) == ("tiny-neox", "1-explained")
    return source


def read(path: Path) -> list[dict[str, Any]]:
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return [json.loads(line) for line in content.splitlines()]


def test_the_records_say_what_the_page_says(exported: Path, run: RunFolder) -> None:
    about, columns = unpack(run.result("features", "html"))
    features, activations, explanations = (
        read(exported / kind / "batch-0.jsonl.gz") for kind in ("features", "activations", "explanations")
    )
    for records, fields in ((features, FEATURE), (activations, ACTIVATION), (explanations, EXPLANATION)):
        assert all(set(record) == fields for record in records)
        assert {(record["modelId"], record["layer"]) for record in records} == {("tiny-neox", "1-explained")}
    assert [feature["index"] for feature in features] == [str(latent) for latent in range(64)]
    assert [feature["frac_nonzero"] for feature in features] == columns["rate"].astype(float).tolist()
    assert {record["index"]: record["description"] for record in explanations} == {
        str(latent): text for latent, text in enumerate(about["explanations"]) if text is not None
    }
    assert len({record["id"] for record in (*activations, *explanations)}) == len(activations) + len(explanations)
    latent = int(np.argmax(columns["rate"]))
    own = [record for record in activations if record["index"] == str(latent)]
    assert len(own) == columns["example_offsets"][latent + 1] - columns["example_offsets"][latent]
    strongest = own[0]
    assert strongest["maxValue"] == pytest.approx(columns["largest"][latent], abs=1e-4)
    assert strongest["values"][strongest["maxValueTokenIndex"]] == max(strongest["values"]) == strongest["maxValue"]
    assert len(strongest["tokens"]) == len(strongest["values"])
    feature = features[latent]
    assert feature["maxActApprox"] == strongest["maxValue"]
    assert feature["topkCosSimIndices"] == [latent, *columns["near_writing"].reshape(64, 5)[latent]]
    assert max(feature["freq_hist_data_bar_heights"]) == 1
    spoken = [about["strings"][token] for token in columns["spoken"].reshape(64, 16)[latent]]
    assert (feature["pos_str"], feature["neg_str"]) == (spoken[:8], spoken[8:])
    assert feature["pos_values"] == sorted(feature["pos_values"], reverse=True)
    assert feature["neg_values"] == sorted(feature["neg_values"])
    assert feature["pos_values"][0] > 0 > feature["neg_values"][0]


def test_what_is_told_of_the_dictionary_hangs_together(exported: Path) -> None:
    model, release, chosen, source = (
        read(exported / f"{kind}.jsonl")[0] for kind in ("model", "release", "sourceset", "source")
    )
    assert model["id"] == chosen["modelId"] == source["modelId"] == "tiny-neox"
    assert release["name"] == chosen["releaseName"] == chosen["name"] == source["setName"] == "explained"
    assert source["id"] == exported.name


def test_latents_are_dealt_out_over_files(run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neuronpedia, "BATCH", 30)
    (place,) = neuronpedia.export(run, tmp_path / "out").glob("*/*")
    indices = [[int(line["index"]) for line in read(path)] for path in sorted((place / "features").iterdir())]
    assert [(part[0], part[-1]) for part in indices] == [(0, 29), (30, 59), (60, 63)]
    assert {path.name for path in (place / "activations").iterdir()} == {f"batch-{n}.jsonl.gz" for n in range(3)}


def test_what_cannot_be_exported_is_one_line_and_leaves_nothing(
    run: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export = ["export", str(run.path), "--format", "neuronpedia", "--out", str(tmp_path / "out")]
    assert main([*export, "--chunk", "0"]) == 2
    assert "--chunk: a page of latents is of the whole dictionary" in capsys.readouterr().err
    page = run.result("features", "html")
    kept = page.read_bytes()
    for content, said in (
        (b"<html>", "is not a page of latents, or damaged"),
        (None, "not found; make it with `tsae features"),
    ):
        page.unlink() if content is None else page.write_bytes(content)
        assert main(export) == 2
        shown = capsys.readouterr().err
        assert said in shown
        assert shown.count("\n") == 1
    page.write_bytes(kept)
    assert not (tmp_path / "out").exists()
