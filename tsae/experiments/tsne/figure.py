"""The picture of the map: the same points in three colourings."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tsae import plotting

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SHAPES = ("o", "^", "s")
NAMED = len(plotting.PALETTE) * len(SHAPES)
"""Classes that can be told apart by colour and shape."""


def draw_panels(results: dict[str, Any], path: Path) -> None:
    """A panel for each label, with its purity and silhouette in the original space."""
    drawn = results["map"]
    x, y = np.array(drawn["x"]), np.array(drawn["y"])
    middle = (x.min() + x.max()) / 2, (y.min() + y.max()) / 2
    reach = 0.53 * max(np.ptp(x), np.ptp(y), 1e-6)
    with plotting.figure(path, 1, 3, (12, 6)) as (figure, panels):
        _classes(panels[0], x, y, np.array(drawn["semantics"]), drawn["semantics_names"])
        _texts(panels[1], x, y, np.array(drawn["text"]))
        _classes(panels[2], x, y, np.array(drawn["syntax"]), drawn["syntax_names"])
        for axes, (name, entry) in zip(panels, results["colourings"].items(), strict=True):
            _caption(axes, name, entry)
            axes.set(xlim=(middle[0] - reach, middle[0] + reach), ylim=(middle[1] - reach, middle[1] + reach))
        subject, settings = results["subject"], results["settings"]
        figure.suptitle(
            f"{subject['run']}, {results['split']}: {len(x)} tokens of {len(drawn['tokens'])} texts "
            f"({results['texts']['dataset']}), {subject['model']} layer {subject['layer']}\n"
            f"{results['reduction']}; purity of {settings['neighbours']} neighbours and silhouette by cosine in the "
            f"original space, mean of {settings['seeds']} choices of texts",
            fontsize=9,
            x=0.01,
            ha="left",
        )


def _classes(axes: Axes, x: np.ndarray, y: np.ndarray, label: np.ndarray, names: list[str]) -> None:
    """Points by class, with a legend of those that are there, the frequent ones first; the rest is grey."""
    frequent = [
        name for name in np.argsort(-np.bincount(label[label >= 0], minlength=len(names))) if (label == name).any()
    ]
    shown = sorted(frequent[:NAMED])
    rest = ~np.isin(label, shown)
    left = "rarer or none" if len(frequent) > NAMED else "none"
    axes.scatter(x[rest], y[rest], s=5, color="#CCCCCC", linewidths=0, label=left if rest.any() else None)
    for number, name in enumerate(shown):
        colour = plotting.PALETTE[number % len(plotting.PALETTE)]
        shape = SHAPES[number // len(plotting.PALETTE)]
        mine = label == name
        axes.scatter(x[mine], y[mine], s=9, color=colour, marker=shape, linewidths=0, alpha=0.8, label=names[name])
    axes.legend(
        loc="upper center", bbox_to_anchor=(0.5, -0.02), ncols=3, fontsize=7.5, markerscale=2, handletextpad=0.2
    )


def _texts(axes: Axes, x: np.ndarray, y: np.ndarray, text: np.ndarray) -> None:
    """Points by text: neighbouring hues would not be told apart, so texts take turns through the circle of hues."""
    import matplotlib

    turns = text * 0.6180339887 % 1
    axes.scatter(x, y, s=9, c=matplotlib.colormaps["hsv"](turns), linewidths=0, alpha=0.8)
    axes.text(
        0.5,
        -0.05,
        "a colour for each text",
        transform=axes.transAxes,
        ha="center",
        va="top",
        fontsize=7.5,
        color="#444444",
    )


def _caption(axes: Axes, name: str, entry: dict[str, Any]) -> None:
    axes.set_title(name, pad=26)
    half = entry["purity_half_width"]
    interval = "" if half is None else f" ± {half:.2f}"
    silhouette = "of one class" if entry["silhouette"] is None else f"silhouette {entry['silhouette']:.2f}"
    caption = f"{entry['labels']}\npurity {entry['purity']:.2f}{interval} (chance {entry['chance']:.2f}), {silhouette}"
    axes.text(0, 1.01, caption, transform=axes.transAxes, fontsize=7.5, color="#444444", va="bottom")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.grid(False)
    axes.set_box_aspect(1)
    axes.set_anchor("N")
    axes.spines[["left", "bottom"]].set_visible(False)
