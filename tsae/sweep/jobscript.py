"""What may stand in the script of a job: words for the scheduler, and nothing of a file that a shell would run.

A line of options (`#SBATCH`, `#$`) has no quoting that every scheduler understands, and ends where a value has a line
break. So what is no plain word is refused, by the types below: where a file is read, and again by each `Order`, for
values that came another way. Paths and the values of variables are quoted instead. Only `setup` is shell.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any

from tsae.config.bounds import Bound
from tsae.runtime.secrets import is_secret_name

SIGNS = "letters, digits and . , : = @ + * & | ! ? ( ) [ ] / % _ -, with no - in front"
OPTION = f"allowed: {SIGNS}"
_WORD = r"(?!-(?!\d))[\w.,:=@+*&|!?()\[\]/%-]+"
_WORDS = re.compile(f"{_WORD}( {_WORD})*")
_OPTION = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")
_RUNS = re.compile(r"wra.*|export[-_].+|S|b|v|jsv")
"""Options that name what is run, or set variables: BASH_ENV of a job is run by its shell. (`wra` is short for `wrap`.)"""
_OURS = re.compile(
    r"(?x) array | output | error | job-name | dependency | signal | open-mode | ntasks-per-node | cpus-per-task"
    r" | [aoeJdcNtj] | tc | cwd | notify | hold-jid (-ad)?"
)
"""Options that every script of ours has already: with two of one kind, a job would run in parts, or write where nobody looks."""
_VARIABLE = re.compile(r"(?!(BASH_ENV|ENV)$)[A-Za-z_][A-Za-z0-9_]*")
_BREAKS = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def is_option(text: str) -> bool:
    """Whether `text` may be the value of an option of the scheduler."""
    return re.fullmatch(_WORD, text) is not None


def _are_options(extra: Mapping[Any, Any]) -> bool:
    return all(
        isinstance(name, str)
        and _OPTION.fullmatch(name)
        and not _RUNS.fullmatch(name)
        and not _OURS.fullmatch(name.replace("_", "-"))
        and not (name == "export" and "=" in str(value))
        and (value is None or _WORDS.fullmatch(str(value)))
        for name, value in extra.items()
    )


def _are_variables(environment: Mapping[Any, Any]) -> bool:
    return all(
        isinstance(name, str)
        and _VARIABLE.fullmatch(name)
        and not is_secret_name(name)
        and isinstance(value, str | int | float)
        and not isinstance(value, bool)
        for name, value in environment.items()
    )


Option = Annotated[str, Bound(is_option, OPTION)]
"""The value of an option of the scheduler."""
Options = Annotated[
    dict[str, Any],
    Bound(
        _are_options,
        "allowed: names of options without dashes, but of none that sets variables or what is run, and none that tsae sets itself "
        "(array, output, job-name, …), each with true, false, "
        f"a number, or words of {SIGNS}",
    ),
]
"""Further options of the scheduler, by their names."""
Variables = Annotated[
    dict[str, Any],
    Bound(
        _are_variables,
        "allowed: text or a number (true and false in quotes) for names such as NCCL_DEBUG; not BASH_ENV, and no keys, which "
        "scripts would show: a job has those of the shell that submits it",
    ),
]
"""Variables of a job."""


def is_one_line(text: str) -> bool:
    """Whether `text` has no line break or other control character, and can be written down at all."""
    return _BREAKS.search(text) is None
