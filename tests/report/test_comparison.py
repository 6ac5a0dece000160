"""Many settings in one report: differences by seed, sentences, grids, effects and trade-offs."""

from __future__ import annotations

import json
import math
import re
import urllib.parse

import pytest

from tsae.evaluation.identity import made_from
from tsae.experiments import driver
from tsae.report import figures as drawing
from tsae.report import grids
from tsae.report import write as report
from tsae.report.figures import front
from tsae.report.grids import SweptAxis
from tsae.report.summary import compare, summarise
from tsae.report.text import sentences


def measured(plan, values):
    """Leave results in every point's folder; `values(point)` gives FVE and the smoothness of the two splits."""
    for point in plan.points:
        run = plan.run(point)
        run.claim(point.config)
        run.weights.write_bytes(b"weights")
        run.config_json.write_text('{"trainer": {"dict_class": "TemporalMatryoshkaBatchTopKSAE"}}')
        fve, high, low = values(point)
        results = {
            "frac_variance_explained": fve,
            "lipschitz_cont_h": high,
            "lipschitz_cont_l": low,
            "made_from": made_from(point.config, run),
        }
        run.eval_results.write_text(json.dumps(results))
    return plan


@pytest.fixture
def noisy(plan_of):
    """The seed moves FVE by far more than alpha does, which is worth 0.01 and lets it vary by 0.001."""

    def values(point):
        seed, alpha = point.config.training.seed, point.config.objective.temporal_alpha
        return 0.5 + 0.1 * seed - 0.01 * alpha + 0.001 * alpha * (seed == 1), 0.1, 0.2

    return measured(plan_of(grid={"objective.temporal_alpha": [0.0, 1.0], "training.seed": [0, 1, 2]}), values)


def test_differences_by_seed_see_what_the_means_hide(noisy):
    summary = summarise(noisy.compared)
    (first, second), (found,) = summary.groups, compare(summary)
    assert abs(first.interval("frac_variance_explained")[0] - second.interval("frac_variance_explained")[0]) < 0.02
    assert first.interval("frac_variance_explained")[1] > 0.2
    mean, half, seeds = found.differences["frac_variance_explained"]
    assert (found.group, found.reference, seeds) == (second, first, 3)
    assert mean == pytest.approx(-0.01 + 0.001 / 3)
    assert half == pytest.approx(4.302653 * 0.001 / math.sqrt(3) / math.sqrt(3), rel=1e-4)


def test_a_seed_that_one_side_lacks_is_left_out(plan_of):
    points = [{"sae.k": k, "training.seed": seed} for k, seed in ((4, 0), (4, 1), (4, 2), (8, 1), (8, 2), (8, 3))]
    summary = summarise(
        measured(plan_of(list=points), lambda point: (0.1 * point.config.training.seed, 1.0, 1.0)).compared
    )
    (found,) = compare(summary)
    assert found.differences["frac_variance_explained"] == (pytest.approx(0.0), pytest.approx(0.0, abs=1e-12), 2)


def test_one_seed_gives_no_comparison(plan_of):
    plan = measured(plan_of(grid={"sae.k": [4, 8]}), lambda _: (0.5, 0.1, 0.2))
    summary = summarise(plan.compared)
    assert compare(summary) == []
    assert sentences(summary)[-1].endswith("so no difference between settings is claimed.")


def test_many_differences_are_counted(plan_of):
    def values(point):
        k, seed = point.config.sae.k, point.config.training.seed
        return 0.5 + 0.01 * (k - 8) + 0.001 * seed, 0.1, 0.2

    plan = measured(plan_of(grid={"sae.k": [8, *range(4, 8), *range(9, 14)], "training.seed": [0, 1]}), values)
    told = sentences(summarise(plan.compared))[-2]
    assert told.startswith(
        "Of 9 comparisons with k 8, seed by seed: the fraction of variance explained (FVE) is higher in 5 and lower in 4."
    )


def test_the_named_baseline_is_what_others_are_compared_with(plan_of):
    grid = {"sae.kind": ["temporal", "matryoshka", "batch_topk"], "sae.k": [4, 8], "training.seed": [0, 1]}
    plan = measured(plan_of(grid=grid, report={"baseline": {"sae.kind": "matryoshka"}}), lambda _: (0.5, 0.1, 0.2))
    pairs = {
        (entry.group.value("sae.kind"), entry.group.value("sae.k"), entry.reference.value("sae.k"))
        for entry in compare(summarise(plan.compared))
    }
    assert pairs == {(kind, k, k) for kind in ("temporal", "batch_topk") for k in (4, 8)}


