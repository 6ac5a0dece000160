"""What steered text is worth, without a judge: does it show the concept, and is it still text?

Shapes: N texts, T tokens each, C concepts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from tsae.lm.model import LanguageModel

LARGEST_LOSS = 50.0  # nats; text so improbable that its probability underflows


class ConceptClassifier:
    """Logistic regression on the words of passages as long as those that are generated."""

    def __init__(self, passages: Sequence[str], concept: np.ndarray, seed: int) -> None:
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline

        words = TfidfVectorizer(sublinear_tf=True)
        model = LogisticRegression(C=3.0, max_iter=1000, class_weight="balanced", random_state=seed)
        self._model = make_pipeline(words, model).fit(passages, concept)

    def probabilities(self, texts: Sequence[str]) -> np.ndarray:
        """[N, C]"""
        return np.asarray(self._model.predict_proba(texts))


def losses(lm: LanguageModel, tokens: Tensor, first: int, batch_size: int) -> np.ndarray:
    """[N] mean next-token loss in nats, under the model as it is, of the tokens [N, T] from position `first` on."""
    found = []
    for part in tokens.split(batch_size):
        logits = lm.logits(part, torch.full((len(part),), part.shape[1]))[:, first - 1 : -1].float()
        goal = part[:, first:].to(logits.device).long()
        found.append(torch.nn.functional.cross_entropy(logits.transpose(1, 2), goal, reduction="none").mean(1).cpu())
    return torch.cat(found).clamp(max=LARGEST_LOSS).double().numpy()


def distinct(tokens: np.ndarray, n: int = 2) -> np.ndarray:
    """[N] share of the n-grams of each row of tokens [N, T] that are different ones."""
    grams = np.lib.stride_tricks.sliding_window_view(tokens, n, axis=1)
    return np.array([len(np.unique(row, axis=0)) / len(row) for row in grams])


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
