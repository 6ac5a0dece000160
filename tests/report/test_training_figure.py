"""The report's figure of the splits while they were trained, against the lines that it is made of."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from tests.report.test_report import measured
from tsae import plotting
from tsae.report import training
from tsae.report import write as report
from tsae.report.summary import summarise

LINES = [
    {
        "step": step,
        "tokens": 100 * (step + 1),
        "fve": 0.1 * step,
        "alive_0": 1 - 0.2 * step,
        "alive_1": 0.9,
        "share_0": 0.3,
        "share_1": 0.7,
    }
    | {"fve_0": 0.02 * step, "fve_1": 0.05 * step}
    for step in range(4)
]


def write(path: Path, lines: list[dict]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def drawn(config, measure: str, lines: list[dict]) -> dict[str, tuple[list[float], list[float], str]]:
    axes = Figure().subplots()
    training._draw(axes, config, lines, measure)
    return {
        line.get_label(): (list(line.get_xdata()), list(line.get_ydata()), line.get_color())
        for line in axes.get_lines()
        if not line.get_label().startswith("_")
    }


@pytest.mark.parametrize("measure", ["alive", "share", "fve"])
def test_each_split_has_its_own_curve_and_colour(plan_of, measure):
    config = plan_of(grid={"sae.k": [8]}).points[0].config
    found = drawn(config, measure, LINES)
    tokens = [line["tokens"] for line in LINES]
    for group, name in enumerate(["high-level (group 0)", "low-level (group 1)"]):
        values = [line[f"{measure}_{group}"] for line in LINES]
        assert found.pop(name) == (tokens, values, plotting.PALETTE[group])
    expected = {"all latents": (tokens, [line["fve"] for line in LINES], plotting.PALETTE[2])}
    assert found == (expected if measure == "fve" else {})


def test_a_dictionary_without_splits_and_lines_of_older_versions_are_drawn_too(plan_of):
    flat = plan_of(grid={"sae.kind": ["batch_topk"]}).points[0].config
    lines = [{"tokens": 1, "fve": 0.5, "alive_0": 0.9}]
    assert drawn(flat, "alive", lines) == {"all latents": ([1], [0.9], plotting.PALETTE[2])}
    assert drawn(flat, "fve", lines) == {"all latents": ([1], [0.5], plotting.PALETTE[2])}
    assert drawn(flat, "share", lines) == {}
    old = [{name: value for name, value in line.items() if name[:4] != "fve_"} for line in LINES]
    config = plan_of(grid={"sae.k": [8]}).points[0].config
    assert list(drawn(config, "fve", old)) == ["all latents"]


@pytest.mark.parametrize("settings", [2, 7])
def test_the_page_has_the_figure_where_runs_have_left_lines(plan_of, settings):
    plan = plan_of(grid={"sae.k": list(range(4, 4 + settings))})
    for point in plan.points:
        measured(plan, point, 0.5)
    without = report.write_report(plan.compared).read_text().count("data:image/png;base64,")
    folder = plan.compared.page.parent
    assert training.draw_training(summarise(plan.compared), folder) == []
    for point in plan.points:
        write(plan.run(point).metrics, LINES)
    page = report.write_report(plan.compared).read_text()
    assert page.count("data:image/png;base64,") == without + 1
    assert "Each split at every logged line of its training" in page
    width = int.from_bytes((folder / "training.png").read_bytes()[16:20], "big")
    assert width == 200 * (1.6 + 2.2 * (settings if settings <= training.MOST_COLUMNS else 1))
