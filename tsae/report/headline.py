"""What a command says last: the headline numbers of what it made, and where the pictures and pages of it are.

It is said on stderr, where progress is, so that stdout keeps to the paths of the results and a script may read them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tsae.checkpoint import RunFolder
from tsae.evaluation.measures import REGISTRY, label, scalars, shown_in
from tsae.experiments.registry import declare_measures
from tsae.report.text import aligned, with_interval
from tsae.runtime import metadata
from tsae.store.layout import StoreLayout
from tsae.store.reader import Store
from tsae.training.splits import last_line

PAGES = (("page", ".html"), ("picture", ".png"))
TRAINED = {"fve": "FVE", "l0": "L0", "share": "share of activity", "alive": "alive"}
"""Measures of a line of metrics.jsonl, whose splits have keys of their own, and what they are called."""

CHUNK = re.compile(r"_chunk\d")

Numbers = Mapping[str, tuple[float, float]]
"""Measure → value and the half-width of its 95 % interval, NaN where none was estimated."""


def of_evaluation(run: RunFolder) -> list[str]:
    """The few measures of eval_results.json that a terminal has room for, as the reports of sweeps show them."""
    results = run.read_results()
    values = scalars(results)
    shown = {name: (values[name], _half(results, name)) for name in shown_in("terminal", values)}
    about = f"{results['tokens']:,} held-out tokens in {results['contexts']:,} contexts; ± is the 95 % interval over documents"
    return [about, *_table({"": shown}), *_pages([run.eval_results])]


def of_experiment(paths: Sequence[Path]) -> list[str]:
    """The headline numbers of an experiment's results, split beside split. Nothing of results that have none."""
    declare_measures()
    every = [metadata.whole(path) for path in paths]
    columns: dict[str, dict[str, tuple[float, float]]] = {}
    for path, results in zip(paths, every, strict=True):
        column = columns.setdefault(results.get("split", ""), {})
        for name, value in results.get("headline", {}).items():
            if value is not None:
                # One row for all splits, which have columns.
                key = f"{CHUNK.sub('_chunk2', path.stem)}/{name}"
                column[key if key in REGISTRY else name] = (value, _half(results, name))
    notes = dict.fromkeys(results["headline_is"] for results in every if "headline_is" in results)
    return [*notes, *_table(columns), *_pages(paths)]


def of_harvest(path: Path) -> list[str]:
    """What the store at `path` holds; nothing while parts of it are missing."""
    return repr(Store.open(path)).splitlines() if StoreLayout(path).attributes["complete"] else []


def of_training(run: RunFolder) -> list[str]:
    """How the dictionary and its splits did on the last batch that was logged."""
    line = last_line(run.metrics)
    if not line:
        return []
    splits = sum(key.startswith("share_") for key in line)
    names = ["high-level", *(["low-level"] if splits == 2 else [f"group {group}" for group in range(1, splits)])]
    suffixes = {"all latents": "", **{name: f"_{group}" for group, name in enumerate(names) if splits > 1}}
    columns = {
        column: {
            name: (line[key + suffix], math.nan)
            for key, name in TRAINED.items()
            if math.isfinite(line.get(key + suffix, math.nan))
        }
        for column, suffix in suffixes.items()
    }
    about = f"step {line['step'] + 1:.0f}, on its batch: loss {line['loss']:.4g}"
    return [about, *_table(columns), f"what it is worth on held-out tokens: tsae evaluate {run.path.parent}"]


def _half(results: Mapping[str, Any], name: str) -> float:
    found = results.get("half_width_95", {}).get(name)
    return math.nan if found is None else float(found)


def _table(columns: Mapping[str, Numbers]) -> list[str]:
    """Measures as rows, with the direction that is better where one is; nothing where no column has any."""
    names = list(dict.fromkeys(name for numbers in columns.values() for name in numbers))
    if not names:
        return []
    rows = []
    for name in names:
        cells = [_cell(*numbers.get(name, (math.nan, math.nan))) for numbers in columns.values()]
        measure = REGISTRY.get(name)
        called = measure.member if measure and CHUNK.search(name) else label(name).replace("_", " ")
        remarks = [measure.unit, measure.better and f"{measure.better} is better"] if measure else []
        rows.append([called, *cells, ", ".join(filter(None, remarks))])
    head = ["", *columns, ""]
    return aligned([head, *rows] if any(head) else rows)


def _cell(mean: float, half: float) -> str:
    value, width = with_interval(mean, half)
    return f"{value} ± {width}" if width else value


def _pages(paths: Sequence[Path]) -> list[str]:
    """Where the pages beside results are; of results without one, the pictures."""
    for word, suffix in PAGES:
        found = [path.with_suffix(suffix) for path in paths if path.with_suffix(suffix).exists()]
        if found:
            return [f"{word}: {path}" for path in found]
    return []
