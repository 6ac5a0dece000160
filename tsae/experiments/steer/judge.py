"""Grades of steered text by a language model: concept and coherence, 0 to 3 each, as in the paper's appendix B.2."""

from __future__ import annotations

import re
from typing import Any

from tsae.config.experiments import AnswersConfig
from tsae.experiments.answers.ask import Prompt, open_backend
from tsae.runtime.progress import Progress

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
