"""The pages that are made from the code are what the code makes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import pytest

from tests.docs import python_page
from tsae import cli
from tsae.config import schema
from tsae.config.bounds import Bound, Count, Fraction

DOCS = Path(__file__).resolve().parents[2] / "docs"
MADE_BELOW = "<!-- tsae measures --markdown -->\n"


def test_the_page_of_settings_is_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["settings", "--markdown"]) == 0
    assert (DOCS / "settings.md").read_text() == capsys.readouterr().out, "tsae settings --markdown > docs/settings.md"


def test_the_table_of_measures_is_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["measures", "--markdown"]) == 0
    _, _, table = (DOCS / "measures.md").read_text().partition(MADE_BELOW)
    assert table == capsys.readouterr().out, "the table of docs/measures.md is out of date"


def test_the_page_of_public_names_is_what_their_docstrings_say() -> None:
    _, _, made = python_page.PAGE.read_text().partition(python_page.MADE_BELOW)
    assert made == f"\n{python_page.reference()}", "python -m tests.docs.python_page"


@dataclasses.dataclass(frozen=True)
class Inner:
    """What is inside."""

    share: tuple[Fraction, ...] = (0.5,)
    """Shares."""


@dataclasses.dataclass(frozen=True)
class Outer:
    """A page."""

    count: Count | None = None
    """How many."""
    even: Annotated[int, Bound(lambda n: n % 2 == 0, "it must be even")] = 2
    """An even
    number."""
    inner: Inner = Inner()
    """A section."""


def test_a_setting_has_type_default_bound_and_sentence() -> None:
    assert list(schema.settings(Outer)) == [
        ("count", "integer or none", "none", "it must be greater than 0", "How many."),
        ("even", "integer", "2", "it must be even", "An even\nnumber."),
        ("inner", "", "", "", "What is inside."),
        ("inner.share", "list of number", "[0.5]", "each: a fraction between 0 and 1 is allowed", "Shares."),
    ]
