"""From scores to the flat dictionary that eval_results.json holds.

The reference's names keep the reference's meaning: a mean over contexts of a measure of one context. They are joined
by values pooled over tokens (`_pooled`), values of each group (`_group`) and half-widths of 95 % intervals over
documents. `_with_all` counts the tokens that are left out of all others. `_h`, `_high` are group 0, `_l`, `_low` the rest. What is not defined is null and left out of means, which
`left_out` counts; with a single group there are no splits.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from tsae.evaluation.measures import EVERYWHERE, FVE, REFERENCE, Chart, Measure, Place, declare
from tsae.evaluation.statistics import mean_interval, median_interval, ratio_interval

if TYPE_CHECKING:
    from tsae.evaluation.loss_recovered import SequenceLosses
    from tsae.evaluation.scores import Scores

SMOOTHNESS_NAMES = {
    "total_variation": "smoothness_tv",
    "lipschitz": "lipschitz_cont",
    "fft": "fft",
    "wavelet": "wavelet",
    "multiscale": "multiscale",
    "relative_variation": "relative_tv",
}
"""Measure → its name in eval_results.json, followed by _tot, _h, _l or _group."""

TOKEN_MEANS = ("l2_loss", "cossim", "l2_ratio", "relative_reconstruction_bias")
ALL, HIGH, LOW, FIRST_GROUP, SECOND_GROUP = range(5)
"""Positions in the list of ranges."""

TRUTHS = ("slow", "slow_high", "fast", "fast_low", "disentanglement", "purity")
RATE_EXPONENTS = np.linspace(-6, 0, 25)
"""Edges of the histogram of firing rates, as powers of ten."""

_CHARTS = {
    "fve": Chart(
        "fve",
        "Reconstruction",
        "fraction of variance explained",
        "Fraction of the activations' variance that the reconstruction explains, mean over held-out contexts; "
        "with the latents of one split alone, the other split contributes nothing.",
    ),
    "smoothness": Chart(
        "smoothness",
        "Smoothness",
        "largest |Δf| / ‖Δx‖",
        "The largest change of an active latent from one token to the next, relative to the change of the activation, "
        "mean over active latents and held-out contexts. Lower is smoother.",
    ),
    "loss": Chart(
        "loss_recovered",
        "Cross-entropy recovered",
        "fraction recovered",
        "The language model's cross-entropy with the reconstruction spliced in: 1 is the untouched model, 0 the "
        "ablated layer.",
    ),
    "alive": Chart(
        "alive",
        "Latents in use",
        "fraction alive",
        "Share of the latents that fire at least once on the held-out contexts.",
    ),
    "recovery": Chart(
        "recovery",
        "Recovery",
        "correlation with matches",
        "Mean correlation of a synthetic world's slow or fast features with the latents matched to them, of any split "
        "or of one.",
    ),
    "disentanglement": Chart(
        "disentanglement",
        "Disentanglement",
        "disentanglement",
        "How much better slow features are recovered in the high-level split than in the low-level one, and fast ones "
        "the other way round: 1 is perfect, 0 a random split. Re-split: the same latents, divided by their "
        "autocorrelation.",
    ),
}
_SUMMARY: tuple[Place, ...] = ("summary",)
_EXPLAINED = "1 - Σ‖x - x̂‖² / Σ‖x - mean x‖² of a context, mean over contexts"
_POOLED = "1 - Σ‖x - x̂‖² / Σ‖x - mean x‖², both sums over all tokens"
_ONE_SPLIT = "{}; x̂ from the {} latents alone and the bias"
_MATCHED = "mean correlation of a world's {} features with the latents matched to them"
_ALIVE = "share of latents that fire at least once on the held-out contexts"
_L0 = "active latents of a token, mean over contexts"
_STANDING: tuple[Place, ...] = ("summary", "sentences", "differences", "effects")
_WRITTEN = "f: what the latent writes, its activation times the norm of its decoder row"
_SMOOTHNESS = {
    "lipschitz": (
        "Smoothness",
        f"largest |f_t - f_{{t-1}}| / ‖x_t - x_{{t-1}}‖ of a latent, mean over active latents; {_WRITTEN}",
    ),
    "total_variation": ("Total variation", f"Σ |f_t - f_{{t-1}}| over the steps and latents of a context; {_WRITTEN}"),
    "fft": ("FFT ratio", "spectral power in the upper half of the frequencies over the lower half, mean over latents"),
    "wavelet": (
        "Wavelet ratio",
        "energy of three levels of Haar details over the energy of the rest; not defined where that vanishes",
    ),
    "multiscale": (
        "Multiscale ratio",
        "variance of differences over 1 step against that over 8 steps; not defined where that vanishes",
    ),
    "relative_variation": (
        "Relative variation",
        "total variation over twice the summed activation: 0 constant, 1 spikes",
    ),
}
"""Measure → family and formula; the first is the paper's smoothness, the first five are the reference's."""
_CARD = {
    "smoothness_tv_h": "Total variation over time, high-level split",
    "smoothness_tv_l": "Total variation over time, low-level split",
    "lipschitz_cont_h": "Lipschitz constant, high-level split",
    "lipschitz_cont_l": "Lipschitz constant, low-level split",
}

declare(
    Measure(
        FVE,
        "FVE",
        _EXPLAINED,
        "all",
        better="higher",
        places=("summary", "terminal", "sentences", "differences", "effects"),
        chart=_CHARTS["fve"],
        name="the fraction of variance explained (FVE)",
    ),
    *(
        Measure(
            f"{FVE}_{split}",
            "FVE",
            _ONE_SPLIT.format(_EXPLAINED, f"{split}-level"),
            f"{split} only",
            better="higher",
            places=_SUMMARY,
            chart=_CHARTS["fve"],
            line=f"{split}-level only",
        )
        for split in ("high", "low")
    ),
    Measure(
        f"{FVE}_pooled",
        "FVE",
        _POOLED,
        "pooled",
        better="higher",
        places=_SUMMARY,
        card="Fraction of variance explained",
        stands_for=FVE,
        name="the fraction of variance explained, pooled over tokens (FVE)",
    ),
    Measure(
        f"{FVE}_pooled_high",
        "FVE",
        _ONE_SPLIT.format(_POOLED, "high-level"),
        "pooled, high only",
        better="higher",
        card="... by the high-level split alone",
    ),
    Measure(
        f"{FVE}_median",
        "FVE",
        "1 - Σ‖x - x̂‖² / Σ‖x - mean x‖² of a context, median over contexts",
        "median",
        better="higher",
        places=_SUMMARY,
    ),
    *(
        Measure(
            f"{FVE}{pooled}_with_all",
            "FVE",
            f"{formula}; with the tokens that `data.max_norm_multiple` and `data.exclude_tokens` leave out",
            member,
            better="higher",
            places=_SUMMARY,
        )
        for pooled, formula, member in (
            ("", _EXPLAINED, "with massive tokens"),
            ("_pooled", _POOLED, "pooled, with massive tokens"),
        )
    ),
    Measure(
        "cossim",
        "Cosine",
        "cosine of x and x̂, mean over the tokens of a context",
        better="higher",
        places=_SUMMARY,
        card="Cosine similarity of reconstructions",
    ),
    *(
        Measure(
            f"{SMOOTHNESS_NAMES[name]}_{suffix}",
            family,
            formula,
            member,
            better="lower",
            places=places if name == "lipschitz" else (),
            chart=_CHARTS["smoothness"] if name == "lipschitz" else None,
            line=line,
            card=_CARD.get(f"{SMOOTHNESS_NAMES[name]}_{suffix}", ""),
            name=f"the {family.lower()} of {line if member == 'all' else f'the {line} split'}"
            if name == "lipschitz"
            else "",
        )
        for name, (family, formula) in _SMOOTHNESS.items()
        for suffix, member, line, places in (
            ("tot", "all", "all latents", _SUMMARY),
            ("h", "high", "high-level", EVERYWHERE),
            ("l", "low", "low-level", (*_SUMMARY, "terminal")),
        )
    ),
    Measure(
        "frac_recovered",
        "CE recovered",
        "(CE with x̂ - CE ablated) / (CE of the model - CE ablated), pooled over tokens",
        better="higher",
        places=("summary", "terminal", "sentences", "differences"),
        chart=_CHARTS["loss"],
        card="Loss recovered",
        name="the share of cross-entropy (CE) recovered",
    ),
    Measure(
        "loss_increase",
        "CE added",
        "CE with x̂ - CE of the model, pooled over tokens",
        unit="nats",
        better="lower",
        card="Loss added by reconstructions (nats)",
    ),
    Measure(
        "frac_alive",
        "Alive",
        _ALIVE,
        better="higher",
        places=("summary", "terminal", "differences", "effects"),
        chart=_CHARTS["alive"],
        card="Latents that fired",
        name="the share of latents alive",
        rank=4,
    ),
    *(
        Measure(
            f"frac_alive_{split}", "Alive", _ALIVE, split, "", "higher", _SUMMARY, _CHARTS["alive"], f"{split}-level"
        )
        for split in ("high", "low")
    ),
    Measure("l0", "L0", _L0, "", "latents", "", ("summary", "terminal"), card="Active latents per token (L0)"),
    Measure("l0_high", "L0", _L0, "high", "latents", places=_SUMMARY, card="... in the high-level split"),
    Measure("l0_low", "L0", _L0, "low", "latents"),
    *(
        Measure(f"truth_{name}", "Recovery", _MATCHED.format(part), member, "", "higher", places, chart, line, rank=2)
        for name, part, member, places, chart, line in (
            ("slow", "slow", "slow", _STANDING, _CHARTS["recovery"], "slow anywhere"),
            ("slow_high", "slow", "slow in high", _SUMMARY, _CHARTS["recovery"], "slow in high-level"),
            ("fast", "fast", "fast", (), None, ""),
            ("fast_low", "fast", "fast in low", _SUMMARY, _CHARTS["recovery"], "fast in low-level"),
            ("post_hoc_slow_high", "slow", "slow in high, post-hoc", (), None, ""),
        )
    ),
    Measure(
        "truth_disentanglement",
        "Disentanglement",
        "½ (slow in high - slow in low + fast in low - fast in high), of recovery: 1 perfect, 0 a random split",
        better="higher",
        places=(*_STANDING, "trade-offs"),
        chart=_CHARTS["disentanglement"],
        line="as trained",
        rank=1,
    ),
    Measure(
        "truth_post_hoc_disentanglement",
        "Disentanglement",
        "the same of the same latents, split by their autocorrelation",
        "post-hoc",
        better="higher",
        places=_SUMMARY,
        chart=_CHARTS["disentanglement"],
        line="re-split",
    ),
    Measure(
        "truth_purity",
        "Purity",
        "share of the high-level split's live latents whose best match is slow",
        better="higher",
    ),
)


class Results:
    """A flat dictionary of measures, the half-widths of their intervals, and the contexts that were left out of each."""

    def __init__(self, scores: Scores) -> None:
        self.has_splits = len(scores.dictionary.group_sizes) > 1
        self.documents = scores.documents
        self.values: dict[str, Any] = {}
        self.half_widths: dict[str, float | None] = {}
        self.left_out: dict[str, int] = {}

    def put(self, name: str, interval: tuple[float, float]) -> None:
        """Record a value and its half-width under `name`."""
        self.values[name], self.half_widths[name] = (plain(number) for number in interval)

    def put_ranges(self, names: tuple[str, str, str, str], intervals: list[tuple[float, float]]) -> None:
        """Record R intervals under names for: all, high-level, low-level, the list of groups."""
        self.put(names[ALL], intervals[ALL])
        for position in (HIGH, LOW):
            self.put(names[position], intervals[position] if self.has_splits else (math.nan, math.nan))
        self.values[names[FIRST_GROUP]] = [plain(value) for value, _ in intervals[FIRST_GROUP:]]

    def put_mean(self, name: str, values: np.ndarray) -> None:
        """Record the mean over contexts of values [S] and on how many they are not defined."""
        self.put(name, mean_interval(values, self.documents))
        self.left_out |= not_finite({name: values})

    def put_means(self, names: tuple[str, str, str, str], values: np.ndarray) -> None:
        """Record the means over contexts of values [S, R], as `put_ranges` and `put_mean` do."""
        self.put_ranges(names, [mean_interval(column, self.documents) for column in values.T])
        shown = (ALL, HIGH, LOW) if self.has_splits else (ALL,)
        self.left_out |= not_finite({names[position]: values[:, position] for position in shown})


def not_finite(columns: dict[str, np.ndarray]) -> dict[str, int]:
    """Name → how many of its values are not finite, of those of which any is."""
    counts = {name: int((~np.isfinite(values)).sum()) for name, values in columns.items()}
    return {name: count for name, count in counts.items() if count}


def summarise(scores: Scores, with_all: Scores | None = None) -> dict[str, Any]:
    """The measures of all scored contexts; see the module's docstring for the names.

    `with_all` are the same contexts with the tokens that were left out for their norm or their id, where any could be.
    """
    table, results = scores.table(), Results(scores)
    for measure, name in SMOOTHNESS_NAMES.items():
        results.put_means((f"{name}_tot", f"{name}_h", f"{name}_l", f"{name}_group"), table[measure])
    for measure in ("l0", "l1_loss", "sequence_l0"):
        results.put_means((measure, f"{measure}_high", f"{measure}_low", f"{measure}_group"), table[measure])
    results.put_means(_explained(FVE), table["variance_explained"])
    results.put_ranges(_explained(f"{FVE}_pooled"), _pooled_variance_explained(scores, table))
    results.put(f"{FVE}_median", median_interval(table["variance_explained"][:, ALL], scores.documents))
    if with_all is not None:
        every = with_all.table()
        results.put(f"{FVE}_with_all", mean_interval(every["variance_explained"][:, ALL], with_all.documents))
        results.put(f"{FVE}_pooled_with_all", _pooled_variance_explained(with_all, every)[ALL])
    for measure in TOKEN_MEANS:
        results.put_mean(measure, table[measure])
    return {
        **results.values,
        **_firing(scores),
        "half_width_95": results.half_widths,
        "left_out": results.left_out,
        "reference": reference_results(scores),
        "contexts": scores.contexts,
        "documents": len(np.unique(scores.documents)),
        "tokens": scores.tokens,
        "group_sizes": list(scores.dictionary.group_sizes),
    }


def plain(value: float) -> float | None:
    """`value` for JSON, which has no NaN: null stands for undefined."""
    return float(value) if math.isfinite(value) else None


def _explained(name: str) -> tuple[str, str, str, str]:
    return name, f"{name}_high", f"{name}_low", f"{name}_group"


def _pooled_variance_explained(scores: Scores, table: dict[str, np.ndarray]) -> list[tuple[float, float]]:
    """1 - Σ‖x - x̂‖² / Σ‖x - mean x‖² over all tokens; a split's x̂ holds the bias."""
    total = scores.squared_deviations()
    return [ratio_interval(total - error, total, scores.documents) for error in table["squared_error"].T]


