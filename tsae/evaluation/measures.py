"""What the numbers of a run are called, what they mean and where they are shown.

Each is declared once, beside the code that computes it; the report, the model card and the documentation read it here.
A new measure: `declare(Measure("my_measure", "Sharpness", "...", places=EVERYWHERE))` where its number is made.
Declaring modules load no torch, so that a report is quick.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal

from tsae.config.schema import markdown_row

FVE = "frac_variance_explained"
"""The measure that others are traded against."""
TRUTH = "truth_"
"""How measures begin that only a synthetic world has."""
REFERENCE = "reference "
"""How the columns of scores begin that only the block `reference` of the results is made of."""
NOT_MEASURES = frozenset({"contexts", "documents", "tokens", "tokens_left_out"})
"""Counts that say how much was measured."""

Place = Literal["summary", "terminal", "sentences", "differences", "effects", "trade-offs"]
EVERYWHERE: tuple[Place, ...] = ("summary", "terminal", "sentences", "differences", "effects", "trade-offs")


@dataclass(frozen=True)
class Chart:
    """One of the report's figures: its measures are lines over the swept value."""

    name: str
    title: str
    axis: str
    caption: str


@dataclass(frozen=True)
class Measure:
    """One number of a run."""

    key: str
    """Its name in eval_results.json, or `<file>/<name>` of an experiment's headline."""
    family: str
    """What it is called in tables, as the paper does."""
    formula: str
    """How it is made, in a line."""
    member: str = ""
    """What tells it from others of its family, which stand under one head."""
    unit: str = ""
    """Nothing for a ratio or a share."""
    better: Literal["higher", "lower", ""] = ""
    places: tuple[Place, ...] = ()
    """Where the report shows it, beside the tables of every measure."""
    chart: Chart | None = None
    line: str = "all latents"
    """The name of its line in the chart."""
    card: str = ""
    """Its name on a model card, where it stands on one."""
    rank: int = 0
    """Where there is room for few, the lower come first."""
    stands_for: str = ""
    """The measure in whose place it is shown where the truth is known."""
    name: str = ""
    """What a sentence calls it; by default its label."""
    version: int = 1
    """Raised when the number is computed in another way: results of an older version are made again. 0: the number was
    there before its declaration, which makes nothing again."""

    @property
    def label(self) -> str:
        """Its name in one line."""
        return f"{self.family} {self.member}".strip()


SPLITS = ((2, "all latents"), (0, "high-level"), (1, "low-level"))
"""Number of a split in the files of experiments, and its line in their charts."""


def of_splits(file: str, name: str, like: Measure) -> list[Measure]:
    """The headline number `name` of an experiment's `file` on each split; the places of `like` go to the high-level one."""
    return [
        dataclasses.replace(
            like,
            key=f"{file}_chunk{chunk}/{name}",
            family=f"{like.family}, {line.removesuffix('-level')}",
            places=like.places if chunk == 0 else (),
            line=line,
            name=f"{like.name} on {line if chunk == 2 else f'the {line} split'}" if like.name else "",
        )
        for chunk, line in SPLITS
    ]


REGISTRY: dict[str, Measure] = {}
"""Key → measure, in the order in which they are shown."""


def declare(*measures: Measure) -> None:
    """Make measures known. A key that is taken is an error."""
    for measure in measures:
        assert measure.key not in REGISTRY, f"{measure.key} is declared twice"
        REGISTRY[measure.key] = measure
    # Whoever was imported first: the evaluation's come before those of experiments.
    ordered = sorted(REGISTRY.items(), key=lambda entry: "/" in entry[0])
    REGISTRY.clear()
    REGISTRY.update(ordered)


def versions(file: str = "") -> dict[str, int]:
    """Key → version of the measures in eval_results.json, or of those in an experiment's `file`."""
    return {
        key: measure.version
        for key, measure in REGISTRY.items()
        if ("/" in key) == bool(file) and key.startswith(file) and measure.version
    }


def label(key: str) -> str:
    """A measure's name for people; one that nobody declared keeps its key."""
    return REGISTRY[key].label if key in REGISTRY else key


def with_unit(key: str) -> str:
    """A measure's name for people, with its unit where it has one."""
    unit = REGISTRY[key].unit if key in REGISTRY else ""
    return f"{label(key)} ({unit})" if unit and unit not in label(key) else label(key)


def in_words(key: str) -> str:
    """A measure's name in a sentence."""
    return (REGISTRY[key].name if key in REGISTRY else "") or label(key)


def shown_in(place: Place, available: Collection[str]) -> list[str]:
    """The keys of the available measures that have that place; tables keep the paper's measures whatever is known."""
    named = [key for key, measure in REGISTRY.items() if place in measure.places]
    if place not in ("summary", "differences"):
        named.sort(key=lambda key: REGISTRY[key].rank)
    if place not in ("summary", "terminal"):
        named = [instead_of(key, available) for key in named]
    return [key for key in named if key in available]


def instead_of(key: str, available: Collection[str]) -> str:
    """What is shown in the place of a measure where the truth is known: of FVE, the one pooled over all tokens.

    The paper's is a mean over contexts and misses what differs between them, which is where slow features show.
    """
    stands_in = (name for name, measure in REGISTRY.items() if measure.stands_for == key)
    return next(stands_in, key) if any(name.startswith(TRUTH) for name in available) else key


def help_text() -> str:
    """Every measure with its key, unit, direction and formula."""
    lines = []
    for measure in REGISTRY.values():
        better = measure.better and f"{measure.better} is better"
        lines.append(f"  {measure.label} ({', '.join(filter(None, (measure.key, measure.unit, better)))})")
        lines.append(f"      {measure.formula}")
    return "\n".join(lines)


def markdown() -> str:
    """All measures as a table of the documentation, a row for those of one family that are made in the same way."""
    rows: dict[tuple[str, str, str, str], list[Measure]] = {}
    for measure in REGISTRY.values():
        # Of experiments, the family says the split, too.
        family = measure.family.partition(", ")[0] if "/" in measure.key else measure.family
        rows.setdefault((family, measure.formula, measure.unit, measure.better), []).append(measure)
    lines = ["| Name | Of | Key | Unit | Better | Formula |", "|---|---|---|---|---|---|"]
    for (family, formula, unit, better), measures in rows.items():
        splits = [measure.family.removeprefix(family).removeprefix(", ") for measure in measures]
        members = [", ".join(filter(None, [one.member, split])) for one, split in zip(measures, splits, strict=True)]
        of = "; ".join(member or "all" for member in members)
        keys = ", ".join(f"`{measure.key}`" for measure in measures)
        lines.append(markdown_row(family, of, keys, unit, better, formula))
    return "\n".join(lines)


def in_order(available: Collection[str]) -> list[str]:
    """The keys of all available measures: the summary's first, the rest as they come."""
    first = shown_in("summary", available)
    return [*first, *(key for key in available if key not in first)]


def scalars(results: dict[str, Any]) -> dict[str, float]:
    """The measures of an eval_results.json that are single numbers, in order."""
    found = {
        name: float(value)
        for name, value in results.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool) and name not in NOT_MEASURES
    }
    return {name: found[name] for name in in_order(found)}
