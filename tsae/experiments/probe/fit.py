"""Logistic regressions on a few features, or on all, and their scores.

Shapes: N tokens, F features, C classes. Codes stay sparse; only the columns of a sparse probe are ever dense.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from tsae.runtime.preemption import polled

if TYPE_CHECKING:
    from scipy.sparse import csc_array

    from tsae.experiments.shared.firings import Features

MAX_ITERATIONS = 300
DENSE_STRENGTH = 0.01
"""Inverse regularisation of probes on all features; with scikit-learn's 1 they learn rare latents by heart."""


class Scores(NamedTuple):
    """How well probes name the class of test tokens."""

    accuracy: float
    balanced_accuracy: float
    """Mean over classes of the share of their tokens that are named right."""
    one_vs_rest: float | None
    """Mean over classes of the balanced accuracy of telling the class from the rest; chance is 1/2."""


class Split(NamedTuple):
    """Features and labels of the training and of the test tokens."""

    train: csc_array | np.ndarray
    train_label: np.ndarray
    test: csc_array | np.ndarray
    test_label: np.ndarray
    classes: int


def take(features: Features, label: np.ndarray, train: np.ndarray, test: np.ndarray) -> Split:
    """The split of `features` [N, F] into training and test tokens, by columns."""
    parts: list[Any] = [features[train], features[test]]
    if not isinstance(features, np.ndarray):
        parts = [part.tocsc() for part in parts]
    return Split(parts[0], label[train], parts[1], label[test], int(label.max()) + 1)


def rank(data: Split, label: np.ndarray, most: int, signed: bool) -> np.ndarray:
    """[C, k] the features whose mean on the tokens of a class lies farthest from that on the others, by `label`.

    `signed`: farthest above it, as in the released code.
    """
    member = np.zeros((data.classes, len(label)), np.float32)
    member[label, np.arange(len(label))] = 1
    sums = np.asarray(member @ data.train, np.float64)
    size = member.sum(1)[:, None]
    others = np.maximum(len(label) - size, 1)
    difference = sums / np.maximum(size, 1) - (sums.sum(0) - sums) / others
    distance = difference if signed else np.abs(difference)
    return np.argsort(-distance, axis=1, kind="stable")[:, :most]


def sparse_probes(data: Split, label: np.ndarray, features: tuple[int, ...]) -> dict[int, Scores]:
    """For each k, a probe for every class on its own k features; the class of the highest score is named.

    Trained on `label`, which the control shuffles, and scored on the true labels of the test tokens.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    chosen = rank(data, label, min(max(features), data.train.shape[1]), signed=False)
    scores = {k: np.full((len(data.test_label), data.classes), -np.inf) for k in features}
    for name in polled(range(data.classes)):
        target = label == name
        if not target.any():
            continue
        scaler = StandardScaler().fit(columns(data.train, chosen[name]))
        train, test = (scaler.transform(columns(part, chosen[name])) for part in (data.train, data.test))
        for k in features:
            probe = LogisticRegression(class_weight="balanced", solver="newton-cholesky")
            probe.fit(train[:, :k], target)
            scores[k][:, name] = probe.decision_function(test[:, :k])
    return {k: _scores(found, data) for k, found in scores.items()}


def _scores(decision: np.ndarray, data: Split) -> Scores:
    """Of decision values [N, C] of one-against-rest probes."""
    accuracy, balanced = accuracies(decision.argmax(1), data)
    present = np.unique(data.test_label)
    binary = [_binary(decision[:, name] > 0, data.test_label == name) for name in present]
    return Scores(accuracy, balanced, float(np.mean(binary)))


def _binary(said: np.ndarray, truth: np.ndarray) -> float:
    """Mean of the hit rate and the rejection rate."""
    rejected = (~said[~truth]).mean() if (~truth).any() else 1.0
    return float((said[truth].mean() + rejected) / 2)


def dense_probe(data: Split, label: np.ndarray) -> Scores:
    """One multinomial probe on all features that vary, each divided by its spread."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    is_dense = isinstance(data.train, np.ndarray)
    kept: Any = slice(None) if isinstance(data.train, np.ndarray) else np.flatnonzero(np.diff(data.train.indptr))
    # Centring would make sparse codes dense; the probe's intercept does its work.
    probe = make_pipeline(
        StandardScaler(with_mean=is_dense),
        LogisticRegression(C=DENSE_STRENGTH, class_weight="balanced", max_iter=MAX_ITERATIONS, tol=1e-3),
    )
    said = _fitted(probe, _rows(data.train, kept), label).predict(_rows(data.test, kept))
    return Scores(*accuracies(said, data), None)


def reference_probe(data: Split, label: np.ndarray, k: int) -> Scores:
    """The released code's probe: one multinomial regression, not standardised, on the union of k features per class."""
    from sklearn.linear_model import LogisticRegression

    kept = np.unique(rank(data, label, min(k, data.train.shape[1]), signed=True))
    said = _fitted(LogisticRegression(), _rows(data.train, kept), label).predict(_rows(data.test, kept))
    return Scores(*accuracies(said, data), None)


def majority(data: Split) -> Scores:
    """Always naming the most frequent class of the training tokens."""
    said = np.full(len(data.test_label), np.bincount(data.train_label).argmax())
    return Scores(*accuracies(said, data), None)


def accuracies(said: np.ndarray, data: Split) -> tuple[float, float]:
    """Share of test tokens named right, and its mean over the classes among them."""
    right = said == data.test_label
    return float(right.mean()), float(
        np.mean([right[data.test_label == name].mean() for name in np.unique(data.test_label)])
    )


def columns(features: csc_array | np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """[N, k] dense float64."""
    part = features[:, chosen]
    return np.asarray(part if isinstance(part, np.ndarray) else part.toarray(), np.float64)


def _rows(features: csc_array | np.ndarray, kept: Any) -> Any:
    return features[:, kept] if isinstance(features, np.ndarray) else features[:, kept].tocsr()


def _fitted(probe: Any, features: Any, label: np.ndarray) -> Any:
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():
        # Stopping early only regularises more; accuracy has settled long before.
        warnings.simplefilter("ignore", ConvergenceWarning)
        return probe.fit(features, label)
