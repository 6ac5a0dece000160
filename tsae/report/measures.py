"""What the measures of eval_results.json are called in tables and figures, and which of them come first."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

FVE = "frac_variance_explained"
LABELS = {
    "frac_variance_explained": ("FVE", "all"),
    "frac_variance_explained_high": ("FVE", "high only"),
    "frac_variance_explained_low": ("FVE", "low only"),
    "frac_variance_explained_pooled": ("FVE", "pooled"),
    "cossim": ("Cosine", ""),
    "lipschitz_cont_tot": ("Smoothness", "all"),
    "lipschitz_cont_h": ("Smoothness", "high"),
    "lipschitz_cont_l": ("Smoothness", "low"),
    "frac_recovered": ("CE recovered", ""),
    "frac_alive": ("Alive", ""),
    "l0": ("L0", ""),
    "probing_chunk0/semantics": ("Probing, high", "semantics"),
    "probing_chunk0/context": ("Probing, high", "context"),
    "probing_chunk0/syntax": ("Probing, high", "syntax"),
    "truth_slow": ("Recovery", "slow"),
    "truth_slow_high": ("Recovery", "slow in high"),
    "truth_fast_low": ("Recovery", "fast in low"),
    "truth_disentanglement": ("Disentanglement", ""),
    "truth_post_hoc_disentanglement": ("Disentanglement", "post-hoc"),
}
"""Measures of the summary, in its order, as (family, member); the rest keep the names of the file."""

NOT_MEASURES = frozenset({"contexts", "documents", "tokens"})
"""Counts that say how much was measured."""


@dataclass(frozen=True)
class Chart:
    """One figure: measures against the swept value."""

    name: str
    title: str
    axis: str
    lines: tuple[tuple[str, str], ...]
    """(measure, label) of each line."""
    caption: str


CHARTS: tuple[Chart, ...] = (
    Chart(
        "fve",
        "Reconstruction",
        "fraction of variance explained",
        (
            ("frac_variance_explained", "all latents"),
            ("frac_variance_explained_high", "high-level only"),
            ("frac_variance_explained_low", "low-level only"),
        ),
        "Fraction of the activations' variance that the reconstruction explains, mean over held-out contexts; "
        "with the latents of one split alone, the other split contributes nothing.",
    ),
    Chart(
        "smoothness",
        "Smoothness",
        "largest |Δf| / ‖Δx‖",
        (
            ("lipschitz_cont_tot", "all latents"),
            ("lipschitz_cont_h", "high-level"),
            ("lipschitz_cont_l", "low-level"),
        ),
        "The largest change of an active latent from one token to the next, relative to the change of the activation, "
        "mean over active latents and held-out contexts. Lower is smoother.",
    ),
    Chart(
        "loss_recovered",
        "Cross-entropy recovered",
        "fraction recovered",
        (("frac_recovered", "all latents"),),
        "The language model's cross-entropy with the reconstruction spliced in: 1 is the untouched model, 0 the "
        "ablated layer.",
    ),
    Chart(
        "alive",
        "Latents in use",
        "fraction alive",
        (
            ("frac_alive", "all latents"),
            ("frac_alive_high", "high-level"),
            ("frac_alive_low", "low-level"),
        ),
        "Share of the latents that fire at least once on the held-out contexts.",
    ),
    Chart(
        "recovery",
        "Recovery",
        "correlation with matches",
        (
            ("truth_slow", "slow anywhere"),
            ("truth_slow_high", "slow in high-level"),
            ("truth_fast_low", "fast in low-level"),
        ),
        "Mean correlation of a synthetic world's slow or fast features with the latents matched to them, of any split or of "
        "one.",
    ),
    Chart(
        "disentanglement",
        "Disentanglement",
        "disentanglement",
        (
            ("truth_disentanglement", "as trained"),
            ("truth_post_hoc_disentanglement", "re-split"),
        ),
        "How much better slow features are recovered in the high-level split than in the low-level one, and fast ones the "
        "other way round: 1 is perfect, 0 a random split. Re-split: the same latents, divided by their autocorrelation.",
    ),
)

PROBES = tuple(
    Chart(
        f"probing_{task}",
        f"Probing: {task}",
        "balanced accuracy",
        (
            (f"probing_chunk2/{task}", "all latents"),
            (f"probing_chunk0/{task}", "high-level"),
            (f"probing_chunk1/{task}", "low-level"),
        ),
        f"Balanced accuracy of a sparse linear probe for {meaning}, on feature activations of one split.",
    )
    for task, meaning in (
        ("semantics", "the text's topic"),
        ("context", "which text a token is from"),
        ("syntax", "a token's class"),
    )
)
CHARTS = (*CHARTS, *PROBES)


def shown_of(names: Sequence[str], available: Collection[str]) -> list[str]:
    """Those of `names` that are available, with FVE pooled over all tokens where the truth is known.

    The paper's FVE is a mean over contexts and misses what differs between them, which is where slow features show.
    """
    pooled = {FVE: f"{FVE}_pooled"} if any(name.startswith("truth_") for name in available) else {}
    return [name for name in (pooled.get(name, name) for name in names) if name in available]


def scalars(results: dict[str, Any]) -> dict[str, float]:
    """The measures of one run that are single numbers; the summary's first, then in the file's order."""
    found = {
        name: float(value)
        for name, value in results.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool) and name not in NOT_MEASURES
    }
    return {name: found[name] for name in (*LABELS, *found) if name in found}


def label(measure: str) -> str:
    """The measure's name for people, in one line."""
    return " ".join(LABELS.get(measure, (measure,))).strip()


def figures(value: float, digits: int = 4) -> str:
    """A number with about `digits` significant figures, without exponent where that is readable."""
    if value != value:
        return "–"
    magnitude = abs(value)
    if magnitude and (magnitude < 1e-3 or magnitude >= 1e6):
        return f"{value:.{digits - 1}e}"
    before_point = len(str(int(magnitude))) if magnitude >= 1 else 0
    decimals = max(0, digits - before_point)
    return f"{value:.{decimals}f}"
