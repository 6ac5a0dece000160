"""The judge-free measure of success: a classifier of short passages by concept, and how good it is."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import numpy as np

from tsae.errors import TsaeError
from tsae.experiments.settings import SteerConfig
from tsae.experiments.steer_concepts import SELECTION, TRAINING, Uses
from tsae.experiments.steer_measures import ConceptClassifier
from tsae.experiments.subject import Subject

if TYPE_CHECKING:
    from tsae.experiments.texts import TextActivations

PASSAGES_PER_TEXT = 16


def concept_classifier(
    subject: Subject, texts: TextActivations, uses: Uses, settings: SteerConfig
) -> tuple[ConceptClassifier, float]:
    """A classifier trained on texts of its own, and its balanced accuracy on the texts that chose the latents.

    Raises TsaeError if a concept has no text as long as those that are generated.
    """
    from sklearn.metrics import balanced_accuracy_score

    tokenizer = subject.language_model.tokenizer
    parts = []
    for folds in (TRAINING, SELECTION):
        passages, concept = _passages(tokenizer, texts, uses, uses.of(folds), settings.tokens)
        missing = sorted(set(range(len(uses.concepts))) - set(concept.tolist()))
        if missing:
            raise TsaeError(
                f"experiments.steer.tokens: no text on '{uses.concepts[missing[0]]}' has {settings.tokens} tokens to learn "
                "the concept from; generate fewer tokens"
            )
        parts.append((passages, concept))
    classifier = ConceptClassifier(*parts[0], settings.seed)
    passages, concept = parts[1]
    guesses = classifier.probabilities(passages).argmax(1)
    return classifier, float(balanced_accuracy_score(concept, guesses))


def _passages(
    tokenizer: Any, texts: TextActivations, uses: Uses, rows: np.ndarray, tokens: int
) -> tuple[list[str], np.ndarray]:
    """Pieces of `tokens` tokens of the texts `rows`, and the concept of each."""
    pieces, concept = [], []
    for row in rows:
        text = texts.texts[row].text
        ends = [
            end
            for _, end in tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)[
                "offset_mapping"
            ]
        ]
        edges = [0, *ends[tokens - 1 :: tokens]][: PASSAGES_PER_TEXT + 1]
        pieces += [text[start:end] for start, end in itertools.pairwise(edges)]
        concept += [uses.concept[row]] * (len(edges) - 1)
    return pieces, np.array(concept)
