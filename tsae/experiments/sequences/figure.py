"""The picture of `tsae sequences`: latents over one spliced context, and the scores over many."""

from __future__ import annotations

import itertools
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tsae import plotting
from tsae.evaluation.statistics import Interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SHARES = {
    "phase_auc": "phase AUC",
    "phase_information": "phase information",
    "top_persistence": "persistence, top",
    "persistence": "persistence, all",
    "change_point_f1": "change-point F1",
    "leakage": "leakage",
}
SERIES = {"scores": "this split", "smoothest_latents": "smoothest of all latents", "one_text": "split, one text"}
SHADES = ("#F3F3F3", "#E3E3E3")


def draw_figure(results: dict[str, Any], path: Path) -> None:
    """The first context of `results` beside the scores with their controls."""
    rows = max(len(results["contexts"][0]["top"]), 4)
    size = (11.5, 0.42 * rows + 1.5)
    with plotting.figure(path, 1, 2, size, gridspec_kw={"width_ratios": [3.1, 1]}) as (_drawn, axes):
        about = results["subject"]
        draw_latents(axes[0], results["contexts"][0])
        axes[0].set_title(f"{about['run']}, {results['split']} ({about['model']}, layer {about['layer']})", pad=18)
        _draw_scores(axes[1], results)


def draw_latents(axes: Axes, context: dict[str, Any]) -> None:
    """One ridge per latent against the token index, each scaled to its own maximum, over the shaded passages."""
    edges = [*context["starts"], len(context["tokens"])]
    for index, (start, end) in enumerate(itertools.pairwise(edges)):
        axes.axvspan(start, end, color=SHADES[index % 2], linewidth=0, zorder=0)
        name = textwrap.shorten(context["passages"][index], 26, placeholder="…")
        axes.text((start + end) / 2, 1.01, name, ha="center", va="bottom", transform=axes.get_xaxis_transform())
    for row, latent in enumerate(context["top"]):
        values, base = unpacked(context, latent), -float(row)
        peak, colour = float(values.max()), plotting.PALETTE[row % len(plotting.PALETTE)]
        heights = base + 0.88 * values / (peak or 1)
        axes.fill_between(np.arange(len(values)), base, heights, step="mid", color=colour, alpha=0.35, linewidth=0)
        axes.step(np.arange(len(values)), heights, where="mid", color=colour, linewidth=0.9)
    axes.set_yticks(
        [0.3 - row for row in range(len(context["top"]))], [_label(context, latent) for latent in context["top"]]
    )
    axes.tick_params(axis="y", length=0)
    axes.grid(False)
    axes.set_xlim(0, len(context["tokens"]))
    axes.set_ylim(-len(context["top"]) + 0.95, 1.0)
    axes.set_xlabel("token")


def unpacked(context: dict[str, Any], latent: int) -> np.ndarray:
    """A latent's activations over the tokens of a context; zeros where it is silent."""
    values = np.zeros(len(context["tokens"]))
    for word in context["activations"].get(str(latent), "").split():
        position, _, value = word.partition(":")
        values[int(position)] = float(value)
    return values


def _label(context: dict[str, Any], latent: int) -> str:
    peak = float(unpacked(context, latent).max())
    if not peak:
        return f"{latent} (silent here)"
    explanation = context["explanations"].get(str(latent), "")
    return "\n".join(
        [textwrap.shorten(explanation, 34, placeholder="…")] * bool(explanation) + [f"{latent}, max {peak:.3g}"]
    )


def _draw_scores(axes: Axes, results: dict[str, Any]) -> None:
    """Shares with their intervals, a row for each; the lag, which is in tokens, is written below."""
    lags = []
    for series, (key, label) in enumerate(SERIES.items()):
        if results[key] is None:
            continue
        scores = results[key] if key == "scores" else results[key]["scores"]
        mean, low, high = (np.array([_float(scores[name][part]) for name in SHARES]) for part in Interval._fields)
        axes.errorbar(
            mean,
            -np.arange(len(SHARES)) - 0.2 * (series - 1),
            xerr=np.nan_to_num([mean - low, high - mean]),
            color=plotting.PALETTE[series],
            marker=plotting.MARKERS[series],
            linestyle="none",
            markeredgecolor="white",
            markeredgewidth=0.5,
            capsize=2,
            elinewidth=1.1,
            label=label,
        )
        lags.append(f"{_float(scores['boundary_lag']['mean']):.1f}")
    axes.set_yticks([-row for row in range(len(SHARES))], list(SHARES.values()))
    axes.set_xlim(0, 1)
    axes.set_ylim(-len(SHARES) + 0.5, 0.5)
    axes.set_title(f"{results['splices']} splices, 95 % intervals")
    axes.set_xlabel(f"boundary lag (tokens): {' / '.join(lags)}")
    axes.legend(loc="upper center", bbox_to_anchor=(0.3, -0.12), handletextpad=0.3, borderpad=0)


def _float(value: float | None) -> float:
    return float("nan") if value is None else value
