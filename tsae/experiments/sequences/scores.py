"""How well latents follow the passages of a spliced context: numbers for what the paper shows in figures 1 and 4.

The paper gives two hand-picked examples and no scores; these are ours. Shapes: L positions, A latents that fire in the
context, P passages. `passage` [L] is the index of each token's passage, ascending.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np


class Scores(NamedTuple):
    """One context's scores; NaN where one is undefined (no latent fires, or nothing follows a passage)."""

    phase_auc: float
    """Mean over the top latents of the best single passage's ROC AUC against the rest; 0.5 to 1."""
    phase_information: float
    """Share of the entropy of a top latent's on/off pattern that the passage explains, mean; 0 to 1."""
    persistence: float
    """P(on at t+1 | on at t) inside passages, all latents pooled."""
    top_persistence: float
    """The same for the top latents."""
    boundary_lag: float
    """Tokens after a border until the code is nearer to the new passage than to the old one, mean over borders."""
    leakage: float
    """Share of a top latent's mass that comes after its best passage has ended, mean."""
    change_point_f1: float
    """F1 of the P - 1 largest changes of the code as guesses of the borders."""


def score(
    z: np.ndarray, passage: np.ndarray, top: int, rank: str = "total", window: int = 16, tolerance: int = 10
) -> Scores:
    """The scores of one context with feature activations z [L, A]; `top` latents by `rank` stand for the figure."""
    chosen = z[:, top_latents(z, top, rank)]
    return Scores(
        phase_auc=_mean(phase_auc(chosen, passage)),
        phase_information=_mean(phase_information(chosen, passage)),
        persistence=persistence(z, passage),
        top_persistence=persistence(chosen, passage),
        boundary_lag=_mean(boundary_lags(z, passage)),
        leakage=_mean(leakage(chosen, passage)),
        change_point_f1=change_point_f1(z, passage, window, tolerance),
    )


def top_latents(z: np.ndarray, top: int, rank: str) -> np.ndarray:
    """The columns of z [L, A] that are most active by `rank`, at most `top`, first the first."""
    measures = {
        "total": lambda: z.sum(0),
        "variance": lambda: z.var(0),
        "mean_active": lambda: z.sum(0) / np.maximum((z > 0).sum(0), 1),
    }
    return np.argsort(-measures[rank](), kind="stable")[:top]


def phase_auc(z: np.ndarray, passage: np.ndarray) -> np.ndarray:
    """[A]: AUC of the passage that a latent's activation singles out best, ties counted half."""
    from scipy.stats import rankdata

    ranks = rankdata(z, axis=0)
    inside = passage == np.unique(passage)[:, None]  # [P, L]
    n = inside.sum(1, keepdims=True)
    auc = ((inside @ ranks) / n - (n + 1) / 2) / (len(passage) - n)
    return auc.max(0)


def phase_information(z: np.ndarray, passage: np.ndarray) -> np.ndarray:
    """[A]: mutual information of passage and on/off pattern over the pattern's entropy; NaN for a constant one."""
    inside = passage == np.unique(passage)[:, None]
    share = inside.mean(1)  # [P]
    rate = (inside @ (z > 0).astype(float)) / inside.sum(1, keepdims=True)  # [P, A]
    entropy = _binary_entropy((z > 0).mean(0))
    left = (share[:, None] * _binary_entropy(rate)).sum(0)
    return np.where(entropy > 0, (entropy - left) / np.where(entropy > 0, entropy, 1), np.nan)


def persistence(z: np.ndarray, passage: np.ndarray) -> float:
    """P(on at t+1 | on at t), pooled over latents, for neighbours in one passage."""
    on, same = z > 0, passage[1:] == passage[:-1]
    fired = on[:-1][same].sum()
    return float((on[1:] & on[:-1])[same].sum() / fired) if fired else float("nan")


def boundary_lags(z: np.ndarray, passage: np.ndarray) -> np.ndarray:
    """[P - 1]: tokens after each border until the code's cosine with the new passage's mean exceeds the old one's.

    A token does not count towards the mean it is compared with; a passage that never gets there counts whole.
    """
    names = np.unique(passage)
    lags = []
    for before, after in itertools.pairwise(names):
        old, new = z[passage == before].sum(0), z[passage == after]
        nearer = _cosine(new, new.sum(0) - new) > _cosine(new, old)
        lags.append(float(nearer.argmax()) if nearer.any() else float(len(new)))
    return np.array(lags)