def test_sentences_follow_from_the_numbers(noisy):
    ranges, splits, differences, sure = sentences(summarise(noisy.compared))
    assert ranges.startswith(
        "The fraction of variance explained (FVE) is largest with temporal alpha 0 (0.600 ± 0.248) and smallest with "
        "temporal alpha 1 (0.590 ± 0.248)."
    )
    assert splits == (
        "The high-level split is smoother than the low-level one in 2 of 2 settings, in 2 of them with intervals that "
        "do not touch."
    )
    assert differences == (
        "With temporal alpha 1 instead of temporal alpha 0, the fraction of variance explained (FVE) is lower by "
        "0.010 ± 0.001 (worse): 0.590 ± 0.248 against 0.600 ± 0.248 (3 seeds). No difference is claimed in the smoothness "
        "of the high-level split: its 95 % interval holds zero."
    )
    assert sure.startswith("Values are means over 3 seeds, ± their 95 % intervals (Student's t)")


@pytest.mark.parametrize(
    ("spread", "words"),
    [
        (0.001, "is smoother than the low-level one, with intervals that do not touch."),
        (0.05, "is smoother than the low-level one, but the intervals overlap."),
    ],
)
def test_one_setting_s_splits_are_told_apart_only_beyond_their_intervals(plan_of, spread, words):
    def values(point):
        return 0.5, 0.3 + spread * point.config.training.seed, 0.4

    plan = measured(plan_of(grid={"sae.k": [4], "training.seed": [0, 1, 2]}, report={"x": "sae.k"}), values)
    text = re.sub(r" \([^)]*\)", "", " ".join(sentences(summarise(plan.compared))))
    assert f"The high-level split {words}" in text


def test_the_front_holds_what_nothing_beats_in_both():
    points = [(1.0, 1.0), (2.0, 3.0), (3.0, 2.0), (2.5, 3.0), (4.0, 4.0)]
    assert set(front(points, -1)) == {(1.0, 1.0), (2.0, 3.0), (4.0, 4.0)}
    assert set(front(points, 1)) == {(4.0, 4.0)}


@pytest.mark.parametrize(
    ("grid", "figures"),
    [
        ({"sae.k": [4, 8, 16]}, {"fve", "smoothness", "trade_offs"}),
        ({"sae.k": [4, 8, 16, 32], "sae.split_fraction": [0.1, 0.2, 0.3, 0.5]}, {"fve", "smoothness", "trade_offs"}),
        (
            {"sae.k": [4, 8, 16], "sae.split_fraction": [0.1, 0.2, 0.5], "objective.temporal_alpha": [0, 0.1, 1]},
            {"effects", "pair", "trade_offs"},
        ),
    ],
)
def test_figures_suit_the_number_of_swept_settings(plan_of, tmp_path, monkeypatch, grid, figures):
    grids = []
    draw = drawing.draw_heat_map
    monkeypatch.setattr(drawing, "draw_heat_map", lambda *given: (grids.append(given), draw(*given)))
    plan = measured(plan_of(grid=grid), lambda p: (0.5 + p.config.sae.k / 100, 0.1 + p.config.sae.k / 1000, 0.2))
    drawn = drawing.draw_figures(summarise(plan.compared), tmp_path)
    assert {chart.name for chart, _ in drawn} == figures
    assert all(path.read_bytes().startswith(b"\x89PNG") for _, path in drawn)
    assert bool(grids) == (len(grid) > 1)


def test_settings_that_were_named_one_by_one_get_a_row_each(plan_of, tmp_path):
    plan = plan_of(
        list=[{"objective.preset": "reference", "objective.temporal_alpha": alpha} for alpha in (0.1, 1.0)]
        + [{"objective.preset": "scale_free"}]
        + [{"sae.k": k} for k in range(4, 12)],
        report={"x": "objective.preset", "baseline": {"objective.preset": "scale_free"}},
    )
    summary = summarise(measured(plan, lambda _: (0.5, 0.1, 0.2)).compared)
    assert grids.suits_rows(summary, drawing.series_of(summary))
    assert {chart.name for chart, _ in drawing.draw_figures(summary, tmp_path)} == {"settings", "trade_offs"}
    names = [grids._difference(summary, group) for group in summary.groups]
    assert names[:4] == ["(the first)", "temporal alpha 1", "(the first)", "k 4"]


