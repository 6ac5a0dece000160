"""The report from run folders that a test filled."""

from __future__ import annotations

import csv
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tsae.cli import main
from tsae.evaluation import measures
from tsae.evaluation.identity import is_evaluated, made_from
from tsae.evaluation.measures import EVERYWHERE, FVE, Chart, Measure
from tsae.report import write as report
from tsae.report.figures import series_of
from tsae.report.grids import SweptAxis
from tsae.report.summary import summarise
from tsae.report.text import figures
from tsae.sweep.plan import make_plan
from tsae.sweep.sweepfile import load_sweep

REPOSITORY = Path(__file__).resolve().parents[2]


def measured(plan, point, value, half_width=0.01, splits=True):
    """Leave the results of `point` in its run folder; every measure follows from `value`."""
    run = plan.run(point)
    run.claim(point.config)
    run.weights.write_bytes(b"weights")
    run.config_json.write_text('{"trainer": {"dict_class": "TemporalMatryoshkaBatchTopKSAE"}}')
    results = {
        "frac_variance_explained": value,
        "frac_variance_explained_high": value / 2 if splits else None,
        "lipschitz_cont_h": value / 10 if splits else None,
        "lipschitz_cont_l": value / 5 if splits else None,
        "frac_recovered": value + 0.1,
        "l0": 16.5,
        "l0_group": [4.0, 12.5],
        "tokens": 1000,
        "half_width_95": {"frac_variance_explained": half_width},
        "made_from": made_from(point.config, run),
    }
    run.eval_results.write_text(json.dumps(results))


@pytest.fixture
def seeded(plan_of):
    """Two fractions with three seeds each, all measured: 0.5, 0.6, 0.7 and 0.7, 0.8, 0.9."""
    plan = plan_of(grid={"sae.split_fraction": [0.2, 0.5], "training.seed": [0, 1, 2]})
    for point in plan.points:
        measured(plan, point, 0.5 + 0.1 * point.axes["training.seed"] + 0.2 * (point.axes["sae.split_fraction"] == 0.5))
    return plan


def test_seeds_become_a_mean_with_a_student_interval(seeded):
    summary = summarise(seeded.compared)
    assert [group.axes for group in summary.groups] == [{"sae.split_fraction": 0.2}, {"sae.split_fraction": 0.5}]
    mean, half = summary.groups[1].interval("frac_variance_explained")
    assert mean == pytest.approx(0.8)
    assert half == pytest.approx(4.302653 * 0.1 / math.sqrt(3), rel=1e-5)


def test_one_seed_keeps_the_interval_over_documents(plan_of):
    plan = plan_of(grid={"sae.split_fraction": [0.2]})
    measured(plan, plan.points[0], 0.5, half_width=0.03)
    (group,) = summarise(plan.compared).groups
    assert group.interval("frac_variance_explained") == (0.5, 0.03)
    assert math.isnan(group.interval("l0")[1])


def test_the_page_is_one_file_that_loads_nothing_else(seeded):
    page = report.write_report(seeded.compared).read_text()
    assert page.count("data:image/png;base64,") == 3
    assert not re.search(r"""src=["'](?!data:)""", page)
    assert set(re.findall(r'href="(.*?)"', page)) == {
        f"{name}.{suffix}" for name in ("fve", "loss_recovered", "smoothness") for suffix in ("pdf", "svg")
    }
    assert not re.search(r"<link|fetch\(|import\(", page)
    assert "url(" not in page
    assert "@import" not in page


def test_every_measure_of_every_point_is_in_the_tables(seeded):
    folder = report.write_report(seeded.compared).parent
    rows = list(csv.DictReader((folder / "table.csv").open()))
    assert [row["point"] for row in rows] == [point.name for point in seeded.points]
    assert float(rows[4]["frac_variance_explained"]) == pytest.approx(0.8)
    assert float(rows[4]["lipschitz_cont_l"]) == pytest.approx(0.16)
    assert (rows[4]["sae.split_fraction"], rows[4]["training.seed"]) == ("0.5", "1")
    assert "tokens" not in rows[0]
    assert "| frac_recovered | 0.6000 | 0.7000 |" in (folder / "table.md").read_text()
    points = json.loads((folder / "results.json").read_text())["points"]
    assert points[0]["results"]["l0_group"] == [4.0, 12.5]


def test_missing_points_are_named_and_the_rest_is_shown(plan_of):
    plan = plan_of(grid={"sae.split_fraction": [0.1, 0.2, 0.5]})
    measured(plan, plan.points[1], 0.5)
    plan.run(plan.points[2]).claim(plan.points[2].config)
    plan.run(plan.points[2]).weights.write_bytes(b"weights")
    page = report.write_report(plan.compared).read_text()
    assert "split_fraction=0.1 (not trained); split_fraction=0.5 (trained, not evaluated)" in page
    assert "1 of 3 points" in page
    assert "split_fraction=0.2" in "\n".join(report.short_table(plan.compared))


def test_a_report_without_any_result_is_still_a_page(plan_of):
    page = report.write_report(plan_of(grid={"sae.split_fraction": [0.1, 0.2]}).compared).read_text()
    assert "No point has results yet." in page
    assert "data:image" not in page


def test_a_dictionary_without_splits_leaves_gaps(plan_of):
    plan = plan_of(grid={"sae.kind": ["temporal", "batch_topk"]})
    measured(plan, plan.points[0], 0.5)
    measured(plan, plan.points[1], 0.6, splits=False)
    page = report.write_report(plan.compared).read_text()
    assert re.search(r"<td>0\.600</td><td>–</td>", page.replace("<small>± 0.010</small>", ""))


