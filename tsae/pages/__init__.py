"""The project's pages: jinja2 templates over one frame and one stylesheet, each a single file that loads nothing else."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jinja2 import Environment

PACKAGE = Path(__file__).resolve().parents[1]


def render(template: str, **values: Any) -> str:
    """The page of `template`, a path below tsae/ such as "report/page.html", with `values` escaped where they stand.

    A template extends "pages/base.html" (blocks: style, content, script; value: title). Data for a script are
    `{{ data | tojson }}` inside <script type="application/json">, which nothing in a text can end.
    A name that is not among `values` is an error.
    """
    return _environment().get_template(template).render(values)


@cache
def _environment() -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(PACKAGE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    # Keys in the order in which they were given, and letters as they are: the page says that it is UTF-8. Of numbers that are
    # none a browser would read nothing at all.
    environment.policies["json.dumps_kwargs"] = {"sort_keys": False, "ensure_ascii": False, "allow_nan": False}
    return environment