@pytest.mark.parametrize("n", [12, 60])
def test_drawn_settings_show_the_effect_of_each(plan_of, tmp_path, n):
    draws = {"n": n, "seed": 0, "training.lr": {"log_uniform": [1e-4, 1e-2]}}
    draws["objective.temporal_alpha"] = {"uniform": [0.0, 1.0]}
    plan = measured(plan_of(random=draws), lambda point: (point.config.training.lr, 0.1, 0.2))
    assert {chart.name for chart, _ in drawing.draw_figures(summarise(plan.compared), tmp_path)} == {
        "effects",
        "trade_offs",
    }


def test_many_values_of_a_setting_are_gathered_in_bins(plan_of):
    draws = {"n": 60, "seed": 0, "training.lr": {"log_uniform": [1e-4, 1e-2]}, "sae.k": [8, 16]}
    summary = summarise(measured(plan_of(random=draws), lambda point: (point.config.training.lr, 0.1, 0.2)).compared)
    levels = grids._levels(summary, SweptAxis("training.lr", [group.value("training.lr") for group in summary.groups]))
    assert len(levels) == grids.BINS
    assert sum(len(groups) for _, groups in levels) == 60
    means = [grids._mean(groups, "frac_variance_explained") for _, groups in levels]
    assert means == sorted(means)
    assert all(groups[0].value("training.lr") <= place <= groups[-1].value("training.lr") for place, groups in levels)
    few = grids._levels(summary, SweptAxis("sae.k", [group.value("sae.k") for group in summary.groups]))
    assert [place for place, _ in few] == [8, 16]


def test_settings_of_different_worlds_do_not_compete(plan_of):
    def values(point):
        return 0.1 * point.config.model.layer + point.config.sae.k, 0.1, 0.2

    summary = summarise(measured(plan_of(grid={"model.layer": [0, 1], "sae.k": [4, 8]}), values).compared)
    worlds = summary.worlds(summary.groups)
    assert {world: [group.value("sae.k") for group in groups] for world, groups in worlds.items()} == {
        "layer 0": [4, 8],
        "layer 1": [4, 8],
    }
    assert sentences(summary)[1].startswith(
        "layer 1: The fraction of variance explained (FVE) is largest with k 8 (8.10) and smallest with k 4 (4.10)."
    )
    alone = summarise(measured(plan_of(grid={"sae.k": [4, 8]}), values).compared)
    assert list(alone.worlds(alone.groups)) == [""]


def test_an_experiments_headline_is_a_measure_and_its_picture_is_on_the_page(noisy):
    point = noisy.points[0]
    run = noisy.run(point)
    results = {
        **{"experiment": "tsne", "subject": {}, "settings": {}},
        "made_from": driver.made_from(point.config, run, "tsne", 0, None),
        "headline": {"semantics": 0.75, "syntax": None},
        "half_width_95": {"semantics": 0.02},
    }
    run.result("tsne_chunk0", "json").write_text(json.dumps(results))
    run.result("tsne_chunk0", "png").write_bytes(noisy.run(point).path.joinpath("ae.pt").read_bytes() + bytes(40))
    row = summarise(noisy.compared).rows[0]
    assert row.values["tsne_chunk0/semantics"] == 0.75
    assert row.half_width("tsne_chunk0/semantics") == 0.02
    assert "tsne_chunk0/syntax" not in row.values
    page = report.write_report(noisy.compared).read_text()
    assert f"{point.name}: tsne_chunk0</figcaption>" in page
    run.result("tsne_chunk0", "html").write_text("a page")
    page = report.write_report(noisy.compared)
    (address,) = re.findall(r'tsne_chunk0 \(<a href="([^"]+)">interactive page</a>\)</figcaption>', page.read_text())
    assert (page.parent / urllib.parse.unquote(address)).read_text() == "a page"
    other = run.result("tsne_chunk0", "json")
    other.write_text(json.dumps({**results, "made_from": {**results["made_from"], "settings": "others"}}))
    assert "tsne_chunk0/semantics" not in summarise(noisy.compared).rows[0].values


def test_the_probes_pictures_on_the_page_show_what_came_later(noisy, monkeypatch):
    point = noisy.points[0]
    run = noisy.run(point)
    result = run.result("probing_chunk0", "json")
    made = {"made_from": driver.made_from(point.config, run, "probe", 0, None)}
    result.write_text(json.dumps({"experiment": "probe", "subject": {}, "settings": {}, **made}))
    result.with_suffix(".png").write_bytes(bytes(40))
    drawn = []
    monkeypatch.setattr("tsae.experiments.probe.experiment.draw", lambda _, path: drawn.append(path))
    report.write_report(noisy.compared)
    assert drawn == [result.with_suffix(".png")]
