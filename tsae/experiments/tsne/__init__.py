"""Maps of feature activations, and the measures that they give the report."""

from tsae.evaluation.measures import Chart, Measure, declare, of_splits

_LABELS = {"semantics": "the topic", "context": "the text", "syntax": "the token's class"}

declare(
    *(
        measure
        for label, meaning in _LABELS.items()
        for measure in of_splits(
            "tsne",
            label,
            Measure(
                "",
                "Neighbours",
                f"share of a token's nearest neighbours by cosine that share {meaning}, mean over tokens and choices of texts",
                label,
                better="higher",
                chart=Chart(
                    f"tsne_{label}",
                    f"{label[0].upper()}{label[1:]}",
                    "purity",
                    "Share of a token's nearest neighbours, before the map is made, that share the topic (semantics), the "
                    "text (context) and the token's class (syntax).",
                ),
                name=f"the purity of neighbours by {label}",
                version=0,
            ),
        )
    )
)