def _firing(scores: Scores) -> dict[str, Any]:
    """Share of latents that fired at all, and the histogram of how often."""
    fired = scores.firings > 0
    alive = [float(fired[first:end].double().mean()) for first, end in scores.ranges]
    exponents = np.log10(np.maximum(scores.firings.numpy() / max(scores.tokens, 1), 10.0 ** RATE_EXPONENTS[0]))
    # The rates of the groups; silent latents are in frac_alive, not here.
    counts = [
        np.histogram(exponents[first:end][fired[first:end].numpy()], RATE_EXPONENTS)[0].tolist()
        for first, end in scores.ranges[FIRST_GROUP:]
    ]
    splits = len(scores.dictionary.group_sizes) > 1
    return {
        "frac_alive": alive[ALL],
        "frac_alive_high": alive[HIGH] if splits else None,
        "frac_alive_low": alive[LOW] if splits else None,
        "frac_alive_group": alive[FIRST_GROUP:],
        "firing_rates": {"log10_edges": RATE_EXPONENTS.tolist(), "latents_group": counts},
    }


def reference_results(scores: Scores) -> dict[str, float | None]:
    """What the reference's evaluate() returns for the same contexts, defects included, for comparison with its numbers.

    One context on which a measure is undefined makes its mean undefined (the reference's FFT measure raises there);
    `_l` is group 1 alone except for total variation; with one group, all splits are 0 and smoothness_tv_h is the total.
    """
    table, one_group = scores.table(), len(scores.dictionary.group_sizes) == 1

    def mean(measure: str) -> np.ndarray:
        with np.errstate(invalid="ignore"):  # of infinities of both signs
            return np.asarray(table[measure].mean(0))

    def splits(measure: str) -> tuple[float, float]:
        return (0.0, 0.0) if one_group else (mean(measure)[HIGH], mean(measure)[SECOND_GROUP])

    out = {name: float(mean(name)) for name in TOKEN_MEANS}
    out |= {name: mean(name)[ALL] for name in ("l0", "sequence_l0")} | {"l1_loss": mean(REFERENCE + "l1_loss")[ALL]}
    variation = mean(REFERENCE + "total_variation")
    out |= {"smoothness_tv_h": variation[HIGH], "smoothness_tv_l": 0.0 if one_group else variation[LOW]}
    for measure in ("lipschitz", "fft", "wavelet", "multiscale"):
        name = SMOOTHNESS_NAMES[measure]
        out[f"{name}_tot"] = mean(REFERENCE + measure)[ALL]
        out[f"{name}_h"], out[f"{name}_l"] = splits(REFERENCE + measure)
    out[FVE] = mean("variance_explained")[ALL]
    out[f"{FVE}_high"], out[f"{FVE}_low"] = splits("variance_explained")
    out["frac_alive"] = (scores.firings > 0).double().mean().item()
    return {name: plain(value) for name, value in out.items()}


