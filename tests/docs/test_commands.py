"""The pages' commands work as they stand, in a fresh folder, and their links lead somewhere."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PAGES = sorted((REPOSITORY / "docs").glob("*.md"))
BLOCK = re.compile(r"^(?P<before>[^\n]*)\n```(?P<language>\w*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!\w+:)(?P<file>[^)#\s]*)(?:#(?P<heading>[^)\s]*))?\)")


class Step(NamedTuple):
    """A file that a page tells its reader to make, or commands to run."""

    file: str
    text: str


def steps(page: Path) -> list[Step]:
    """What a reader of the page does, in order."""
    found = []
    for block in BLOCK.finditer(page.read_text(encoding="utf-8")):
        file = re.fullmatch(r"<!-- file: (\S+) -->", block["before"])
        if file:
            found.append(Step(file[1], block["text"]))
        elif block["before"] == "<!-- runs -->":
            found.append(Step("", block["text"]))
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_each_block_of_commands_says_whether_it_runs(page: Path) -> None:
    blocks = [block for block in BLOCK.finditer(page.read_text(encoding="utf-8")) if block["language"] == "bash"]
    silent = [block["text"] for block in blocks if not re.fullmatch(r"<!-- (runs|not run: .+) -->", block["before"])]
    assert silent == []


@pytest.mark.parametrize(
    "page", [page for page in PAGES if any(not step.file for step in steps(page))], ids=lambda page: page.stem
)
def test_what_a_page_runs_works(page: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    if page.stem == "quickstart":
        shutil.copytree(request.getfixturevalue("corpus"), tmp_path / "runs" / "corpus")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TSAE_")}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    for step in steps(page):
        if step.file:
            (tmp_path / step.file).write_text(step.text, encoding="utf-8")
            continue
        shell = ["bash", "-euo", "pipefail", "-c", step.text]
        ran = subprocess.run(shell, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert ran.returncode == 0, f"{page.name}:\n{step.text}\n{ran.stdout[-3000:]}\n{ran.stderr[-3000:]}"


def headings(page: Path) -> set[str]:
    """The names by which links reach a page's headings."""
    lines = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in lines}


@pytest.mark.parametrize("page", [*PAGES, REPOSITORY / "README.md"], ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    broken = []
    for link in LINK.finditer(page.read_text(encoding="utf-8")):
        target = page.parent / link["file"] if link["file"] else page
        if not target.exists() or (link["heading"] and link["heading"] not in headings(target)):
            broken.append(link[0])
    assert broken == []
