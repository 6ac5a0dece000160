"""What steered text is worth: does it show the concept, is it still text, how a judge grades it, and what follows.

Shapes: N texts, T tokens each, C concepts.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from tsae.config.experiments import AnswersConfig, SteerConfig
from tsae.evaluation.statistics import bootstrap_mean, percentiles
from tsae.experiments.answers.ask import open_backend
from tsae.experiments.answers.prompts import Prompt
from tsae.experiments.steer.generation import Condition
from tsae.runtime.progress import Progress

if TYPE_CHECKING:
    pass


def coherence(loss: np.ndarray, distinct_2: np.ndarray, usual: tuple[float, float]) -> np.ndarray:
    """How far perplexity and variety are from the `usual` loss and distinct-2, counted where they are worse; 0 to 1.

    Fluent text in a loop is as little sense as a shower of words, so the two are multiplied.
    """
    likely = np.exp(np.minimum(usual[0] - loss, 0.0))
    varied = np.minimum(distinct_2 / max(usual[1], 1e-12), 1.0)
    return np.asarray(likely * varied)


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """The points (success, coherence) that no other one beats in both, by falling success."""
    order = sorted(range(len(points)), key=lambda index: (-points[index][0], -points[index][1]))
    front: list[int] = []
    for index in order:
        if not front or points[index][1] > points[front[-1]][1]:
            front.append(index)
    return front


def area(points: Sequence[tuple[float, float]]) -> float:
    """Area of the unit square that some point (success, coherence) reaches or beats in both."""
    total, height = 0.0, 0.0
    for index in pareto_front(points):
        success, coherent = points[index]
        total += success * (coherent - height)
        height = coherent
    return total


def usable_interval(
    strengths: np.ndarray, success: np.ndarray, coherent: np.ndarray, limits: tuple[float, float]
) -> tuple[float, float] | None:
    """The widest run of strengths in which both measures reach their limits; None without one.

    Between the strengths that were tried, measures are taken as linear in the strength's logarithm.
    """
    order = np.argsort(strengths)
    log = np.log(strengths[order])
    fine = np.unique(np.concatenate([np.linspace(log[0], log[-1], 1001), log]))
    usable = np.ones(len(fine), bool)
    for values, limit in zip((success, coherent), limits, strict=True):
        usable &= np.interp(fine, log, values[order]) >= limit
    edges = np.flatnonzero(np.diff(np.concatenate([[False], usable, [False]]).astype(int)))
    runs = [(float(fine[start]), float(fine[end - 1])) for start, end in edges.reshape(-1, 2)]
    if not runs:
        return None
    low, high = max(runs, key=lambda run: run[1] - run[0])
    return float(np.exp(low)), float(np.exp(high))


def rounded(values: Any) -> float:
    """A mean as JSON keeps it."""
    return round(float(np.mean(values)), 6)


GOOD = 2
"""Grade from which a sample counts as successful, and as coherent."""
SYSTEM = (
    "You grade short texts written by a language model that was steered towards a topic. Answer with two numbers only, "
    "as in 'topic=2 coherence=3'. Topic: 0 the text has nothing to do with it, 1 it is hinted at, 2 the text is partly "
    "about it, 3 the text is clearly about it. Coherence: 0 not language, 1 broken or repetitive, 2 understandable with "
    "faults, 3 fluent."
)
ANSWER = re.compile(r"topic\s*[=:]\s*([0-3]).*?coherence\s*[=:]\s*([0-3])", re.IGNORECASE | re.DOTALL)


def judge(settings: AnswersConfig, samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Ask for the grades of every sample with a concept and write them into it; the means by method and strength.

    An answer without grades is kept in the sample as the reason why there are none.
    """
    graded = [sample for sample in samples if sample["concept"] is not None]
    backend = open_backend(settings, where="experiments.steer.judge")
    prompts = [
        Prompt(SYSTEM, f"Topic: {sample['concept']}\nText: {sample['prompt']}{sample['text']}", 16) for sample in graded
    ]
    answers = backend.answers(prompts, Progress("steer judge", len(prompts), "samples"))
    for sample, answer in zip(graded, answers, strict=True):
        found = ANSWER.search(answer.text or "")
        if found is None:
            sample["grades"] = {"failure": answer.failure or f"no grades in: {answer.text!r:.80}"}
        else:
            sample["grades"] = {"concept": int(found[1]), "coherence": int(found[2])}
    return {"backend": backend.name, "means": _means(graded), "failures": sum("failure" in s["grades"] for s in graded)}


