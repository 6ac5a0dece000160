"""Latents over spliced passages, and the measures that they give the report."""

from typing import Literal

from tsae.evaluation.measures import Chart, Measure, declare, of_splits

_SCORES: dict[str, tuple[str, str, str, Literal["higher", "lower"]]] = {
    "phase_auc": (
        "phase AUC",
        "",
        "AUC of the passage that a latent's activation singles out best, mean over the most active latents",
        "higher",
    ),
    "top_persistence": (
        "persistence",
        "",
        "probability that a latent fires on the next token of a passage, given that it fires, over the most active latents",
        "higher",
    ),
    "boundary_lag": (
        "boundary lag",
        "tokens",
        "tokens after a border until the code is nearer to the new passage's mean than to the old one's",
        "lower",
    ),
    "leakage": (
        "leakage",
        "",
        "share of a latent's activation after its best passage, mean over the most active latents",
        "lower",
    ),
    "change_point_f1": (
        "change-point F1",
        "",
        "F1 of the largest changes of the code as guesses of the borders between passages",
        "higher",
    ),
}
"""Score → its name, unit, formula and the direction that is better."""

declare(
    *(
        measure
        for key, (name, unit, formula, better) in _SCORES.items()
        for measure in of_splits(
            "sequences",
            key,
            Measure(
                "",
                "Sequences",
                formula,
                name,
                unit,
                better,
                chart=Chart(
                    f"sequences_{key}",
                    f"{name[0].upper()}{name[1:]}",
                    unit or name,
                    f"{formula[0].upper()}{formula[1:]}.",
                ),
                name=f"the {name} over spliced passages",
                version=0,
            ),
        )
    )
)
