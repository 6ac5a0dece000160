"""Linear probes on feature activations, and the measures that they give the report."""

from tsae.evaluation.measures import Chart, Measure, Place, declare, of_splits

_SHOWN: dict[str, tuple[str, tuple[Place, ...]]] = {
    "semantics": ("the text's topic", ("summary", "sentences", "differences", "effects", "trade-offs")),
    "context": ("which text a token is from", ("summary", "differences")),
    "syntax": ("a token's class", ("summary", "differences")),
}
"""Task → what its probe tells, and where the report shows how well it does on the high-level split."""

declare(
    *(
        measure
        for task, (meaning, places) in _SHOWN.items()
        for measure in of_splits(
            "probing",
            task,
            Measure(
                "",
                "Probing",
                f"balanced accuracy of a sparse linear probe for {meaning}, mean over splits of the tokens",
                task,
                better="higher",
                places=places,
                chart=Chart(
                    f"probing_{task}",
                    f"{task[0].upper()}{task[1:]}",
                    "balanced accuracy",
                    "Balanced accuracy of a sparse linear probe on feature activations of one split for "
                    "the text's topic (semantics), which text a token is from (context) and a token's class (syntax).",
                ),
                name=f"the balanced accuracy of probes for {task}",
                rank=3,
            ),
        )
    )
)
