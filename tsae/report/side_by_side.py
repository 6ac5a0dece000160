"""One report of runs from anywhere: `tsae compare RUN RUN …`. Only what was measured on the same is held against each other.

<out>/comparison.yaml  results.json  table.csv  table.md  report.html, and the figures
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tsae.checkpoint import RunFolder
from tsae.config import schema
from tsae.config.points import Point
from tsae.config.run import RunConfig, experiment_settings, store_settings, training_settings
from tsae.evaluation.identity import is_evaluated
from tsae.evaluation.measures import Chart
from tsae.experiments.driver import files_of
from tsae.experiments.registry import EXPERIMENTS
from tsae.report import text
from tsae.report.compared import Compared, ReportConfig
from tsae.report.figures import draw_experiments, draw_figures
from tsae.report.page import as_page
from tsae.report.summary import Row, Summary, summarise
from tsae.report.training import draw_training
from tsae.report.write import points_of
from tsae.runtime import files, metadata
from tsae.runtime.errors import TsaeError
from tsae.store import binding
from tsae.store.layout import store_path

RUN, MEASURED_ON = "run", "measured on"
SEED = re.compile(r",?(training\.)?seed=\d+")
MADE_ALIKE = ("model", "texts", "answers", "measures")
"""What experiments are made from, beside the run and their settings."""
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class Entry:
    """A run that somebody wants to compare."""

    name: str
    run: RunFolder
    config: RunConfig
    """By which it was measured."""


class NamedPoint(Point):
    """A run under a name of its own: settings of runs from elsewhere are not known, so that they tell nothing apart."""

    def value(self, key: str) -> Any:
        """The setting at key path `key`, or what a person calls the run."""
        return self.axes[key] if key in self.axes else super().value(key)


@dataclass(frozen=True)
class Written:
    """What a comparison says."""

    page: Path
    lines: list[str]
    """Tables and remarks for the terminal."""


def write_comparison(entries: Sequence[Entry], folder: Path) -> Written:
    """Write the comparison of `entries` into `folder`. Raises TsaeError where none of them is measured."""
    done = [entry for entry in entries if is_evaluated(entry.config, entry.run)]
    if not done:
        raise TsaeError(
            f"{entries[0].run.path}: nothing to compare: none of the runs is measured; {_how(entries[0], [])}"
        )
    folder.mkdir(parents=True, exist_ok=True)
    origin = folder / "comparison.yaml"
    files.write_text(origin, yaml.safe_dump({entry.name: str(entry.run.path) for entry in entries}, sort_keys=False))
    worlds: dict[str, list[Entry]] = {}
    for entry in done:
        worlds.setdefault(
            schema.stable_hash([_tree(entry), binding.measured_data(entry.run, entry.config)]), []
        ).append(entry)
    alike = {LETTERS[number % 26] * (number // 26 + 1): members for number, members in enumerate(worlds.values())}
    notes = [*_refusals(alike), *_not_measured(entries, done)]
    summaries: dict[str, Summary] = {}
    charts: list[tuple[Chart, Path]] = []
    for letter, members in alike.items():
        place = folder / letter if len(alike) > 1 else folder
        place.mkdir(exist_ok=True)
        summary, unlike = _comparable(summarise(_compared(members, place, origin)), members)
        summaries[letter] = summary
        drawn = [*draw_figures(summary, place), *draw_training(summary, place), *draw_experiments(summary, place)]
        where = f"Measured on {letter}: " if len(alike) > 1 else ""
        charts += [(dataclasses.replace(chart, caption=f"{where}{chart.caption}"), path) for chart, path in drawn]
        if unlike:
            notes.append((f"{where}left out, because made with different texts or settings:", ", ".join(unlike)))
    apart = {} if len(alike) == 1 else {f"{MEASURED_ON} {letter}": summary for letter, summary in summaries.items()}
    whole = _joined(summaries, folder, origin)
    page = whole.compared.page
    files.write_text(page.with_name("table.csv"), text.as_csv(whole))
    files.write_text(page.with_name("table.md"), text.as_markdown(whole))
    files.write_text(page, as_page(whole, charts, apart=apart, notes=notes))
    told = [f"{head} {what}" for head, what in notes]
    said = {"ranked": not apart, "notes": told}
    metadata.write(whole.compared.record, {"comparison": whole.compared.name, **said, "points": points_of(whole)})
    lines = []
    for letter, summary in summaries.items():
        lines += [f"{MEASURED_ON} {letter}:"] if apart else []
        lines += text.short_table(summary)
    return Written(page, [*lines, *told, *([] if apart else text.sentences(whole))])


def _tree(entry: Entry) -> dict[str, Any]:
    """The settings of what `entry` was measured on, and how."""
    how = schema.identity(entry.config.evaluation)
    del how["batch_size"]
    return {**store_settings(entry.config), "evaluation": how, "counted": entry.config.counted._asdict()}


def _refusals(alike: dict[str, list[Entry]]) -> list[tuple[str, str]]:
    """Why runs are not ranked; nothing where all were measured on the same."""
    if len(alike) == 1:
        return []
    (first, (model, *_)), *others = alike.items()
    parts = [f"{first} ({', '.join(entry.name for entry in alike[first])})"]
    for letter, members in others:
        names = ", ".join(entry.name for entry in members)
        what = schema.differences(_tree(model), _tree(members[0])) or "another content of the text or the model"
        parts.append(
            f"{letter} ({names}) differs from {first}: {what.replace(' there', f' in {first}').replace(' here', f' in {letter}')}"
        )
    return [("Not ranked, because measured on different things:", "; ".join(parts))]


def _not_measured(entries: Sequence[Entry], done: Sequence[Entry]) -> list[tuple[str, str]]:
    missing = [entry for entry in entries if entry not in done]
    return [("Not measured:", "; ".join(f"{entry.name}: {_how(entry, done)}" for entry in missing))] if missing else []


def _how(entry: Entry, done: Sequence[Entry]) -> str:
    """The command that measures `entry`; one from elsewhere, on what the first of the others was measured on."""
    on = f" store.path={store_path(done[0].config)}" if done and not entry.run.resolved.exists() else ""
    return f"tsae evaluate {entry.run.path}{on}"


def _compared(entries: Sequence[Entry], folder: Path, origin: Path) -> Compared:
    """The entries as points; those that differ in nothing but their seed are one setting."""
    settings = [_without_seed(entry) for entry in entries]
    count = Counter(settings)
    named = {setting: entry.name for setting, entry in reversed(list(zip(settings, entries, strict=True)))}
    points = []
    for entry, setting in zip(entries, settings, strict=True):
        axes: dict[str, Any] = {RUN: entry.name}
        if count[setting] > 1:
            axes = {RUN: SEED.sub("", named[setting]), "training.seed": entry.config.training.seed}
        points.append(NamedPoint(entry.name, axes, entry.config))
    return Compared(
        name="Comparison",
        points=tuple(points),
        runs=tuple(entry.run for entry in entries),
        folder=folder,
        settings=ReportConfig(x=RUN),
        origin=origin,
        base=origin,
        common=_tree(entries[0]),
    )


def _without_seed(entry: Entry) -> str:
    if not entry.run.resolved.exists():
        return entry.name
    tree = training_settings(entry.config)
    del tree["training"]["seed"]
    return schema.stable_hash(tree)


def _comparable(summary: Summary, entries: Sequence[Entry]) -> tuple[Summary, list[str]]:
    """The summary without experiments that were not made alike everywhere, and which those are."""
    made: dict[str, set[str]] = {}
    for entry in entries:
        for name in EXPERIMENTS:
            settings = experiment_settings(entry.config, name)
            for path in files_of(entry.run, entry.config, name):
                made_from = metadata.whole(path)["made_from"]
                own = [settings["experiment"], settings["texts"], *(made_from[key] for key in MADE_ALIKE)]
                made.setdefault(path.stem, set()).add(schema.stable_hash(own))
    unlike = [stem for stem, hashes in made.items() if len(hashes) > 1]

    def cut(row: Row) -> Row:
        known = {name: value for name, value in row.experiments.items() if name.partition("/")[0] not in unlike}
        return dataclasses.replace(row, experiments=known)

    groups = tuple(dataclasses.replace(group, rows=tuple(map(cut, group.rows))) for group in summary.groups)
    return dataclasses.replace(summary, rows=tuple(map(cut, summary.rows)), groups=groups), unlike


def _joined(summaries: dict[str, Summary], folder: Path, origin: Path) -> Summary:
    """All in one table, which says what each was measured on where that is not the same."""
    if len(summaries) == 1:
        return next(iter(summaries.values()))

    def told(row: Row, letter: str) -> Row:
        point = NamedPoint(row.point.name, {MEASURED_ON: letter, **row.point.axes}, row.point.config)
        return dataclasses.replace(row, point=point)

    rows = tuple(told(row, letter) for letter, summary in summaries.items() for row in summary.rows)
    groups = tuple(
        dataclasses.replace(
            group, axes={MEASURED_ON: letter, **group.axes}, rows=tuple(told(row, letter) for row in group.rows)
        )
        for letter, summary in summaries.items()
        for group in summary.groups
    )
    every = [summary.compared for summary in summaries.values()]
    compared = dataclasses.replace(
        every[0],
        points=tuple(row.point for row in rows),
        runs=tuple(run for one in every for run in one.runs),
        folder=folder,
        origin=origin,
        common={},
    )
    return Summary(compared, RUN, rows, groups)
