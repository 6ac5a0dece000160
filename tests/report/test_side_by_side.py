"""`tsae compare`: runs from anywhere in one report, and no ranking of what was measured on different things."""

from __future__ import annotations

import json
import shutil

import pytest

from tests.experiments.conftest import checkpoints, experiment_home, labelled_text, run_config
from tests.report.test_report import measured
from tsae.cli import main
from tsae.experiments import driver
from tsae.store import binding

__all__ = ["checkpoints", "experiment_home", "labelled_text", "run_config"]

TINY = {"data.max_tokens": 20_000}


@pytest.fixture
def compared(tmp_path, capsys):
    """Compare what words name; returns what was printed, the record and the page."""

    def compare(*words):
        assert main(["compare", *map(str, words), "--out", str(tmp_path / "out")]) == 0
        printed = capsys.readouterr().out
        page = tmp_path / "out" / "report.html"
        assert printed.splitlines()[-1] == f"report: {page}"
        return printed, json.loads((tmp_path / "out" / "results.json").read_text()), page.read_text()

    return compare


@pytest.fixture
def two(plan_of):
    """Two sweeps `first` and `second` over k and seeds; the latter is given settings of its own."""

    def make(**second):
        plans = []
        for name, own in (("first", {}), ("second", second)):
            grid = {"sae.k": [4 if name == "first" else 8], "training.seed": [0, 1]}
            plan = plan_of(name=name, file=name, overrides={**TINY, **own}, grid=grid)
            for point in plan.points:
                value = 0.5 + 0.1 * (name == "second") + 0.01 * point.axes["training.seed"]
                measured(plan, point, value)
            plans.append(plan)
        return plans

    return make


def test_sweeps_are_one_table_with_intervals_over_their_seeds(two, compared, tmp_path):
    two()
    printed, record, page = compared(tmp_path / "first.yaml", tmp_path / "second.yaml")
    assert record["ranked"] is True
    assert len(record["points"]) == 4
    assert "(FVE) is largest with run k=8 (0.605 ± 0.064) and smallest with run k=4 (0.505 ± 0.064)" in printed
    assert "(FVE) is higher by 0.100 ± 0.000 (better): 0.605 ± 0.064 against 0.505 ± 0.064 (2 seeds)" in printed
    assert "0.505<small>± 0.064</small>" in page
    assert "Not ranked" not in printed + page


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"data.max_tokens": 30_000}, "data.max_tokens is 20000 in A, 30000 in B"),
        ({"model.layer": 1}, "model.layer is 2 in A, 1 in B"),
        ({"evaluation.sequences": 7}, "in A, 7 in B"),
        ({"data.max_norm_multiple": 3.0}, "counted.max_norm_multiple is 6.0 in A, 3.0 in B"),
    ],
)
def test_what_was_measured_on_different_things_is_not_ranked(two, compared, tmp_path, settings, reason):
    two(**settings)
    printed, record, page = compared(tmp_path / "first.yaml", tmp_path / "second.yaml")
    assert record["ranked"] is False
    assert reason in printed
    assert reason in page
    assert "is largest with" not in printed + page
    assert "instead of" not in printed + page
    assert {point["axes"]["measured on"] for point in record["points"]} == {"A", "B"}
    assert not (tmp_path / "out" / "trade_offs.png").exists()


def test_a_text_that_has_changed_is_another_text(plan_of, compared, tmp_path):
    text = tmp_path / "text.txt"
    for name, words in (("before", "ka lo mi "), ("after", "ru se ta ")):
        text.write_text(words * 2000)
        (point,) = (
            plan := plan_of(name=name, file=name, overrides={"data.source": str(text)}, grid={"sae.k": [4]})
        ).points
        run = plan.run(point)
        run.path.mkdir(parents=True)
        run.provenance.write_text(json.dumps({"data": binding.record(point.config)}))
        run.config_json.write_text("{}")
        measured(plan, point, 0.5)
    folders = [tmp_path / "home" / "checkpoints" / f"{name}-embedded" for name in ("before", "after")]
    printed, record, _ = compared(*folders)
    assert record["ranked"] is False
    assert "another content of the text or the model" in printed


def test_a_run_that_is_not_measured_is_named_with_the_command_that_does_it(two, compared, tmp_path):
    (first, _) = two()
    lost = first.run(first.points[0])
    lost.eval_results.unlink()
    printed, record, _ = compared(tmp_path / "first.yaml", tmp_path / "second.yaml")
    assert f"tsae evaluate {lost.path}" in printed
    assert len(record["points"]) == 3


@pytest.mark.usefixtures("home")
def test_nothing_to_compare_is_one_line(two, capsys, tmp_path):
    for plan in two():
        for point in plan.points:
            plan.run(point).eval_results.unlink()
    assert main(["compare", str(tmp_path / "first.yaml")]) == 2
    assert main(["compare", "nobody"]) == 2
    said = capsys.readouterr().err.splitlines()
    assert "none of the runs is measured; tsae evaluate" in said[0]
    assert "nobody: neither a folder nor a run" in said[1]
    assert len(said) == 2


def test_an_experiment_that_was_made_otherwise_is_left_out(two, compared, tmp_path):
    for plan in two(**{"experiments.tsne.neighbours": 9}):
        for point in plan.points:
            run = plan.run(point)
            for name, stem in (("tsne", "tsne_chunk0"), ("probe", "probing_chunk0")):
                made = driver.made_from(point.config, run, name, 0, None)
                told = {
                    "experiment": name,
                    "subject": {},
                    "settings": {},
                    "made_from": made,
                    "headline": {"semantics": 0.5},
                }
                run.result(stem, "json").write_text(json.dumps(told))
    printed, record, page = compared(tmp_path / "first.yaml", tmp_path / "second.yaml")
    assert record["ranked"] is True
    assert [set(point["experiments"]) for point in record["points"]] == [{"probing_chunk0/semantics"}] * 4
    for said in (printed, page):
        assert "tsne_chunk0" in said
        assert "made with different texts or settings" in said


def test_a_run_from_elsewhere_stands_beside_ours(
    checkpoints, experiment_home, run_config, monkeypatch, tmp_path, compared, capsys
):
    monkeypatch.setenv("TSAE_HOME", str(experiment_home))
    ours = tmp_path / "ours"
    shutil.copytree(checkpoints / "temporal", ours)
    theirs = tmp_path / "theirs" / "trainer_0"
    theirs.mkdir(parents=True)
    for name in ("ae.pt", "config.json"):
        shutil.copy(ours / "trainer_0" / name, theirs)
    assert main(["evaluate", str(ours)]) == 0
    assert main(["compare", str(ours), str(theirs.parent)]) == 2
    assert f"tsae evaluate {theirs} store.path=" in capsys.readouterr().err
    assert main(["evaluate", str(theirs.parent), f"store.path={run_config.store.path}"]) == 0
    capsys.readouterr()
    printed, record, _ = compared(ours, theirs.parent)
    assert record["ranked"] is True, printed
    first, second = (point["results"]["frac_variance_explained"] for point in record["points"])
    assert first == second
