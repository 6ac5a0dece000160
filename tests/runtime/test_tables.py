"""CSV that a spreadsheet may open."""

from __future__ import annotations

import ast
import csv
import io
from pathlib import Path

import pytest

import tsae
from tsae.runtime.tables import as_csv


@pytest.mark.parametrize("text", ["=1+1", "+cmd", "-x", "@SUM(A1)", "\t=1", "\uff1d1", '=HYPERLINK("http://x","y")'])
def test_a_text_that_a_spreadsheet_would_compute_has_an_apostrophe(text: str) -> None:
    assert list(csv.reader(io.StringIO(as_csv([["name", text]])))) == [["name", f"'{text}"]]


@pytest.mark.parametrize("value", [-0.5, "-0.5", "+1e-3", "-inf", "a=b", "a, b", "ü\n'", "", 3, True])
def test_numbers_and_other_texts_stay_as_they_are(value: object) -> None:
    assert list(csv.reader(io.StringIO(as_csv([["name", value]])))) == [["name", str(value)]]


def test_nothing_else_writes_csv() -> None:
    package = Path(tsae.__file__).parent
    writers = {
        str(path.relative_to(package))
        for path in package.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute)
        and (node.attr == "to_csv" or ast.unparse(node) in ("csv.writer", "csv.DictWriter"))
    }
    assert writers == {"runtime/tables.py"}
