"""The report's figure of the splits while they were trained: alive, share of the activity and variance explained alone."""

from __future__ import annotations

import textwrap
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING

from tsae import plotting
from tsae.config.run import RunConfig
from tsae.evaluation.measures import Chart
from tsae.report.summary import Summary
from tsae.runtime import metadata
from tsae.training.splits import ALIVE, LINE

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes

MOST_COLUMNS = 5
"""Settings that get a column each; the runs of more are drawn over each other."""
MOST_LINES = 200
"""Lines of one metrics.jsonl that a curve is made of."""
TITLE = 26
"""Characters of a column's title that fit above it."""
RANGE = (-0.05, 1.03)
"""Of every panel; untrained dictionaries explain far less than nothing."""
PANELS = {"alive": "alive", "share": "share of activity", "fve": "FVE alone"}
CAPTION = (
    "Each split at every logged line of its training, a line for each run: the share of its latents that is alive "
    f"(dotted: {ALIVE:g}, below which a training warns), its share of the activity (dotted: its share of the latents) and "
    "the fraction of variance that it explains alone, on the batch."
)

ALL = plotting.SPLITS.index("all latents")

Curve = list[dict[str, float]]


def draw_training(summary: Summary, folder: Path) -> list[tuple[Chart, Path]]:
    """Write training.png into `folder`, if the runs with results have left lines of their training."""
    paths = {row.point.name: run.metrics for row, run in zip(summary.rows, summary.compared.runs, strict=True)}
    columns: dict[str, list[tuple[RunConfig, Curve]]] = {}
    for group in summary.groups:
        curves = [(row.point.config, _read(paths[row.point.name])) for row in group.rows if not row.missing]
        if any(curve for _, curve in curves):
            columns[summary.name(group, summary.telling)] = curves
    if not columns:
        return []
    from matplotlib.ticker import EngFormatter

    if len(columns) > MOST_COLUMNS:
        columns = {f"all {len(columns)} settings": [run for runs in columns.values() for run in runs]}
    path, size = folder / "training.png", (1.6 + 2.2 * len(columns), 5.4)
    with plotting.figure(path, len(PANELS), len(columns), size, sharex="col", sharey="row", also=plotting.PRINT) as (
        drawn,
        panels,
    ):
        labelled: dict[str, Artist] = {}
        for place, axes in enumerate(panels):
            measure, (name, runs) = list(PANELS)[place // len(columns)], list(columns.items())[place % len(columns)]
            for config, curve in runs:
                _draw(axes, config, curve, measure)
            handles, labels = axes.get_legend_handles_labels()
            labelled |= {str(label): handle for handle, label in zip(handles, labels, strict=True)}
            axes.set_ylim(*RANGE)
            if place < len(columns):
                axes.set_title(textwrap.fill(name, TITLE))
            if place % len(columns) == 0:
                axes.set_ylabel(PANELS[measure])
        for axes in panels[-len(columns) :]:
            axes.set_xlabel("tokens")
            axes.locator_params(axis="x", nbins=4)
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        order = sorted(labelled)
        drawn.legend([labelled[label] for label in order], order, loc="outside right upper")
    return [(Chart("training", "Splits in training", "", CAPTION), path)]


def _read(path: Path) -> Curve:
    """Lines of a metrics.jsonl, the last among them, without those that are damaged."""
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    drawn = [metadata.record(line, {"tokens": Real, **LINE}) for line in lines[-1 :: -(len(lines) // MOST_LINES + 1)]][
        ::-1
    ]
    return [line for line in drawn if line is not None]


def _draw(axes: Axes, config: RunConfig, curve: Curve, measure: str) -> None:
    """One measure of a run; each split has the colour that it has in the report's other figures."""
    fractions = config.sae.fractions
    names = [f"{'low' if group else 'high'}-level (group {group})" for group in range(len(fractions))]
    if len(fractions) == 1:
        names = ["all latents"]
    elif measure == "fve":
        _line(axes, [(line["tokens"], line["fve"]) for line in curve], ALL, "all latents")
    for group, name in enumerate(names):
        key = "fve" if len(names) == 1 and measure == "fve" else f"{measure}_{group}"
        # Groups beyond the paper's two take the colours after that of all latents.
        number = ALL if len(names) == 1 else group + (group >= ALL)
        # Lines of older versions have not all of them.
        _line(axes, [(line["tokens"], line[key]) for line in curve if key in line], number, name)
        if measure == "share" and len(names) > 1:
            axes.axhline(fractions[group], color=_colour(number), linestyle=":", linewidth=0.9, zorder=1)
    if measure == "alive":
        axes.axhline(ALIVE, color="#777777", linestyle=":", linewidth=0.9, zorder=1)


def _line(axes: Axes, points: list[tuple[float, float]], number: int, label: str) -> None:
    if points:
        axes.plot(*zip(*points, strict=True), color=_colour(number), linewidth=1.1, alpha=0.8, label=label)


def _colour(number: int) -> str:
    return plotting.PALETTE[number % len(plotting.PALETTE)]
