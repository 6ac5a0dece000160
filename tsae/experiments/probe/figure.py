"""The picture of the probes: accuracy against the number of features, for each split and the residual stream."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tsae import __version__, plotting
from tsae.checkpoint import BASELINE
from tsae.config import schema
from tsae.runtime import metadata

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DODGE = 0.07
"""Distance of the splits' markers, which may lie on one another."""
MOST_RUNS = 5
SERIES = {split: number for number, split in enumerate((*plotting.SPLITS, "residual stream"))}
"""Split → colour and marker."""


def draw_curves(results: dict[str, Any], path: Path) -> None:
    """A panel for each task: this run's splits, the residual stream, the controls; below, other runs' same split.

    Only results beside this one that were made on the same texts in the same way are shown, as far as there are any.
    A picture that shows all that already stays.
    """
    own = sorted([results, *splits_beside(results, path)], key=lambda entry: SERIES[entry["split"]])
    others = runs_beside(results, path)
    shown = schema.stable_hash([__version__, results, own, others])
    if plotting.made_from(path) == shown:
        return
    tasks = results["tasks"]
    rows = 2 if others else 1
    with plotting.figure(
        path, rows, len(tasks), (3.5 * len(tasks), 3.2 * rows + 0.3), made_from=shown, sharey=True
    ) as (figure, panels):
        for axes, (name, task) in zip(panels, tasks.items(), strict=False):
            for entry in own:
                _curve(axes, entry["tasks"][name], SERIES[entry["split"]], entry["split"], entry is results)
            _controls(axes, task)
            _frame(axes, f"{name}: {len(task['classes'])} classes", task["labels"], task)
        for axes, (name, task) in zip(panels[len(tasks) :], tasks.items(), strict=False):
            for series, entry in enumerate([results, *others]):
                _curve(axes, entry["tasks"][name], series, entry["subject"]["run"], entry is results)
            _controls(axes, task)
            _frame(axes, f"{name}, {results['split']}", "runs beside this one", task)
        for row in range(rows):
            first, last = panels[row * len(tasks)], panels[(row + 1) * len(tasks) - 1]
            first.set_ylabel("Balanced accuracy\non held-out tokens")
            handles, labels = first.get_legend_handles_labels()
            last.legend(handles, labels, loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=7.5)
        subject, texts = results["subject"], results["texts"]
        protocol = "" if results["settings"]["protocol"] == "disjoint" else ", the released code's protocol"
        figure.suptitle(
            f"{subject['run']}: probes on {subject['model']} layer {subject['layer']}, {texts['dataset']}{protocol}; "
            f"mean and 95 % interval over {results['settings']['seeds']} splits",
            fontsize=9,
            x=0.01,
            ha="left",
        )


def splits_beside(results: dict[str, Any], path: Path) -> list[dict[str, Any]]:
    """The other splits of the run, and the residual stream beside it."""
    stem, _, ending = path.stem.partition("_chunk")
    beside = [path.with_name(f"{stem}_chunk{chunk}{ending[1:]}.json") for chunk in (0, 1, 2)]
    dense = path.parent.parent.parent / BASELINE / path.parent.name / f"{stem}_chunk2.json"
    found: dict[str, dict[str, Any]] = {}
    for entry in _alike(results, [*beside, dense]):
        found.setdefault(entry["split"], entry)
    found.pop(results["split"], None)
    return list(found.values())


def runs_beside(results: dict[str, Any], path: Path) -> list[dict[str, Any]]:
    """The same split of the other runs in the folder of runs, the first few of them by name."""
    pattern = f"*/{path.parent.name}/{path.stem}.json"
    others = sorted(other for other in path.parent.parent.parent.glob(pattern) if other.parent != path.parent)
    alike = (entry for entry in _alike(results, others) if entry["split"] == results["split"])
    return list(itertools.islice(alike, MOST_RUNS))


ALIKE = {
    **{"experiment": str, "split": str, "settings": (None, dict)},
    **{"subject": {"model": object, "layer": object}, "texts": {"dataset": object, "classes": object}},
}
"""What is read of the results beside those that are drawn."""


def _alike(results: dict[str, Any], paths: list[Path]) -> Iterator[dict[str, Any]]:
    """Results that were made on the same texts in the same way."""
    for path in paths:
        entry = metadata.whole(path, ALIKE)
        if not entry:
            continue
        alike = all(entry.get(key) == results[key] for key in ("settings", "experiment"))
        same = all(entry["subject"][key] == results["subject"][key] for key in ("model", "layer"))
        if alike and same and all(entry["texts"][key] == results["texts"][key] for key in ("dataset", "classes")):
            yield entry


def _curve(axes: Axes, task: dict[str, Any], series: int, name: str, own: bool) -> None:
    probes = task["probes"]
    mean = [entry["balanced_accuracy"] for entry in probes]
    half = [_number(entry["balanced_accuracy_half_width"]) for entry in probes]
    # Probes on all features are no continuation of the curve, so the line ends before them.
    sparse = [entry["features"] != "all" for entry in probes].count(True)
    for part, label in ((slice(0, sparse), name), (slice(sparse, None), None)):
        positions = [place + (series - 1.5) * DODGE for place in range(len(probes))][part]
        plotting.draw_interval(axes, positions, mean[part], half[part], series=series, label=label)
    for line in axes.get_lines()[-2:]:
        line.set_linewidth(2.0 if own else 1.1)


def _controls(axes: Axes, task: dict[str, Any]) -> None:
    probes = task["probes"]
    shuffled = [entry["shuffled_balanced_accuracy"] for entry in probes]
    axes.plot(range(len(probes)), shuffled, color="#888888", linestyle=":", marker=".", label="shuffled labels")
    axes.axhline(task["majority_balanced_accuracy"], color="#888888", linestyle="--", linewidth=1, label="majority")


def _frame(axes: Axes, title: str, note: str, task: dict[str, Any]) -> None:
    axes.set_title(title, pad=14)
    axes.text(0, 1.01, note, transform=axes.transAxes, fontsize=7, color="#555555", va="bottom")
    axes.set_xticks(range(len(task["probes"])), [str(entry["features"]) for entry in task["probes"]])
    axes.set_xlabel("Features of a probe")
    axes.set_xlim(-0.5, len(task["probes"]) - 0.5)
    axes.set_ylim(0, 1)


def _number(value: float | None) -> float:
    return float("nan") if value is None else value
