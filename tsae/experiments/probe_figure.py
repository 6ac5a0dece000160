"""The picture of the probes: accuracy against the number of features, for each split and the residual stream."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tsae import plotting
from tsae.checkpoint import BASELINE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DODGE = 0.07
"""Distance of the splits' markers, which may lie on one another."""
SERIES = {"high-level": 0, "low-level": 1, "all latents": 2, "residual stream": 3}
"""Split → colour and marker."""


def draw_curves(results: dict[str, Any], path: Path) -> None:
    """A panel for each task: this result, those beside it that were made alike, and the controls."""
    shown = [results, *_others(results, path)]
    shown.sort(key=lambda entry: SERIES[entry["split"]])
    tasks = results["tasks"]
    with plotting.figure(path, 1, len(tasks), (3.5 * len(tasks), 3.5), sharey=True) as (figure, panels):
        for axes, (name, task) in zip(panels, tasks.items(), strict=True):
            for entry in shown:
                _curve(axes, entry["tasks"][name], entry["split"], entry is results)
            _controls(axes, task)
            _frame(axes, name, task)
        panels[0].set_ylabel("Balanced accuracy on held-out tokens")
        handles = {label: handle for handle, label in zip(*panels[0].get_legend_handles_labels(), strict=True)}
        figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=len(handles))
        subject, texts = results["subject"], results["texts"]
        protocol = "" if results["settings"]["protocol"] == "disjoint" else ", the released code's protocol"
        figure.suptitle(
            f"{subject['run']}: probes on {subject['model']} layer {subject['layer']}, {texts['dataset']}{protocol}\n"
            f"mean and 95 % interval over {results['settings']['seeds']} splits of the texts",
            fontsize=9,
            x=0.01,
            ha="left",
        )


def _others(results: dict[str, Any], path: Path) -> list[dict[str, Any]]:
    """The other splits of the run, and the residual stream beside it, if probed on the same texts in the same way."""
    beside = sorted(
        path.parent.glob(f"{path.stem.split('_chunk')[0]}_chunk?{path.stem.partition('_chunk')[2][1:]}.json")
    )
    dense = path.parent.parent.parent / BASELINE / path.parent.name / f"{path.stem.split('_chunk')[0]}_chunk2.json"
    found, splits = [], {results["split"]}
    for other in (*beside, dense):
        if not other.is_file():
            continue
        entry = json.loads(other.read_text())
        alike = all(entry.get(key) == results[key] for key in ("settings", "experiment"))
        same = all(entry["subject"][key] == results["subject"][key] for key in ("model", "layer"))
        texts = all(entry["texts"][key] == results["texts"][key] for key in ("dataset", "classes"))
        if alike and same and texts and entry["split"] not in splits:
            found.append(entry)
            splits.add(entry["split"])
    return found


def _curve(axes: Axes, task: dict[str, Any], split: str, own: bool) -> None:
    probes = task["probes"]
    mean = [entry["balanced_accuracy"] for entry in probes]
    half = [_number(entry["balanced_accuracy_half_width"]) for entry in probes]
    series = SERIES[split]
    # Probes on all features are no continuation of the curve, so the line ends before them.
    sparse = [entry["features"] != "all" for entry in probes].count(True)
    for part, label in ((slice(0, sparse), split), (slice(sparse, None), None)):
        positions = [place + (series - 1.5) * DODGE for place in range(len(probes))][part]
        plotting.draw_interval(axes, positions, mean[part], half[part], series=series, label=label)
    for line in axes.get_lines()[-2:]:
        line.set_linewidth(2.0 if own else 1.1)


def _controls(axes: Axes, task: dict[str, Any]) -> None:
    probes = task["probes"]
    shuffled = [entry["shuffled_balanced_accuracy"] for entry in probes]
    axes.plot(range(len(probes)), shuffled, color="#888888", linestyle=":", marker=".", label="shuffled labels")
    axes.axhline(task["majority_balanced_accuracy"], color="#888888", linestyle="--", linewidth=1, label="majority")


def _frame(axes: Axes, name: str, task: dict[str, Any]) -> None:
    axes.set_title(f"{name}: {len(task['classes'])} classes", pad=14)
    axes.text(0, 1.01, task["labels"], transform=axes.transAxes, fontsize=7, color="#555555", va="bottom")
    axes.set_xticks(range(len(task["probes"])), [str(entry["features"]) for entry in task["probes"]])
    axes.set_xlabel("Features of a probe")
    axes.set_xlim(-0.5, len(task["probes"]) - 0.5)
    axes.set_ylim(0, 1)


def _number(value: float | None) -> float:
    return float("nan") if value is None else value