def test_a_second_swept_value_becomes_the_series(plan_of):
    plan = plan_of(grid={"sae.split_fraction": [0.1, 0.2], "sae.k": [8, 16], "training.seed": [0]})
    for point in plan.points:
        measured(plan, point, 0.5)
    series = series_of(summarise(plan.compared))
    assert list(series) == ["k 8", "k 16"]
    assert [group.value("sae.split_fraction") for group in series["k 8"]] == [0.1, 0.2]


@pytest.mark.parametrize(
    ("values", "scale", "positions"),
    [
        ([0.5, 0.1, 0.2], "linear", [0.5, 0.1, 0.2]),
        ([1, 10, 100], "log", [1, 10, 100]),
        ([0.0, 0.01, 1.0], "category", [0, 1, 2]),
        (["previous", "random"], "category", [0, 1]),
        ([(0.2, 0.8), (0.1, 0.2, 0.7)], "category", [0, 1]),
        ([True, False], "category", [0, 1]),
        ([4], "category", [0]),
    ],
)
def test_swept_values_stand_where_they_can_be_told_apart(values, scale, positions):
    axis = SweptAxis("sae.k", values)
    assert axis.scale == scale
    assert [axis.position(value) for value in values] == positions


def test_the_report_is_current_until_a_result_changes(seeded):
    assert not seeded.compared.is_current()
    report.write_report(seeded.compared)
    assert seeded.compared.is_current()
    measured(seeded, seeded.points[0], 0.4)
    assert not seeded.compared.is_current()


def test_numbers_are_short_and_readable():
    shown = [figures(value) for value in (0.123456, 12.3456, 1234.5, 0.0, 1e-5, 3e7, math.nan)]
    assert shown == ["0.1235", "12.35", "1234", "0.0000", "1.000e-05", "3.000e+07", "–"]


def test_the_command_prints_the_table_and_the_path(seeded):
    command = [sys.executable, str(REPOSITORY / "launch" / "report.py"), str(seeded.sweep.path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[0].split()[:3] == ["point", "FVE", "all"]
    assert done.stdout.splitlines()[-1] == f"report: {seeded.compared.page}"


def test_a_split_that_took_over_is_told_on_the_page(seeded):
    point = seeded.points[0]
    seeded.run(point).metrics.write_text(
        json.dumps({"step": 9, "tokens": 90, "fve": 0.5, "share_0": 0.97, "share_1": 0.03}) + "\n"
    )
    page = report.write_report(seeded.compared).read_text()
    assert f"In 1 of {len(seeded.points)} trainings" in page
    assert f"{point.name}: the high-level split (group 0) has 97% of the activity with 20% of the latents;" in page


def test_variance_is_pooled_over_tokens_where_the_truth_is_known():
    known = [FVE, f"{FVE}_pooled", "frac_alive"]
    assert measures.shown_in("effects", known) == [FVE, "frac_alive"]
    assert measures.shown_in("effects", [*known, "truth_slow"]) == [f"{FVE}_pooled", "truth_slow", "frac_alive"]
    assert measures.shown_in("terminal", [*known, "truth_slow"]) == [FVE, "frac_alive"]
    assert measures.shown_in("effects", ["frac_alive"]) == ["frac_alive"]


def test_a_new_measure_is_declared_once_and_is_everywhere(seeded, monkeypatch):
    """All that a new measure costs beside its number: the registry is the one thing that is touched here."""
    chart = Chart("sharpness", "Sharpness", "share of the sharp", "How sharp the latents are.")
    sharpness = Measure("sharpness", "Sharpness", "sharp latents over all", "of all", "", "lower", EVERYWHERE, chart)
    monkeypatch.setitem(measures.REGISTRY, "sharpness", sharpness)
    for number, point in enumerate(seeded.points):
        run = seeded.run(point)
        assert not is_evaluated(point.config, run)  # the new measure is missing of what was complete
        results = {**json.loads(run.eval_results.read_text()), "made_from": made_from(point.config, run)}
        run.eval_results.write_text(json.dumps({**results, "sharpness": 0.25 + number / 100}))

    page = report.write_report(seeded.compared)
    rows = list(csv.DictReader(page.with_name("table.csv").open()))
    assert float(rows[1]["sharpness"]) == 0.26
    assert page.with_name("sharpness.png").read_bytes().startswith(b"\x89PNG")
    text = page.read_text()
    assert "<figcaption>How sharp the latents are. <a" in text
    assert re.search(r"<th( rowspan=.2.| class=.family. colspan=.1.)>Sharpness</th>", text)
    assert re.search(
        r"Sharpness of all is best \(lowest\) with split fraction 0.2 \(0.2\d+\s±\s0.0\d+\) and worst \(highest\) with split "
        r"fraction 0.5 \(0.290",
        text,
    )
    assert "<th>Sharpness of all</th>" in text  # among the differences seed by seed
    assert "Sharpness of all" in report.short_table(seeded.compared)[0]
    assert "sharpness" in measures.shown_in("trade-offs", summarise(seeded.compared).measures)


@pytest.mark.parametrize("command", ["report", "claims"])
def test_a_report_that_cannot_be_written_is_one_line(write_sweep, capsys, command):
    path = write_sweep(file="kinds", grid={"sae.kind": ["temporal", "matryoshka"]})
    folder = make_plan(load_sweep(path)).compared.page.parent
    folder.parent.mkdir(parents=True)
    folder.write_text("in the way")
    measured(make_plan(load_sweep(path)), make_plan(load_sweep(path)).points[0], 0.5)
    assert main([command, str(path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("tsae: ")
    assert error.count("\n") == 1
    assert str(folder) in error
