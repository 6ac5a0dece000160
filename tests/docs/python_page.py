"""What docs/python.md says of each public name, from its docstring; `python -m tests.docs.python_page` writes it there."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import tsae

PAGE = Path(__file__).resolve().parents[2] / "docs" / "python.md"
MADE_BELOW = "<!-- python -m tests.docs.python_page -->\n"


def reference() -> str:
    """A section for each public name: its signature and docstring, and a class's public members."""
    return "\n".join(
        line for name in sorted(tsae.__all__, key=str.lower) for line in _section(name, getattr(tsae, name))
    )


def _section(name: str, thing: Any) -> Iterator[str]:
    yield f"## {name}\n"
    if not issubclass(thing if inspect.isclass(thing) else type(thing), Exception):
        yield f"```python\n{_signature(name, thing)}\n```\n"
    yield f"{inspect.getdoc(thing)}\n"
    if inspect.isclass(thing):
        members = [line for member, value in vars(thing).items() for line in _member(member, value)]
        if members:
            yield "\n".join(["| | |", "|---|---|", *members]) + "\n"


def _member(name: str, value: Any) -> Iterator[str]:
    plain = value.__func__ if isinstance(value, classmethod | staticmethod) else value
    said = inspect.getdoc(plain) or ""
    if (
        name.startswith("_")
        or not said
        or not (inspect.isfunction(plain) or isinstance(plain, property | cached_property))
    ):
        return
    shown = f"{name}{_arguments(plain)}" if inspect.isfunction(plain) else name
    first, *_ = said.split("\n\n")
    yield f"| `{shown}` | {' '.join(first.split()).replace('|', '&#124;')} |"


def _arguments(function: Any) -> str:
    """Names and defaults alone, for a table."""
    arguments = [each for each in inspect.signature(function).parameters.values() if each.name not in ("self", "cls")]
    return str(inspect.Signature([each.replace(annotation=inspect.Parameter.empty) for each in arguments]))


def _signature(name: str, thing: Any) -> str:
    """A line for each argument, if they are many."""
    found, shown = inspect.signature(thing), list[str]()
    for each in found.parameters.values():
        if each.kind is each.KEYWORD_ONLY and "*" not in shown:
            shown.append("*")
        value = "…" if repr(each.default).startswith("<") else repr(each.default)
        default = "" if each.default is each.empty else f" = {value}"
        shown.append(f"{each.name}: {each.annotation}{default}")
    returns = "" if inspect.isclass(thing) else f" -> {found.return_annotation}"
    lines = "".join(f"    {each},\n" for each in shown)
    return f"{name}({', '.join(shown)}){returns}" if len(shown) < 4 else f"{name}(\n{lines}){returns}"


if __name__ == "__main__":
    head, _, _ = PAGE.read_text(encoding="utf-8").partition(MADE_BELOW)
    PAGE.write_text(f"{head}{MADE_BELOW}\n{reference()}", encoding="utf-8")
