"""docs/troubleshooting.md quotes messages as the source has them, and explains every refusal there is."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

import tsae

REPOSITORY = Path(__file__).parents[2]
PAGE = REPOSITORY / "docs" / "troubleshooting.md"
HOLE = "…"
PASSED_ON = re.compile(f"[{HOLE}:;,. ]*")
"""A message that is somebody else's words: a reason, an answer of the scheduler."""


def _text(node: ast.AST) -> str | None:
    """A string of the source with its holes as `…`; None for what is none."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        parts = [HOLE if isinstance(part, ast.FormattedValue) else str(_text(part)) for part in node.values]
        return "".join(parts)
    return None


@cache
def _source() -> tuple[tuple[str, ...], dict[str, str]]:
    """Every string in tsae/, and every message of a TsaeError with the place where it is raised."""
    folder = Path(tsae.__file__).parent
    strings, refusals = set(), {}
    for path in sorted(folder.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if text := _text(node):
                strings.add(" ".join(text.split()))
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "TsaeError":
                message = _text(node.args[0]) if node.args else None
                if message and not PASSED_ON.fullmatch(message):
                    refusals[message] = f"{path.relative_to(folder)}:{node.lineno}"
    return tuple(strings), refusals


def _quoted() -> list[str]:
    """The fragments in backticks, or in double ones, in the first columns of the page's tables."""
    rows = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    return [quoted for row in rows for _, quoted in re.findall("(``?)(.+?)\\1(?!`)", row.split(" | ")[0])]


@pytest.mark.parametrize("fragment", _quoted())
def test_a_quoted_message_occurs_in_the_source(fragment):
    strings, _ = _source()
    assert any(fragment in text for text in strings), f"no string of tsae/ holds {fragment!r}"


def test_every_refusal_is_explained():
    _, refusals = _source()
    quoted = _quoted()
    assert len(refusals) > 200
    missing = [
        f"{place}: {message}" for message, place in refusals.items() if not any(part in message for part in quoted)
    ]
    assert not missing, "docs/troubleshooting.md has no row for\n" + "\n".join(missing)
