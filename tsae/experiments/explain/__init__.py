"""Explanations of latents, and the measures of them that the report shows."""

from tsae.evaluation.measures import Chart, Measure, declare

_SCORERS = {
    "detection": "balanced accuracy of telling by an explanation which texts its latent fires on",
    "fuzzing": "balanced accuracy of telling by an explanation whether the marked tokens are those its latent fires on",
}
_SPLITS = {"": "all latents", "_high": "high-level", "_low": "low-level"}

declare(
    *(
        Measure(
            f"autointerp/{scorer}{ending}",
            f"Explanations, {line.removesuffix('-level')}",
            f"{formula}, mean over the latents that can be tested",
            scorer,
            better="higher",
            chart=Chart(
                f"autointerp_{scorer}",
                f"{scorer[0].upper()}{scorer[1:]}",
                "balanced accuracy",
                f"{formula[0].upper()}{formula[1:]}.",
            ),
            line=line,
            name=f"the {scorer} score of explanations ({line})",
            version=0,
        )
        for scorer, formula in _SCORERS.items()
        for ending, line in _SPLITS.items()
    ),
    *(
        Measure(
            f"autointerp/{scorer}_high_minus_low_at_equal_rate",
            "Explanations, high less low",
            f"{formula}: high-level less low-level latents of equal firing rates",
            scorer,
            name=f"the {scorer} score of high-level less low-level latents of equal firing rates",
            version=0,
        )
        for scorer, formula in _SCORERS.items()
    ),
)
