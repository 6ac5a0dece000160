"""What files say is text in a report, in a real browser: names, paths, settings and comments that hold HTML."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import Require
from tests.experiments.chromium import Browser, find_chromium
from tests.report.test_report import measured
from tsae.cli import main
from tsae.report import write as report

RUNS = "<img src=x onerror=document.title='ran'><script>document.title='ran'<b>"
"""HTML that may be a file's name."""
CLOSES = "</pre></td></script></title><script>document.title='ran'</script><svg onload=document.title='ran'>"
LOADED = "document.readyState == 'complete' && location.protocol == 'file:' && document.body.innerText.length > 0"


@pytest.fixture
def browser(require: Require, tmp_path: Path) -> Iterator[Browser]:
    program = find_chromium()
    require("chromium", program is not None, "apt-get install chromium")
    with Browser(str(program), tmp_path / "profile") as running:
        yield running


def shows(browser: Browser, page: Path) -> str:
    """All text of a page in which nothing but its own elements is."""
    browser.open(page, ready=LOADED)
    assert browser.run("document.title") != "ran"
    assert browser.run("document.querySelectorAll('svg, img[onerror], [onload]').length") == 0
    assert (
        browser.run("[...document.scripts].map((script) => script.text.trim().slice(0, 13))") == ['"use strict";'] * 3
    )
    return str(browser.run("document.documentElement.textContent"))


def test_a_report_shows_what_its_files_say_and_runs_none_of_it(
    plan_of: Callable[..., object], text: Path, tmp_path: Path, browser: Browser
) -> None:
    sources = [tmp_path / f"{RUNS} {n}.jsonl" for n in range(2)]
    for n, path in enumerate(sources):
        shutil.copy(text, path)
        with path.open("a") as stream:
            stream.write(json.dumps({"text": f"another {n}"}) + "\n")
    plan = plan_of(
        name="little",
        overrides={"data.max_tokens": 20_000},
        grid={"data.source": [str(path) for path in sources], "training.seed": [0, 1]},
    )
    with (tmp_path / "little.yaml").open("a") as stream:
        stream.write(f"# {CLOSES}\n")
    for n, point in enumerate(plan.points):
        measured(plan, point, 0.5 + n / 10)
    told = shows(browser, report.write_report(plan.compared))
    assert told.count(RUNS) > 4
    assert CLOSES in told


def test_a_comparison_shows_the_names_of_runs_and_runs_none_of_them(
    plan_of: Callable[..., object], tmp_path: Path, browser: Browser
) -> None:
    plan = plan_of(name="little", overrides={"data.max_tokens": 20_000}, grid={"training.seed": [0]})
    measured(plan, plan.points[0], 0.5)
    copies = [tmp_path / f"{n} {RUNS}" for n in range(2)]
    for copy in copies:
        shutil.copytree(plan.run(plan.points[0]).path.parent, copy)
    assert main(["compare", *map(str, copies), "--out", str(tmp_path / "out")]) == 0
    assert shows(browser, tmp_path / "out" / "report.html").count(RUNS) > 2