def loss_results(
    losses: SequenceLosses, documents: np.ndarray, ablation: str
) -> tuple[dict[str, tuple[float, float]], dict[str, int]]:
    """Value and half-width of the pooled losses and of frac_recovered, under the reference's names, and of the loss that
    reconstructions add (an absolute measure: frac_recovered is close to 1 wherever ablation is a catastrophe).

    `documents` [S] names the document of each sequence; `ablation` is `zero` or `mean` and names the third loss. Beside
    them, how many sequences were left out because a loss of theirs is not finite.
    """
    named = {
        "loss_original": losses.original,
        "loss_reconstructed": losses.reconstructed,
        f"loss_{ablation}": losses.ablated,
    }
    intervals = {name: ratio_interval(loss, losses.targets, documents) for name, loss in named.items()} | {
        "loss_increase": ratio_interval(losses.reconstructed - losses.original, losses.targets, documents),
        "frac_recovered": ratio_interval(
            losses.reconstructed - losses.ablated, losses.original - losses.ablated, documents
        ),
    }
    return intervals, not_finite(named)


def truth_results(results: dict[str, Any]) -> dict[str, float | None]:
    """Of a dictionary's measures against a synthetic world's truth (synthetic.json), those that eval_results.json holds."""
    shown = {f"truth_{name}": results["dictionary"][name] for name in TRUTHS}
    return shown | {f"truth_post_hoc_{name}": results["post_hoc"][name] for name in ("disentanglement", "slow_high")}
