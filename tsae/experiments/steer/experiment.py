"""Text generated while one latent is held up, and what that does to its topic and its sense (section 4.4, appendix B.2).

For each concept, a label of the texts, the latent that stands for it is steered at several strengths; random latents
and the difference of the concept's mean activation from the rest, at the same norm, are the baselines. Success is the
probability of the concept by a classifier of words; coherence compares perplexity under the unsteered model and
distinct 2-grams with unsteered and with real text, whichever is worse; a language model can grade samples as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tsae.config.experiments import SteerConfig
from tsae.evaluation.statistics import bootstrap_mean
from tsae.experiments.shared.subject import Subject
from tsae.experiments.shared.texts import TextActivations, harvest_dataset
from tsae.experiments.steer.concepts import ConceptClassifier, Direction, Uses, concept_classifier, directions, divide
from tsae.experiments.steer.figure import draw_figure
from tsae.experiments.steer.generation import (
    Condition,
    Generated,
    Prompts,
    conditions,
    find_prompts,
    generate,
    real_text,
)
from tsae.experiments.steer.scores import Curve, coherence, curve_results, curves, doublings
from tsae.runtime.errors import TsaeError


class Material(NamedTuple):
    """What all splits of a run share."""

    texts: TextActivations
    uses: Uses
    prompts: Prompts
    classifier: ConceptClassifier
    accuracy: float
    real: tuple[float, float]
    """Loss and distinct-2 of real text."""


def measure(subject: Subject, settings: SteerConfig, chunk: int) -> dict[str, Any]:
    """Steering with latents of one split. Raises TsaeError for concepts, latents and prompts that cannot serve."""
    _check(settings, subject, chunk)
    material = _material(subject, settings)
    uses, prompts = material.uses, material.prompts
    found = directions(subject, material.texts, uses, subject.latents(chunk), settings)
    every = conditions(found, settings)
    generated = generate(subject, every, prompts, settings)
    written = _decoded(subject, generated)
    probabilities = material.classifier.probabilities([text for texts in written for text in texts])
    probabilities = probabilities.reshape(*generated.loss.shape, -1)
    measures = {
        "success": _of_own_concept(every, probabilities),
        "coherence": coherence(generated.loss, generated.distinct_2, _usual(generated, material.real)),
        "loss": generated.loss,
        "distinct_2": generated.distinct_2,
    }
    drawn = curves(every, measures)
    samples = _samples(every, prompts, written, measures, uses)
    return {
        **_headline(drawn, settings),
        "concepts": _concepts(subject, found, uses),
        "control": _control(probabilities, measures),
        "curves": [curve_results(curve, settings) for curve in drawn],
        "by_concept": _by_concept(drawn, uses),
        "classifier_accuracy": material.accuracy,
        "real_text": {"perplexity": float(np.exp(material.real[0])), "distinct_2": material.real[1]},
        "prompts": prompts.texts,
        "judge": _judged(settings, samples),
        "samples": samples,
    }


@lru_cache(maxsize=1)
def _material(subject: Subject, settings: SteerConfig) -> Material:
    texts = harvest_dataset(subject, settings.dataset)
    uses = divide(texts, settings)
    prompts, real = find_prompts(subject, texts, uses, settings), real_text(subject, texts, uses, settings)
    return Material(texts, uses, prompts, *concept_classifier(subject, texts, uses, settings), real)


def draw(results: dict[str, Any], path: Path) -> None:
    """Pareto fronts, curves over strengths, and each concept's usable interval."""
    draw_figure(results, path)


def _usual(generated: Generated, real: tuple[float, float]) -> tuple[float, float]:
    """Loss and distinct-2 that coherence is measured from: of unsteered text or of real text, whichever is worse."""
    return max(float(generated.loss[0].mean()), real[0]), min(float(generated.distinct_2[0].mean()), real[1])


def _decoded(subject: Subject, generated: Generated) -> list[list[str]]:
    """The generated text of each condition and prompt."""
    tokenizer = subject.language_model.tokenizer
    return [tokenizer.batch_decode(rows) for rows in generated.tokens.tolist()]


def _of_own_concept(every: Sequence[Condition], probabilities: np.ndarray) -> np.ndarray:
    """[N, P] probability [N, P, C] of the concept that a condition steers towards; of the control: the mean one."""
    return np.stack(
        [
            rows.mean(-1) if condition.direction is None else rows[:, condition.direction.concept]
            for condition, rows in zip(every, probabilities, strict=True)
        ]
    )


