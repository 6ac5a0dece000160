"""Execute the code cells of a notebook in one plain Python process: `python -m tests.docs.notebooks docs/notebooks/*.ipynb`
does so and stores what they print."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

RUNNER = """
import contextlib, io, json, sys
told, names = [], {"__name__": "__main__"}
for number, source in enumerate(json.load(sys.stdin)):
    with contextlib.redirect_stdout(io.StringIO()) as said:
        exec(compile(source, f"cell {number}", "exec"), names)
    told.append(said.getvalue())
print(json.dumps(told))
"""


def code_cells(notebook: dict[str, Any]) -> list[dict[str, Any]]:
    """The cells that are run."""
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def executed(notebook: dict[str, Any], folder: Path) -> list[str]:
    """What each code cell prints, run one after the other in `folder`. Raises AssertionError with what went wrong."""
    sources = ["".join(cell["source"]) for cell in code_cells(notebook)]
    command = [sys.executable, "-c", RUNNER]
    ran = subprocess.run(
        command, cwd=folder, input=json.dumps(sources), capture_output=True, text=True, encoding="utf-8", check=False
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    found: list[str] = json.loads(ran.stdout.splitlines()[-1])
    return found


def store(path: Path, folder: Path) -> None:
    """Write what the cells of the notebook at `path` print into it."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    printed = executed(notebook, folder)
    for number, (cell, text) in enumerate(zip(code_cells(notebook), printed, strict=True), start=1):
        lines = text.splitlines(keepends=True)
        cell["execution_count"] = number
        cell["outputs"] = [{"name": "stdout", "output_type": "stream", "text": lines}] if lines else []
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    for name in sys.argv[1:]:
        store(Path(name), Path.cwd())
