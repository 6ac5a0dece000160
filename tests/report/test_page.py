"""What a reader does with a report: order and filter its summary, take its figures into a paper, make it again."""

from __future__ import annotations

import json
import re
import urllib.parse
from collections.abc import Callable
from typing import Any

import pytest

from tests.experiments.chromium import Browser
from tests.report.test_foreign_text import LOADED, browser
from tests.report.test_report import measured
from tsae.experiments import driver
from tsae.report import write as report

__all__ = ["browser"]

VALUES = [0.5, 0.1, 0.9, 0.7, 0.3]


@pytest.fixture
def plan(plan_of: Callable[..., Any]) -> Any:
    """Ten points, of which the last has no results of its splits."""
    made = plan_of(name="little", grid={"sae.split_fraction": VALUES, "sae.k": [8, 16]})
    for number, point in enumerate(made.points):
        measured(made, point, point.config.sae.split_fraction / 2 + point.config.sae.k / 100, splits=number != 9)
    return made


def test_the_summary_is_ordered_by_its_headings_and_filtered_by_words(plan: Any, browser: Browser) -> None:
    browser.open(report.write_report(plan.compared), ready=LOADED)

    def column(name: str) -> list[str]:
        place = f"headings.findIndex((cell) => cell.textContent.trim() === {name!r})"
        rows = "[...body.rows].filter((row) => !row.hidden)"
        return browser.run(f"{rows}.map((row) => row.cells[{place}].firstChild.textContent.trim())")

    def press(name: str) -> str:
        heading = f"headings.find((cell) => cell.textContent.trim() === {name!r})"
        browser.run(f"{heading}.querySelector('button').click()")
        return str(browser.run(f"{heading}.ariaSort"))

    given = [f"{value:g}" for value in VALUES for _ in range(2)]
    assert column("split fraction") == given
    assert press("k") == "ascending"
    assert column("k") == ["8"] * 5 + ["16"] * 5
    assert column("split fraction") == [f"{value:g}" for value in VALUES] * 2
    assert press("split fraction") == "ascending"
    assert column("split fraction") == sorted(given, key=float)
    assert press("split fraction") == "descending"
    assert column("split fraction") == sorted(given, key=float, reverse=True)
    # What is missing stays last either way.
    assert press("high") == "ascending"
    assert column("high")[-1] == "–"
    assert press("high") == "descending"
    assert column("high")[-1] == "–"
    browser.run(
        "const box = document.getElementById('filter'); box.value = '0.9 16'; box.dispatchEvent(new Event('input'))"
    )
    assert (column("split fraction"), column("k")) == (["0.9"], ["16"])


def test_figures_are_vector_graphics_too_and_the_same_every_time(plan: Any) -> None:
    folder = report.write_report(plan.compared).parent
    names = [path.stem for path in folder.glob("*.png")]
    assert len(names) >= 3
    first = {path: path.read_bytes() for path in folder.iterdir() if path.suffix in (".pdf", ".svg")}
    assert {path.name for path in first} == {f"{name}.{suffix}" for name in names for suffix in ("pdf", "svg")}
    assert all(content.startswith((b"%PDF", b"<?xml")) for content in first.values())
    report.write_report(plan.compared)
    assert {path: path.read_bytes() for path in first} == first


def test_the_page_tells_the_command_that_makes_it_again(plan_of: Callable[..., Any]) -> None:
    plan = plan_of(command_line=("sae.k=9",), grid={"sae.split_fraction": [0.2]})
    measured(plan, plan.points[0], 0.5)
    assert f"<pre>tsae sweep {plan.folder}</pre>" in report.write_report(plan.compared).read_text()


def test_the_latents_that_an_experiment_speaks_of_lead_to_the_page_of_latents(plan_of: Callable[..., Any]) -> None:
    plan = plan_of(grid={"sae.k": [8]})
    (point,) = plan.points
    measured(plan, point, 0.5)
    run = plan.run(point)
    told = {
        "alignment_chunk0": (
            "align",
            {"rows": [{"latent": 7, "label": "concept", "explanation": "<b>"}, {"latent": 3}]},
        ),
        "steering_chunk0": ("steer", {"concepts": [{"concept": "weather", "latent": 5, "explanation": None}]}),
        "sequences_chunk0": ("sequences", {"contexts": [{"top": [9, 7], "explanations": {"9": "rain"}}]}),
    }
    for stem, (name, results) in told.items():
        about = {"made_from": driver.made_from(point.config, run, name, 0, None), "subject": {}, "settings": {}}
        run.result(stem, "json").write_text(json.dumps({"experiment": name, **about, **results}))
        run.result(stem, "png").write_bytes(bytes(40))

    def links() -> dict[str, str]:
        page = report.write_report(plan.compared)
        found = re.findall(r'<a href="([^"]*)#latent=(\d+)" title="([^"]*)">\2</a>', page.read_text())
        assert all((page.parent / urllib.parse.unquote(address)).exists() for address, _, _ in found)
        return {latent: name for _, latent, name in found if name or latent == "3"}

    assert links() == {}
    run.result("features", "html").write_text("a page")
    assert links() == {"7": "concept: &lt;b&gt;", "3": "", "5": "weather", "9": "rain"}
