"""What stages that follow each other in one process make once: the language model that all of them read."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

Made = TypeVar("Made")

_kept: dict[str, tuple[Hashable, Any]] | None = None


@contextmanager
def keeping(wanted: bool) -> Iterator[None]:
    """Have `kept` keep things while the block runs, where that is `wanted`."""
    global _kept
    _kept = {} if wanted else None
    try:
        yield
    finally:
        _kept = None


def kept(what: str, key: Hashable, make: Callable[[], Made]) -> Made:
    """What `make` makes; in a process that keeps things, the `what` that was made last where that was for the same key."""
    if _kept is None:
        return make()
    if what not in _kept or _kept[what][0] != key:
        _kept.pop(what, None)  # before another one takes as much memory
        _kept[what] = key, make()
    made: Made = _kept[what][1]
    return made
