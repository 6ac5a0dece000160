"""The judge-free measure of success: a classifier of short passages by concept, and how good it is."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from tsae.config.experiments import SteerConfig
from tsae.experiments.shared.choice import draw_texts
from tsae.experiments.shared.subject import Subject
from tsae.experiments.steer.concepts import SELECTION, TRAINING, Uses
from tsae.experiments.steer.measures import ConceptClassifier
from tsae.runtime.errors import TsaeError

if TYPE_CHECKING:
    from tsae.experiments.shared.texts import TextActivations

PASSAGES_PER_TEXT = 8


def concept_classifier(
    subject: Subject, texts: TextActivations, uses: Uses, settings: SteerConfig
) -> tuple[ConceptClassifier, float]:
    """A classifier trained on texts of its own, and its balanced accuracy on the texts that chose the latents.

    Raises TsaeError if a concept has no text as long as those that are generated.
    """
    from sklearn.metrics import balanced_accuracy_score

    training = [*_texts(texts, uses, TRAINING), *_further(subject, texts, uses, settings)]
    learnt = _passages(subject, training, settings.tokens)
    tested = _passages(subject, _texts(texts, uses, SELECTION), settings.tokens)
    for index, name in enumerate(uses.concepts):
        if index not in learnt[1] or index not in tested[1]:
            raise TsaeError(
                f"experiments.steer.tokens: no text on '{name}' has {settings.tokens} tokens to learn the concept from; "
                "generate fewer tokens"
            )
    classifier = ConceptClassifier(*learnt, settings.seed)
    guesses = classifier.probabilities(tested[0]).argmax(1)
    return classifier, float(balanced_accuracy_score(tested[1], guesses))


def _texts(texts: TextActivations, uses: Uses, folds: Sequence[int]) -> list[tuple[str, int]]:
    return [(texts.texts[row].text, int(uses.concept[row])) for row in uses.of(folds)]


def _further(subject: Subject, texts: TextActivations, uses: Uses, settings: SteerConfig) -> Iterator[tuple[str, int]]:
    """Texts of the concepts that are not among those whose activations are read."""
    if not settings.classifier_texts:
        return
    read = {text.text for text in texts.texts}
    wanted = subject.config.experiments.texts
    count = (settings.classifier_texts + len(read) // len(uses.concepts)) * len(uses.concepts)
    left = dict.fromkeys(uses.concepts, settings.classifier_texts)
    for text in draw_texts(settings.dataset, dataclasses.replace(wanted, classes=uses.concepts, count=count)):
        if text.text not in read and left[text.label]:
            left[text.label] -= 1
            yield text.text, uses.concepts.index(text.label)


def _passages(subject: Subject, texts: Sequence[tuple[str, int]], tokens: int) -> tuple[list[str], np.ndarray]:
    """Pieces of `tokens` tokens of each text, and the concept of each."""
    tokenizer = subject.language_model.tokenizer
    pieces, concepts = [], []
    for text, concept in texts:
        offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)[
            "offset_mapping"
        ]
        edges = [0, *(end for _, end in offsets[tokens - 1 :: tokens])][: PASSAGES_PER_TEXT + 1]
        pieces += [text[start:end] for start, end in itertools.pairwise(edges)]
        concepts += [concept] * (len(edges) - 1)
    return pieces, np.array(concepts)
