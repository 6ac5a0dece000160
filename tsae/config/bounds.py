"""What a setting's value may be: stands in the type of its field, so that every section is checked wherever it is read.

batch_size: Count = 64                 a whole number from 1
lr: Positive | None = None             a number above 0, or nothing
features: tuple[Count, ...] = (1, 5)   each of them
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any


@dataclass(frozen=True)
class Bound:
    """`Annotated[int, Bound(…)]`: which values are possible, and what to say of one that is not."""

    holds: Callable[[Any], bool]
    words: str
    """Follows `<key path>: <value> is impossible; `."""


@dataclass(frozen=True)
class OneOf:
    """`Annotated[str, OneOf(table)]`: text that must be a key of `table`, one of those that it then has."""

    table: Mapping[str, Any]


@dataclass(frozen=True)
class Added:
    """`Annotated[int, Added(0)]`: a setting that came later and means what was before it where it has this value.

    It is then left out of hashes: an upgrade that brings a setting costs nobody a run or a harvest.
    """

    neutral: Any


def at_least(least: float) -> Bound:
    """Numbers from `least` on."""
    return Bound(lambda value: value >= least, f"it must be at least {least}")


def above(least: float) -> Bound:
    """Numbers above `least`."""
    return Bound(lambda value: value > least, f"it must be greater than {least}")


def matching(pattern: str, words: str) -> Bound:
    """Text that a regular expression matches from end to end."""
    return Bound(lambda value: re.fullmatch(pattern, value) is not None, words)


def some(words: str) -> Bound:
    """Lists with an item in them."""
    return Bound(lambda value: len(value) > 0, words)


SEEDS = 2**63

Count = Annotated[int, above(0)]
Natural = Annotated[int, at_least(0)]
Positive = Annotated[float, above(0)]
NonNegative = Annotated[float, at_least(0)]
Fraction = Annotated[float, Bound(lambda value: 0 < value < 1, "a fraction between 0 and 1 is allowed")]
Probability = Annotated[float, Bound(lambda value: 0 <= value <= 1, "a number from 0 to 1 is allowed")]
Seed = Annotated[int, Bound(lambda value: 0 <= value < SEEDS, "a whole number from 0 to 2^63 - 1 is allowed")]
SmallSeed = Annotated[int, Bound(lambda value: 0 <= value < 2**32, "a whole number from 0 to 2^32 - 1 is allowed")]
"""Of draws by numpy and scikit-learn, which take no larger one."""
Device = Annotated[str, matching(r"auto|cpu|mps|cuda(:\d+)?", "allowed: auto, cpu, cuda, cuda:N, mps")]
