"""The page of latents, and the measures that it gives the report."""

from typing import Literal

from tsae.evaluation.measures import Chart, Measure, declare

_MEASURES: dict[str, tuple[str, Literal["higher", "lower", ""]]] = {
    "persistence": ("share of a latent's firings after which it fires at the next token too", ""),
    "smoothness": (
        "largest step of a latent's activation over the step of x, mean over the texts it fires in",
        "lower",
    ),
}
_SPLITS = {"": "all latents", "_high": "high-level", "_low": "low-level"}

declare(
    *(
        Measure(
            f"features/{name}{ending}",
            f"Latents, {line.removesuffix('-level')}",
            f"{formula}, mean over the latents that fire",
            name,
            better=better,
            chart=Chart(
                f"features_{name}", f"{name[0].upper()}{name[1:]}", name, f"{formula[0].upper()}{formula[1:]}."
            ),
            line=line,
            name=f"the mean {name} of latents ({line})",
            version=0,
        )
        for name, (formula, better) in _MEASURES.items()
        for ending, line in _SPLITS.items()
    )
)
