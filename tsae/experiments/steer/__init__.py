"""Steered generation, and the measures that it gives the report."""

import dataclasses

from tsae.evaluation.measures import Chart, Measure, declare, of_splits

_NUMBERS = {
    "pareto_area": (
        "area under the Pareto front",
        "",
        "area under the Pareto front of success and coherence over the strengths, both means over concepts",
    ),
    "usable_doublings": (
        "usable strengths",
        "doublings",
        "width of the interval of strengths at which text is both steered and coherent, mean over concepts",
    ),
}
_METHODS = {"": "", "_random_latent": "random latent", "_difference_of_means": "difference of means"}
"""Ending of a number's key → what steered in the latent's place."""


def _measures(key: str, ending: str) -> list[Measure]:
    (name, unit, formula), method = _NUMBERS[key], _METHODS[ending]
    instead = f", {method} in the latent's place" if method else ""
    like = Measure(
        "",
        "Steering",
        f"{formula}{instead}",
        f"{name}, {method}" if method else name,
        unit,
        "higher",
        chart=Chart(
            f"steering_{key}", f"{name[0].upper()}{name[1:]}", unit or "area", f"{formula[0].upper()}{formula[1:]}."
        ),
        name=f"the {name} of steering{instead}",
        version=0,
    )
    found = of_splits("steering", key + ending, like)
    if not method:
        return found
    # The baselines hardly depend on the split: one line of each is enough.
    return [
        dataclasses.replace(one, chart=None if number else one.chart, line=method) for number, one in enumerate(found)
    ]


declare(*(measure for key in _NUMBERS for ending in _METHODS for measure in _measures(key, ending)))
