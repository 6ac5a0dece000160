"""A dictionary against the true features of the synthetic world it was trained on: synthetic.json and synthetic.png.

Three controls stand beside the dictionary. `post_hoc`: the same latents, split by their autocorrelation instead of by
their place; it tells whether training for placement was needed. `oracle`: a linear encoder that was told the truth.
`random`: as many untrained directions.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from tsae.checkpoint import RunFolder, load_dictionary
from tsae.config.run import RunConfig
from tsae.data.synthetic import Truth
from tsae.evaluation import recovery
from tsae.evaluation.recovery import Split
from tsae.evaluation.smoothness import active_code, smoothness, split_ranges
from tsae.plotting import MARKERS, PALETTE, figure
from tsae.runtime import metadata
from tsae.runtime.errors import TsaeError
from tsae.sae.dictionary import Dictionary
from tsae.store.layout import store_path
from tsae.store.reader import Store

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def measure_run(config: RunConfig, run: RunFolder) -> dict[str, Any]:
    """Measure the dictionary in `run` against the truth; write and return the results.

    Raises TsaeError if the run is not of a synthetic store.
    """
    if not config.is_synthetic:
        raise TsaeError(
            f"{run.path}: was trained on {config.data.source}, of which no truth is known; "
            "a run with data.source: synthetic is expected"
        )
    dictionary, _ = load_dictionary(run.path)
    return measure(config, run, dictionary, Store.open(store_path(config), config))


def measure(config: RunConfig, run: RunFolder, dictionary: Dictionary, store: Store) -> dict[str, Any]:
    """As `measure_run`, of a dictionary and a store that are open."""
    truth = store.truth()
    rows = np.asarray(store.heldout_range)[: config.evaluation.sequences]
    x = store.read(rows).float()[:, config.data.skip_positions :]
    features = torch.from_numpy(truth.features[: len(rows), config.data.skip_positions :])
    device = dictionary.b_dec.device
    with torch.no_grad():
        norms = dictionary.row_norms
        codes = torch.stack([(dictionary.encode(sequence.to(device)) * norms).cpu() for sequence in x])
    sizes = dictionary.group_sizes
    if len(sizes) == 1:
        # A dictionary without groups is judged by where its latents happen to lie.
        high = max(1, int(config.sae.split_fraction * dictionary.dict_size))
        sizes = (high, dictionary.dict_size - high)
    results = compare(truth, features, codes, x, dictionary.W_dec.cpu(), sizes)
    draw(results, run.result("synthetic", "png"))
    metadata.write(run.result("synthetic", "json"), results)
    return results


def summary(results: dict[str, Any]) -> str:
    """A few measures of the dictionary and its controls, for the terminal."""
    columns = ("slow", "slow_high", "fast_low", "disentanglement", "purity")
    lines = ["".join([" " * 12, *(f"{name:>17}" for name in columns)])]
    for code in ("dictionary", "post_hoc", "random", "oracle"):
        values = (results[code][name] for name in columns)
        lines.append("".join([f"{code:12}", *(f"{'–' if v is None else format(v, '.3f'):>17}" for v in values)]))
    return "\n".join(lines)


def compare(
    truth: Truth, features: Tensor, codes: Tensor, x: Tensor, decoder: Tensor, group_sizes: tuple[int, ...]
) -> dict[str, Any]:
    """All measures, as JSON.

    features [S, L, n], codes [S, L, F], activations x [S, L, D], decoder [F, D].
    """
    kinds = np.array(truth.group_names)[truth.group]
    slow, fast = np.char.startswith(kinds, "slow"), kinds == "fast"
    by_kind = tuple(np.flatnonzero(truth.group == kind) for kind in range(len(truth.group_names)))
    split = Split(recovery.groups_of(group_sizes), by_kind, slow, fast)
    active = float((features > 0).sum(-1).float().mean())
    oracle = recovery.oracle_codes(features, x, active)
    floor = recovery.random_codes(x, codes.shape[-1], active)
    post_hoc = split._replace(latents=recovery.split_by_time_scale(codes, group_sizes[0]))
    own = split._replace(latents=(np.flatnonzero(slow), np.flatnonzero(~slow)))
    cosines = np.nan_to_num(truth.directions @ torch.nn.functional.normalize(decoder, dim=1).numpy().T)
    similarity = recovery.correlations(features, codes)
    results = {
        "dictionary": {
            **_scores(features, codes, split, similarity),
            **{f"cosine_{name}": value for name, value in recovery.placement(cosines, split).items()},
            **_time_scales(codes, x, split, group_sizes),
        },
        "post_hoc": _scores(features, codes, post_hoc, similarity),
        "oracle": _scores(features, oracle, own, recovery.correlations(features, oracle)),
        "random": _scores(features, floor, split, recovery.correlations(features, floor)),
        "truth": {"persistence_slow": _mean(recovery.persistence(features)[slow]), "active": active},
        "kinds": list(truth.group_names),
        "group_sizes": list(group_sizes),
        "latents": _latents(codes, similarity, split, kinds),
        "sequences": len(x),
        "tokens": x.shape[0] * x.shape[1],
    }
    return _plain(results)


def _scores(features: Tensor, codes: Tensor, split: Split, similarity: np.ndarray) -> dict[str, Any]:
    """Placement, purity and linear readout of one partition of latents."""
    alive = np.asarray((codes > 0).flatten(0, 1).any(0))
    wanted = {"slow": torch.from_numpy(split.slow), "fast": torch.from_numpy(split.fast)}
    parts = {"high": torch.from_numpy(split.latents[0]), "low": torch.from_numpy(split.low)}
    return {
        **recovery.placement(similarity, split),
        "table": recovery.recovery_table(similarity, split),
        "purity": recovery.purity(similarity, split, alive),
        **{
            f"readout_{kind}_{part}": recovery.readout(features[..., rows], codes[..., latents])
            for kind, rows in wanted.items()
            for part, latents in parts.items()
        },
    }


def _time_scales(codes: Tensor, x: Tensor, split: Split, group_sizes: tuple[int, ...]) -> dict[str, Any]:
    """Persistence and the paper's smoothness (lower is smoother) of the high-level group and of the rest."""
    stays, ranges = recovery.persistence(codes), split_ranges(group_sizes)
    pairs = zip(codes, x, strict=True)
    steepest = torch.stack([smoothness(active_code(f), sequence, ranges).lipschitz for f, sequence in pairs])
    _, high, low, *_ = steepest.nanmean(0).tolist()
    return {
        "persistence_high": _mean(stays[split.latents[0]]),
        "persistence_low": _mean(stays[split.low]),
        "smoothness_high": high,
        "smoothness_low": low,
    }


