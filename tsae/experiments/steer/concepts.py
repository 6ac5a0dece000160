"""Concepts to steer towards: their texts, the directions that stand for them, and a classifier that knows them.

A concept is a label. Of its texts two fifths choose the latent and the direction, two fifths train the classifier, and
one fifth gives prompts and the measure of real text. Shapes: C concepts, S texts, F latents, D activation_dim.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tsae.config.experiments import SteerConfig
from tsae.experiments.shared.subject import Subject
from tsae.experiments.shared.texts import draw_texts
from tsae.runtime.errors import TsaeError, suggestion

if TYPE_CHECKING:
    from tsae.experiments.shared.texts import TextActivations

SELECTION, TRAINING, REAL = (0, 1), (2, 3), (4,)
"""Uses of a concept's texts: places of a text in its class, modulo 5."""
FOLDS = 5
MIN_TEXTS = 10
QUANTILE = 0.999
TINY = 1e-30


class Direction(NamedTuple):
    """One way to steer towards a concept."""

    method: str
    """`latent`, `random latent` or `difference of means`."""
    concept: int
    latent: int | None
    vector: Tensor
    """[D] what a strength of 1 adds; of norm 1 for a latent, as feature activations are in the units of what is written."""
    unit: float
    """Strength of the multiple 1: the 99.9th percentile of the latent's activation where it is active."""
    auc: float | None
    """How well the latent's mean activation tells the concept's texts, on the texts it was chosen on."""


class Uses(NamedTuple):
    """Indices of texts by use, and the concept of each text."""

    concepts: tuple[str, ...]
    concept: np.ndarray
    """[S] index of the concept, -1 for another label."""
    fold: np.ndarray
    """[S] place of the text in its class, modulo 5."""

    def of(self, folds: Sequence[int], concepts_only: bool = True) -> np.ndarray:
        """The texts of a use."""
        wanted = np.isin(self.fold, folds)
        return np.flatnonzero(wanted & (self.concept >= 0) if concepts_only else wanted)


def divide(texts: TextActivations, settings: SteerConfig) -> Uses:
    """Which text serves for what. Raises TsaeError for a concept that is not there or has too few texts."""
    names = texts.label_names
    for name in settings.concepts:
        if name not in names:
            raise TsaeError(
                f"experiments.steer.concepts: no text is labelled '{name}'; {suggestion(name, names)}"
                f"labels read: {', '.join(names)} (experiments.texts.classes names others)"
            )
    chosen = settings.concepts or names[: settings.max_concepts]
    if len(chosen) < 2:
        raise TsaeError(f"experiments.steer.concepts: {len(chosen)} concept; at least 2 are needed to tell them apart")
    fold = np.zeros(len(texts.texts), np.int64)
    for index, name in enumerate(names):
        own = np.flatnonzero(texts.label == index)
        fold[own] = np.arange(len(own)) % FOLDS
        if name in chosen and len(own) < MIN_TEXTS:
            raise TsaeError(
                f"experiments.steer.concepts: '{name}' has {len(own)} texts; {MIN_TEXTS} are needed; raise "
                "experiments.texts.count or name other concepts"
            )
    place = {names.index(name): index for index, name in enumerate(chosen)}
    return Uses(tuple(chosen), np.array([place.get(label, -1) for label in texts.label.tolist()]), fold)


