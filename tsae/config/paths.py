"""Paths in settings: relative ones mean the folder of the YAML that has them, on a command line the working directory.

From there on they are absolute; hashes and names know them by the words in which they were given, so that a project keeps
its runs when it moves.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

log = logging.getLogger("tsae")
MODEL_FILES = ("config.json", "*.gguf")
"""What makes a folder one of a language model."""


@dataclass(frozen=True)
class Place:
    """`Annotated[str, Place()]`: text that may name a file or folder; anything else if none is there."""

    names: Sequence[str] = ()
    """Words that mean something else, whatever files are there."""
    holds: tuple[str, ...] = ()
    """Glob patterns: a folder must hold such a file, or a file be called so, to be meant; none: anything is."""
    ending: str | None = None
    """What ends so is a path, there or not."""
    always: bool = False
    """Whether nothing but a path is meant, there or not."""

    def is_at(self, path: Path) -> bool:
        """Whether something lies at `path` that can be meant."""
        # os.path, for which a passage of text that is too long for a name is nowhere.
        if not self.holds:
            return os.path.exists(path)
        if os.path.isfile(path):
            return any(map(path.match, self.holds))
        return os.path.isdir(path) and any(True for pattern in self.holds for _ in path.glob(pattern))

    def is_path(self, value: str) -> bool:
        """Whether `value` is a path whatever is there."""
        return (
            self.always or value.startswith(("./", "../")) or (self.ending is not None and value.endswith(self.ending))
        )


class Located(str):
    """An absolute path, and the words in which it was given."""

    written: str

    def __new__(cls, path: str, written: str = "") -> Located:
        made = super().__new__(cls, path)
        made.written = written
        return made


def as_written(value: Any) -> Any:
    """A setting's value in the words in which it was given."""
    return value.written if isinstance(value, Located) else value


def located(value: Any, folder: Path, place: Place) -> Any:
    """The path that a relative one in a YAML of `folder` means; of a list, those of its items.

    What is not there is looked for in the working directory, which was the rule up to version 3195aa1.
    """
    if isinstance(value, (list, tuple)):
        return [located(item, folder, place) for item in value]
    if not isinstance(value, str) or not value or value in place.names or value.startswith(("/", "~")):
        return value
    found = [base for base in (folder, Path.cwd()) if place.is_at(base / value)]
    if not found and not place.is_path(value):
        return value
    if len(found) == 2 and not os.path.samefile(found[0] / value, found[1] / value):
        log.warning("%s: there is one in %s and one in %s; the first is taken", value, *found)
    return Located(os.path.abspath(((*found, folder)[0]) / value), value)


def restored(value: Any, written: Any) -> Any:
    """An absolute path from a resolved file with the words in which it was `written`, where these can be its own."""
    if isinstance(value, list) and isinstance(written, list) and len(value) == len(written):
        return [restored(*pair) for pair in zip(value, written, strict=True)]
    if not isinstance(value, str) or not isinstance(written, str):
        return value
    end = [part for part in PurePath(os.path.normpath(written)).parts if part != os.pardir]
    return Located(value, written) if list(PurePath(value).parts[-len(end) :]) == end or not end else value