def _latents(codes: Tensor, similarity: np.ndarray, split: Split, kinds: np.ndarray) -> dict[str, Any]:
    """Each latent's group, autocorrelation, best correlation and the kind of the feature that it is with."""
    group = np.zeros(codes.shape[-1], int)
    for number, latents in enumerate(split.latents):
        group[latents] = number
    return {
        "group": group.tolist(),
        "autocorrelation": recovery.autocorrelation(codes).tolist(),
        "correlation": similarity.max(0).tolist(),
        "kind": kinds[similarity.argmax(0)].tolist(),
    }


def _mean(values: np.ndarray) -> float:
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else math.nan


def _plain(value: Any) -> Any:
    """For JSON, which has no NaN: null stands for what is not defined."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


CODES = {
    "dictionary": "dictionary",
    "post_hoc": "re-split by\nautocorrelation",
    "random": "random\ndirections",
    "oracle": "oracle",
}
BARS = (
    ("slow_high", "slow, high-level group", PALETTE[0]),
    ("slow_low", "slow, the rest", PALETTE[5]),
    ("fast_low", "fast, the rest", PALETTE[1]),
    ("fast_high", "fast, high-level group", PALETTE[4]),
)


def draw(results: dict[str, Any], path: Path) -> None:
    """Draw the content of synthetic.json to the PNG `path`."""
    with figure(path, columns=2, size=(10, 3.1), width_ratios=(1.4, 1)) as (_, (bars, latents)):
        _draw_recovery(bars, results)
        _draw_latents(latents, results["latents"])


def _draw_recovery(axes: Axes, results: dict[str, Any]) -> None:
    width = 0.8 / len(BARS)
    for place, (measure, label, colour) in enumerate(BARS):
        positions = np.arange(len(CODES)) + (place - (len(BARS) - 1) / 2) * width
        heights = [results[code][measure] or 0.0 for code in CODES]
        axes.bar(positions, heights, width * 0.92, color=colour, label=label)
    names = [f"{label}\n({_figure(results[code]['disentanglement'])})" for code, label in CODES.items()]
    axes.set_xticks(range(len(CODES)), names)
    axes.set_ylim(0, 1)
    axes.grid(visible=False, axis="x")
    axes.set_ylabel("correlation with matches")
    axes.set_title("Recovery of true features (disentanglement)")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))


def _draw_latents(axes: Axes, latents: dict[str, Any]) -> None:
    kinds, group = np.array(latents["kind"]), np.array(latents["group"])
    x = np.array([np.nan if value is None else value for value in latents["autocorrelation"]], float)
    y = np.array(latents["correlation"], float)
    for number, kind in enumerate(sorted(set(kinds.tolist()), key=lambda kind: (kind == "fast", kind))):
        for high in (True, False):
            chosen = (kinds == kind) & ((group == 0) == high)
            colour = PALETTE[number]
            where = "high-level" if high else "rest"
            axes.scatter(
                x[chosen],
                y[chosen],
                s=16,
                marker=MARKERS[number],
                facecolors=colour if high else "none",
                edgecolors=colour,
                linewidths=0.9,
                label=f"{kind.replace('_', ' ')}, {where}",
            )
    axes.set_xlabel("autocorrelation from token to token")
    axes.set_ylabel("best correlation")
    axes.set_title("Latents by the feature they are closest to")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"
