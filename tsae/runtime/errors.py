"""The one exception that reaches a user as a single line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class TsaeError(Exception):
    """Bad input or a damaged file: one line that says what is wrong, where, and what would be right.

    The command line prints it without a traceback and exits with code 2.
    """

    def __str__(self) -> str:
        return " ".join(" ".join(str(arg) for arg in self.args).split())


class BrokenOff(TsaeError):
    """What is outside broke off, such as a network: the same command continues."""


def os_error_line(error: OSError, home: object) -> str:
    """What the operating system refused, and where: a full disk, a folder that may not be written, a bad path."""
    place = error.filename or f"a file under TSAE_HOME ({home})"  # a write that fails names no file
    return f"{place}: {error.strerror or error}; nothing that was complete is lost, and the same command continues"


SLIP = 0.93
"""The likeness of a name to itself with a slip of the pen, for names of which others that are near mean other things."""


def suggestion(word: object, allowed: Iterable[str], likeness: float = 0.5) -> str:
    """`did you mean 'x'? ` for the nearest allowed name, else the empty string."""
    near = difflib.get_close_matches(str(word), list(allowed), n=1, cutoff=likeness)
    return f"did you mean '{near[0]}'? " if near else ""