def _headline(drawn: Sequence[Curve], settings: SteerConfig) -> dict[str, Any]:
    """Area under the Pareto front and width of the usable interval, of latents and of the baselines."""
    kind = "multiple" if settings.multiples else "strength"
    headline: dict[str, float] = {}
    half_width: dict[str, float] = {}
    for curve in drawn:
        if curve.kind != kind:
            continue
        name = "" if curve.method == "latent" else f"_{curve.method.replace(' ', '_')}"
        results, width = curve_results(curve, settings), doublings(curve, settings)
        headline[f"pareto_area{name}"] = results["area"]
        half_width[f"pareto_area{name}"] = results["area_half_width_95"]
        headline[f"usable_doublings{name}"] = float(width.mean())
        half_width[f"usable_doublings{name}"] = bootstrap_mean(width, settings.bootstrap, settings.seed).half_width
    return {"headline": headline, "half_width_95": half_width}


def _concepts(subject: Subject, found: Sequence[Direction], uses: Uses) -> list[dict[str, Any]]:
    """What each concept is steered with."""
    own = {direction.concept: direction for direction in found if direction.method == "latent"}
    random = {direction.concept: direction for direction in found if direction.method == "random latent"}
    return [
        {
            "concept": name,
            "latent": own[index].latent,
            "explanation": subject.explanations.get(own[index].latent or 0),
            "auc": own[index].auc,
            "unit": own[index].unit,
            "random_latent": random[index].latent,
        }
        for index, name in enumerate(uses.concepts)
    ]


def _control(probabilities: np.ndarray, measures: dict[str, np.ndarray]) -> dict[str, Any]:
    """The unsteered texts: how probable each concept is in them, and how much sense they make."""
    return {
        "success": probabilities[0].mean(0).tolist(),
        "coherence": float(measures["coherence"][0].mean()),
        "perplexity": float(np.exp(measures["loss"][0].mean())),
        "distinct_2": float(measures["distinct_2"][0].mean()),
    }


def _by_concept(drawn: Sequence[Curve], uses: Uses) -> list[dict[str, Any]]:
    """Each concept's own curve: what paired comparisons of dictionaries need."""
    return [
        {
            "concept": name,
            "method": curve.method,
            curve.kind: list(curve.strengths),
            "success": [round(value, 4) for value in curve.success[index].tolist()],
            "coherence": [round(value, 4) for value in curve.coherence[index].tolist()],
        }
        for curve in drawn
        for index, name in enumerate(uses.concepts)
    ]


def _samples(
    every: Sequence[Condition],
    prompts: Prompts,
    written: list[list[str]],
    measures: dict[str, np.ndarray],
    uses: Uses,
) -> list[dict[str, Any]]:
    """The continuation of the first prompt under every condition, and of all prompts without steering."""
    places = [(0, prompt) for prompt in range(len(prompts.texts))]
    places += [(index, 0) for index in range(1, len(every))]
    found = []
    for index, prompt in places:
        condition = every[index]
        direction = condition.direction
        found.append(
            {
                "method": "unsteered" if direction is None else direction.method,
                "concept": None if direction is None else uses.concepts[direction.concept],
                "latent": None if direction is None else direction.latent,
                "multiple": condition.multiple,
                "strength": condition.strength,
                "prompt": prompts.texts[prompt],
                "text": written[index][prompt],
                "success": None if direction is None else round(float(measures["success"][index, prompt]), 4),
                "coherence": round(float(measures["coherence"][index, prompt]), 4),
            }
        )
    return found


def _judged(settings: SteerConfig, samples: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Grades of the samples by a language model, written beside each of them; None without one."""
    if settings.judge.backend == "none":
        return None
    from tsae.experiments.steer.scores import judge

    return judge(settings.judge, samples)


def _check(settings: SteerConfig, subject: Subject, chunk: int) -> None:
    split = subject.latents(chunk)
    settings.require_possible("steer", subject.dictionary.dict_size)
    for latent in settings.latents:
        if not split.start <= latent < split.stop:
            raise TsaeError(
                f"experiments.steer.latents: {latent} is not in this split, which has latents {split.start} to "
                f"{split.stop - 1}; name the split that has it by --chunk"
            )