def directions(
    subject: Subject, texts: TextActivations, uses: Uses, split: slice, settings: SteerConfig
) -> list[Direction]:
    """For each concept its latent, a random one that is alive, and the difference of means, scaled to the same norm.

    Raises TsaeError for a latent that never fires and for a split without enough latents that do.
    """
    rows = uses.of(SELECTION)
    concept = uses.concept[rows]
    text, positions = np.nonzero(texts.valid[rows])
    codes: Any = texts.features(subject, rows[text], positions)
    codes = codes.tocsc()
    means = _by_text(codes, text, len(rows))  # [S, F]
    alive = np.flatnonzero(np.diff(codes.indptr)[split]) + split.start
    if len(alive) < 2 * len(uses.concepts):
        raise TsaeError(
            f"{subject.run.path}: {len(alive)} latents of the split fire on the chosen texts; at least "
            f"{2 * len(uses.concepts)} are needed for {len(uses.concepts)} concepts"
        )
    latents = settings.latents or choose_latents(means[:, alive], concept, alive, settings.choose)
    rest = np.setdiff1d(alive, latents)
    random = np.random.default_rng(settings.seed).choice(rest, len(uses.concepts), replace=False)
    differences = _differences(texts, rows, concept)
    found = []
    for index in range(len(uses.concepts)):
        own = _latent(subject, codes, "latent", index, int(latents[index]))
        auc = _auc(means[:, [own.latent]].toarray(), concept == index)[0]
        found.append(own._replace(auc=float(auc)))
        found.append(_latent(subject, codes, "random latent", index, int(random[index])))
        vector = differences[index] * (own.vector.norm() / differences[index].norm())
        found.append(Direction("difference of means", index, None, vector, own.unit, None))
    return found


def _latent(subject: Subject, codes: Any, method: str, concept: int, latent: int) -> Direction:
    values = codes.data[codes.indptr[latent] : codes.indptr[latent + 1]]
    if not len(values):
        raise TsaeError(
            f"experiments.steer.latents: latent {latent} never fires on the chosen texts; it is dead or about something else"
        )
    row = subject.dictionary.W_dec[latent].detach().float()
    vector = (row / subject.row_norms[latent].clamp_min(TINY)).cpu()  # a row of zeros writes nothing
    return Direction(method, concept, latent, vector, float(np.quantile(values, QUANTILE)), None)


def _by_text(codes: Any, text: np.ndarray, count: int) -> Any:
    """Mean feature activations of each text, sparse [S, F]."""
    from scipy.sparse import csr_array

    weight = 1.0 / np.bincount(text, minlength=count)[text]
    return (csr_array((weight, (text, np.arange(len(text)))), shape=(count, len(text))) @ codes).tocsc()


def choose_latents(means: Any, concept: np.ndarray, alive: np.ndarray, rule: str) -> list[int]:
    """The best latent for each concept by `rule`; none serves two concepts."""
    dense = means.toarray()
    scores = np.stack(
        [
            dense[concept == index].mean(0) - dense.mean(0) if rule == "lift" else _auc(dense, concept == index)
            for index in range(concept.max() + 1)
        ]
    )
    latents: list[int] = []
    for row in scores:
        row[np.isin(alive, latents)] = -np.inf
        latents.append(int(alive[row.argmax()]))
    return latents


def _auc(values: np.ndarray, positive: np.ndarray) -> np.ndarray:
    """ROC AUC of each column of values [S, F]; ties count half."""
    from scipy.stats import rankdata

    n, m = positive.sum(), (~positive).sum()
    return np.asarray((rankdata(values, axis=0)[positive].sum(0) - n * (n + 1) / 2) / (n * m))


def _differences(texts: TextActivations, rows: np.ndarray, concept: np.ndarray) -> list[Tensor]:
    """For each concept the mean activation [D] of its tokens minus that of all other concepts' tokens."""
    count = int(concept.max()) + 1
    sums, tokens = torch.zeros(count, texts.store.activation_dim), torch.zeros(count)
    for start in range(0, len(rows), 64):
        part = slice(start, start + 64)
        valid = torch.from_numpy(texts.valid[rows[part]])
        owner = torch.from_numpy(concept[part])
        x = torch.where(valid[..., None], texts.read(rows[part]), 0.0).sum(1)
        sums.index_add_(0, owner, x)
        tokens.index_add_(0, owner, valid.sum(1).float())
    total, every = sums.sum(0), tokens.sum()
    return [sums[i] / tokens[i] - (total - sums[i]) / (every - tokens[i]) for i in range(count)]


PASSAGES_PER_TEXT = 8


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