def leakage(z: np.ndarray, passage: np.ndarray) -> np.ndarray:
    """[A]: share of a latent's mass after its best passage (by mean activation); NaN where that is the last one."""
    names = np.unique(passage)
    means = np.stack([z[passage == name].mean(0) for name in names])  # [P, A]
    best = means.argmax(0)
    after = np.where(passage[:, None] > names[best], z, 0).sum(0)
    total = z.sum(0)
    defined = (best < len(names) - 1) & (total > 0)
    return np.where(defined, after / np.where(total > 0, total, 1), np.nan)


def change_point_f1(z: np.ndarray, passage: np.ndarray, window: int, tolerance: int) -> float:
    """F1 of the largest distances between the mean codes of `window` tokens before and after a place.

    As many places are guessed as there are borders, at least `tolerance` tokens apart; a border is found if a guess of
    its own lies within `tolerance` tokens. NaN where the context has no border or is too short for any guess.
    """
    borders = np.flatnonzero(np.diff(passage)) + 1
    distance = code_distance(z, window)
    if not len(borders) or np.isnan(distance).all():
        return float("nan")
    guesses = _peaks(distance, len(borders), tolerance)
    hits = _matches(borders, guesses, tolerance)
    return 2 * hits / (len(borders) + len(guesses))


def code_distance(z: np.ndarray, window: int) -> np.ndarray:
    """[L]: L2 distance of the mean codes of the `window` tokens before t and from t on; NaN near the ends."""
    total = np.concatenate([np.zeros((1, z.shape[1])), z.cumsum(0)])
    distance = np.full(len(z), np.nan)
    at = np.arange(window, len(z) - window + 1)
    if len(at):
        change = total[at + window] - 2 * total[at] + total[at - window]
        distance[at] = np.linalg.norm(change, axis=1) / window
    return distance


def _peaks(distance: np.ndarray, wanted: int, apart: int) -> list[int]:
    left = distance.copy()
    peaks: list[int] = []
    while len(peaks) < wanted and not np.isnan(left).all():
        peak = int(np.nanargmax(left))
        peaks.append(peak)
        left[max(peak - apart, 0) : peak + apart + 1] = np.nan
    return peaks


def _matches(borders: np.ndarray, guesses: list[int], tolerance: int) -> int:
    """The most borders that can each have a guess of their own; both in order, so the nearest free one serves."""
    free, hits = sorted(guesses), 0
    for border in borders:
        found = next((guess for guess in free if abs(guess - border) <= tolerance), None)
        if found is not None:
            free.remove(found)
            hits += 1
    return hits


def _cosine(z: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Cosine of each row of z [L, A] with `target` [A] or [L, A]; 0 where either is all zeros."""
    norms = np.linalg.norm(z, axis=-1) * np.linalg.norm(target, axis=-1)
    return np.divide((z * target).sum(-1), norms, out=np.zeros(len(z)), where=norms > 0)


def _binary_entropy(p: np.ndarray) -> np.ndarray:
    from scipy.special import entr

    return np.asarray(entr(p) + entr(1 - p))


def _mean(values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")


MIN_FIRINGS = 5  # fewer say nothing of what comes next


class SmoothnessCounts:
    """Sums over contexts from which each latent's lag-1 autocorrelation follows; F dict_size."""

    def __init__(self, dict_size: int) -> None:
        self._pairs = 0
        self._firings = np.zeros(dict_size)
        self._sums = np.zeros((5, dict_size))  # of now, next, now², next², now · next

    def add(self, z: np.ndarray, latents: np.ndarray, passage: np.ndarray) -> None:
        """Count a context with feature activations z [L, A] of `latents` [A]; no pair crosses a border of `passage` [L]."""
        same = passage[1:] == passage[:-1]
        now, later = z[:-1][same], z[1:][same]
        self._pairs += len(now)
        self._firings[latents] += (z > 0).sum(0)
        products = (now, later, now**2, later**2, now * later)
        self._sums[:, latents] += np.stack([product.sum(0) for product in products])

    def autocorrelation(self) -> np.ndarray:
        """[F]: lag-1 autocorrelation; NaN for a latent that fired too rarely to tell."""
        now, later, now2, later2, both = self._sums / max(self._pairs, 1)
        variance = np.sqrt(np.maximum(now2 - now**2, 0) * np.maximum(later2 - later**2, 0))
        known = (self._firings >= MIN_FIRINGS) & (variance > 0)
        return np.where(known, (both - now * later) / np.where(known, variance, 1), np.nan)

    def smoothest(self, share: float) -> np.ndarray:
        """The `share` of the latents that fired often enough which changes most slowly, ascending; at least one."""
        found = self.autocorrelation()
        known = np.flatnonzero(~np.isnan(found))
        order = known[np.argsort(-found[known], kind="stable")]
        return np.sort(order[: max(round(share * len(known)), 1)])
