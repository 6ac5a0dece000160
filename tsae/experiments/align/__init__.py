"""Latents on chosen and rejected responses, and the measures that they give the report."""

from tsae.evaluation.measures import Chart, Measure, declare, of_splits

# Neither direction is better: they say what the pairs differ in as much as what the latents see.
_NUMBERS = {
    "significant_share": ("significant latents", "share of the tested latents that differ between the two responses"),
    "beyond_length_share": ("beyond length", "share of those that differ beyond what the responses' lengths explain"),
    "largest_difference": (
        "largest difference",
        "largest mean difference of a latent's activation, rejected less chosen response, without its sign",
    ),
}

declare(
    *(
        measure
        for key, (name, formula) in _NUMBERS.items()
        for measure in of_splits(
            "alignment",
            key,
            Measure(
                "",
                "Alignment",
                formula,
                name,
                "activation" if key == "largest_difference" else "",
                chart=Chart(
                    f"alignment_{key}",
                    f"{name[0].upper()}{name[1:]}",
                    "activation" if key == "largest_difference" else "share of latents",
                    f"{formula[0].upper()}{formula[1:]}.",
                ),
                name=f"the {name} of the alignment experiment",
                version=0,
            ),
        )
    )
)
