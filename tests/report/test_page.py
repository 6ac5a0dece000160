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
from tsae import plotting
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


@pytest.fixture
def experimented(plan_of: Callable[..., Any]) -> Any:
    """Two points with results and pictures of an experiment on both splits."""
    plan = plan_of(grid={"sae.k": [8, 16]})
    for number, point in enumerate(plan.points):
        measured(plan, point, 0.5)
        run = plan.run(point)
        for chunk in (0, 1):
            about = {
                "made_from": driver.made_from(point.config, run, "tsne", chunk, None),
                "subject": {},
                "settings": {},
            }
            numbers = {"headline": {"semantics": 0.2 + 0.1 * number, "context": 0.3}}
            run.result(f"tsne_chunk{chunk}", "json").write_text(json.dumps({"experiment": "tsne", **about, **numbers}))
            with plotting.figure(run.result(f"tsne_chunk{chunk}", "png")):
                pass
    return plan


SHOWN = (
    "[...document.querySelectorAll('section img')].filter((image) => image.checkVisibility()).map((image) => image.alt)"
)


def test_an_experiment_is_one_row_of_panels_and_the_rest_is_behind_a_click(experimented: Any, browser: Browser) -> None:
    page = report.write_report(experimented.compared)
    panels = page.with_name("tsne.svg").read_text()
    assert [name in panels for name in ("Semantics", "Context", "Syntax", "high-level", "purity")] == [1, 1, 0, 1, 1]
    browser.open(page, ready=LOADED)
    [row] = browser.run(SHOWN)
    assert row == "map feature activations with t-SNE, coloured by three labels"
    browser.run("document.querySelector('section summary').focus()")
    browser.press("Enter")
    stems = [f"{point.name}: tsne_chunk{chunk}" for point in experimented.points for chunk in (0, 1)]
    assert browser.run(SHOWN) == [row, *stems]
    browser.press("Enter")
    browser.run("window.dispatchEvent(new Event('beforeprint'))")
    assert browser.run(SHOWN) == [row, *stems]
    browser.run("window.dispatchEvent(new Event('afterprint'))")
    assert browser.run(SHOWN) == [row]


def test_pictures_beyond_what_a_page_carries_are_led_to(experimented: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    size = experimented.run(experimented.points[0]).result("tsne_chunk0", "png").stat().st_size
    monkeypatch.setattr("tsae.report.page.BYTES_A_RUN", size + 1)
    page = report.write_report(experimented.compared)
    found = re.findall(r'tsne_chunk(\d) \(<a href="([^"]*)">picture', page.read_text())
    assert [chunk for chunk, _ in found] == ["1", "1"]  # every run's first split is on the page
    assert all((page.parent / urllib.parse.unquote(address)).exists() for _, address in found)


CONTRASTS = """(() => {
  const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
  const channels = (colour, over) => {
    canvas.fillStyle = over; canvas.fillRect(0, 0, 1, 1);
    canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  const light = (rgb) => rgb.map((v) => v / 255).map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const ground = (element) => {
    if (!element) return "white";
    const own = getComputedStyle(element).backgroundColor;
    return own === "rgba(0, 0, 0, 0)" ? ground(element.parentElement) : own;
  };
  return [...document.querySelectorAll("body *")].filter((element) => element.checkVisibility() && !element.closest("svg")
    && [...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim())).map((element) => {
    const [one, two] = [getComputedStyle(element).color, ground(element)].map((colour) => light(channels(colour, "white")));
    return (Math.max(one, two) + 0.05) / (Math.min(one, two) + 0.05);
  });
})()"""


def test_dark_colours_follow_the_system_and_the_button_and_are_remembered(experimented: Any, browser: Browser) -> None:
    page = report.write_report(experimented.compared)
    browser.open(page, ready=LOADED)
    paper = "getComputedStyle(document.body).backgroundColor"
    pressed = "document.getElementById('colours').getAttribute('aria-pressed')"
    white, contrasts = "rgb(255, 255, 255)", browser.run(CONTRASTS)
    assert (browser.run(paper), browser.run(pressed)) == (white, "false")
    browser.click("#colours")
    assert browser.run(paper) != white
    browser.reload(ready=LOADED)
    assert browser.run(paper) != white
    assert browser.run(pressed) == "true"
    dark = browser.run(CONTRASTS)
    assert len(dark) == len(contrasts) > 50
    assert min(*contrasts, *dark) >= 4.5
    browser.click("#colours")
    assert browser.run(paper) == white
    browser.run("localStorage.clear()")
    browser.set_media("prefers-color-scheme", "dark")
    browser.reload(ready=LOADED)
    assert (browser.run(paper) != white, browser.run(pressed)) == (True, "true")