def _means(graded: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean grades, and the share of samples that are good in both, of each method at each strength."""
    groups: dict[tuple[str, float | None, float | None], list[dict[str, int]]] = {}
    for sample in graded:
        if "failure" not in sample["grades"]:
            absolute = sample["strength"] if sample["multiple"] is None else None
            groups.setdefault((sample["method"], sample["multiple"], absolute), []).append(sample["grades"])
    return [
        {
            "method": method,
            "multiple": multiple,
            "strength": strength,
            "samples": len(grades),
            "concept": sum(grade["concept"] for grade in grades) / len(grades),
            "coherence": sum(grade["coherence"] for grade in grades) / len(grades),
            "good_in_both": sum(min(grade.values()) >= GOOD for grade in grades) / len(grades),
        }
        for (method, multiple, strength), grades in groups.items()
    ]


class Curve(NamedTuple):
    """One method over strengths of one kind, per concept."""

    method: str
    kind: str
    """`multiple` or `strength`."""
    strengths: tuple[float, ...]
    """[K]"""
    success: np.ndarray
    """[C, K] mean probability of the concept over prompts."""
    coherence: np.ndarray
    """[C, K]"""
    loss: np.ndarray
    """[C, K] in nats."""
    distinct_2: np.ndarray
    """[C, K]"""


def curves(conditions: Sequence[Condition], measures: dict[str, np.ndarray]) -> list[Curve]:
    """The conditions sorted into curves; `measures` has success, coherence, loss and distinct_2, each [N, P]."""
    places: dict[tuple[str, str], dict[tuple[int, float], int]] = {}
    for index, condition in enumerate(conditions):
        if condition.direction is None:
            continue
        kind = "strength" if condition.multiple is None else "multiple"
        value = condition.strength if condition.multiple is None else condition.multiple
        own = places.setdefault((condition.direction.method, kind), {})
        own[condition.direction.concept, value] = index
    found = []
    for (method, kind), own in places.items():
        strengths = tuple(dict.fromkeys(value for _, value in own))
        count = 1 + max(concept for concept, _ in own)
        table = np.array([[own[concept, value] for value in strengths] for concept in range(count)])
        found.append(
            Curve(method, kind, strengths, **{name: values.mean(1)[table] for name, values in measures.items()})
        )
    return found


def curve_results(curve: Curve, settings: SteerConfig) -> dict[str, Any]:
    """A curve as results have it."""
    points = list(zip(curve.success.mean(0).tolist(), curve.coherence.mean(0).tolist(), strict=True))
    front = pareto_front(points)
    half = _area_half_width(curve, settings)
    return {
        "method": curve.method,
        "kind": curve.kind,
        "points": [
            {
                curve.kind: strength,
                "success": bootstrap_mean(curve.success[:, place], settings.bootstrap, settings.seed).plain(),
                "coherence": bootstrap_mean(curve.coherence[:, place], settings.bootstrap, settings.seed).plain(),
                "perplexity": float(np.exp(curve.loss[:, place].mean())),
                "distinct_2": float(curve.distinct_2[:, place].mean()),
                "on_front": place in front,
            }
            for place, strength in enumerate(curve.strengths)
        ],
        "area": area(points),
        "area_half_width_95": half,
        "usable": _usable(curve, settings),
    }


def doublings(curve: Curve, settings: SteerConfig) -> np.ndarray:
    """[C] width of each concept's usable interval, in doublings of the strength; 0 without one."""
    intervals = (interval for interval in _usable(curve, settings)["by_concept"])
    return np.array([0.0 if interval is None else np.log2(interval[1] / interval[0]) for interval in intervals])


def _usable(curve: Curve, settings: SteerConfig) -> dict[str, Any]:
    """The interval of strengths in which text is both steered and coherent: of the means, and of each concept."""
    limits = (settings.success, settings.coherence)
    positive = np.array(curve.strengths) > 0
    strengths = np.array(curve.strengths)[positive]
    if not len(strengths):
        return {"of_means": None, "by_concept": [None] * len(curve.success)}

    def interval(success: np.ndarray, coherence: np.ndarray) -> tuple[float, float] | None:
        return usable_interval(strengths, success[positive], coherence[positive], limits)

    pairs = zip(curve.success, curve.coherence, strict=True)
    return {
        "of_means": interval(curve.success.mean(0), curve.coherence.mean(0)),
        "by_concept": [interval(success, coherence) for success, coherence in pairs],
    }


def _area_half_width(curve: Curve, settings: SteerConfig) -> float:
    """Half of the 95 % bootstrap interval of the area under the front, over draws of concepts."""
    random, count = np.random.default_rng(settings.seed), len(curve.success)
    drawn = []
    for _ in range(settings.bootstrap):
        chosen = random.integers(count, size=count)
        means = curve.success[chosen].mean(0), curve.coherence[chosen].mean(0)
        drawn.append(area(list(zip(*(values.tolist() for values in means), strict=True))))
    low, high = percentiles(drawn)
    return float(high - low) / 2
