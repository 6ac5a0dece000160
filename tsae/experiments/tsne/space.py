"""How tokens lie in the space of feature activations: neighbours, silhouettes, and a map of it.

Everything is by cosine: N tokens as rows of unit length, sparse [N, F] or dense [N, D].
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from tsae.runtime.environment import available_cores
from tsae.runtime.preemption import polled

if TYPE_CHECKING:
    from scipy.sparse import csr_array

ROWS_AT_ONCE = 1000
MAX_ITERATIONS = 500
"""Steps of t-SNE; twice as many change its loss by a hundredth."""
ANGLE = 0.8
"""Coarseness of the Barnes-Hut sums; a quarter less time than scikit-learn's 0.5, and the same loss."""


class Reduced(NamedTuple):
    """Points of the map [N, 2], and what was done before t-SNE."""

    points: np.ndarray
    reduction: str


def unit_rows(features: csr_array | np.ndarray) -> tuple[Any, np.ndarray]:
    """The rows that are not zero, at length 1, and which those are."""
    from sklearn.preprocessing import normalize

    kept = np.flatnonzero(np.asarray(abs(features).sum(1)).ravel() > 0)
    return normalize(features.astype(np.float32))[kept], kept


def purity(x: Any, label: np.ndarray, neighbours: int, text: np.ndarray | None = None) -> tuple[float, float]:
    """Share of the nearest neighbours of a token that have its label, averaged over tokens; and what chance gives.

    Tokens of one `text` [N], if given, are no neighbours of each other. `label` [N] is -1 for tokens without one,
    which are left out. NaN if no token has enough others.
    """
    known = np.flatnonzero(label >= 0)
    x, label = x[known], label[known]
    text = None if text is None else text[known]
    size = np.bincount(label, minlength=1)
    found, chance = [], []
    for start in polled(range(0, len(label), ROWS_AT_ONCE)):
        mine = np.arange(start, min(start + ROWS_AT_ONCE, len(label)))
        likeness = x[mine] @ x.T
        likeness = likeness if isinstance(likeness, np.ndarray) else likeness.toarray()
        likeness[mine - start, mine] = -np.inf
        alike = size[label[mine]] - 1.0
        others = np.full(len(mine), len(label) - 1.0)
        if text is not None:
            same = text[mine][:, None] == text
            likeness[same] = -np.inf
            others = len(label) - same.sum(1).astype(float)
            alike = size[label[mine]] - (same & (label[mine][:, None] == label)).sum(1)
        enough = others >= neighbours
        if len(label) <= neighbours or not enough.any():
            continue
        nearest = np.argpartition(likeness, -neighbours, axis=1)[:, -neighbours:]
        found.append((label[nearest] == label[mine][:, None]).mean(1)[enough])
        chance.append((alike / np.maximum(others, 1))[enough])
    if not found:
        return float("nan"), float("nan")
    return float(np.concatenate(found).mean()), float(np.concatenate(chance).mean())


def silhouette(x: Any, label: np.ndarray) -> float:
    """Mean silhouette by cosine distance over tokens with a label, as scikit-learn defines it; NaN without two classes.

    The mean cosine to a class is the product with its mean row, so that no distance of two tokens is ever needed.
    """
    known = np.flatnonzero(label >= 0)
    names, label = np.unique(label[known], return_inverse=True)
    if len(names) < 2:
        return float("nan")
    x = x[known]
    member = np.zeros((len(names), len(label)), np.float32)
    member[label, np.arange(len(label))] = 1
    size = member.sum(1)
    sums = np.asarray(x @ np.asarray(member @ x).T, np.float64)  # [N, C] cosines to all tokens of a class, summed
    own = np.arange(len(label)), label
    others = np.maximum(size[label] - 1, 1)
    within = 1 - (sums[own] - 1) / others
    between = 1 - sums / size
    between[own] = np.inf
    nearest = between.min(1)
    values = (nearest - within) / np.maximum(np.maximum(within, nearest), 1e-12)
    return float(np.where(size[label] > 1, values, 0).mean())


def draw_map(x: Any, dimensions: int, perplexity: float, seed: int) -> Reduced:
    """t-SNE of the tokens after a singular value decomposition to `dimensions`."""
    from sklearn.decomposition import PCA, TruncatedSVD
    from sklearn.manifold import TSNE

    sparse = not isinstance(x, np.ndarray)
    dimensions = min(dimensions, x.shape[0] - 1, x.shape[1] - 1)
    kind: Any = TruncatedSVD if sparse else PCA
    decomposition = kind(dimensions, random_state=seed)
    reduced = decomposition.fit_transform(x)
    share = float(decomposition.explained_variance_ratio_.sum())
    perplexity = min(perplexity, (len(reduced) - 1) / 3)
    tsne = TSNE(
        2,
        perplexity=perplexity,
        init="pca",
        random_state=seed,
        max_iter=MAX_ITERATIONS,
        angle=ANGLE,
        n_jobs=available_cores(),
    )
    name = "truncated SVD" if sparse else "PCA"
    return Reduced(
        tsne.fit_transform(reduced), f"{name} to {dimensions} dimensions ({share:.0%} of the variance), then t-SNE"
    )
