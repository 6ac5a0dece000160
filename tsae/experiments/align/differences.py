"""Differences of sparse feature activations over pairs of responses, tested, and separated from what a difference in length explains.

Shapes: P pairs, S = 2P dialogues (the chosen ones first), L positions, F latents of a split. Differences [P, F] are sparse
and are never made dense.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from tsae.experiments.align.pairs import Pairs
from tsae.experiments.shared.subject import Subject
from tsae.runtime.preemption import polled
from tsae.runtime.progress import Progress

if TYPE_CHECKING:
    from tsae.experiments.shared.texts import TextActivations

DIALOGUES_AT_ONCE = 64


class Differences(NamedTuple):
    """Rejected minus chosen, sparse [P, F]; and the lengths behind them."""

    response: Any
    """Of the means over response tokens."""
    beginning: Any
    """Of the means over the first m response tokens, m the length of the shorter one: no response goes further."""
    dialogue: Any
    """Of the means over all tokens, prompt included: what the paper does."""
    lengths: np.ndarray
    """[P, 2] response tokens of the chosen and the rejected side."""
    kept: np.ndarray
    """[P] which of the pairs that were read these are: those with response tokens on both sides."""


def differences(subject: Subject, texts: TextActivations, pairs: Pairs, split: slice) -> Differences:
    """The differences of every pair whose responses both have tokens left."""
    starts = np.array([side.start for side in (*pairs.chosen, *pairs.rejected)])
    response = texts.valid & (texts.offsets[..., 0] >= starts[:, None])
    lengths = response.sum(1).reshape(2, -1).T  # [P, 2]
    shorter = np.tile(lengths.min(1), 2)
    beginning = response & (response.cumsum(1) <= shorter[:, None])
    means = _means(subject, texts, (response, beginning, texts.valid), split)
    kept = np.flatnonzero(lengths.min(1) > 0)
    half = len(pairs.chosen)
    response_d, beginning_d, dialogue_d = (mean[half + kept] - mean[kept] for mean in means)
    return Differences(response_d, beginning_d, dialogue_d, lengths[kept], kept)


def _means(subject: Subject, texts: TextActivations, masks: tuple[np.ndarray, ...], split: slice) -> list[Any]:
    """Mean feature activations [S, F] over the tokens in each of `masks` [S, L], sparse."""
    from scipy.sparse import vstack

    progress = Progress("align", len(texts.texts), "dialogues")
    parts: list[list[Any]] = [[] for _ in masks]
    for start in polled(range(0, len(texts.texts), DIALOGUES_AT_ONCE)):
        batch = slice(start, min(start + DIALOGUES_AT_ONCE, len(texts.texts)))
        rows, positions = np.nonzero(texts.valid[batch])
        codes = texts.features(subject, rows + start, positions)[:, split]
        for part, mask in zip(parts, masks, strict=True):
            part.append(_averaging(rows, mask[batch][rows, positions], batch.stop - start) @ codes)
        progress.update(batch.stop)
    return [vstack(part, format="csr") for part in parts]


def _averaging(rows: np.ndarray, wanted: np.ndarray, size: int) -> Any:
    """The sparse [size, N] matrix that averages the `wanted` of N tokens by their row; zeros for a row without any."""
    from scipy.sparse import csr_array

    counts = np.bincount(rows[wanted], minlength=size)
    places = np.flatnonzero(wanted)
    return csr_array((1.0 / counts[rows[places]], (rows[places], places)), shape=(size, len(rows)))


class PairedTest(NamedTuple):
    """The paired t-test of each latent [F]; NaN where a latent never differs."""

    mean: np.ndarray
    effect: np.ndarray
    """Mean over standard deviation."""
    p: np.ndarray


class LengthTest(NamedTuple):
    """What is left of each latent's difference [F] once length is accounted for."""

    correlation: np.ndarray
    """Pearson's r of the difference with the difference in length."""
    correlation_p: np.ndarray
    intercept: np.ndarray
    """Expected difference of two responses of one length, from a regression on the length difference and its square."""
    p: np.ndarray
    """Of the intercept being 0, by White's standard errors: longer responses have less noise."""


def paired_test(difference: Any) -> PairedTest:
    """The paired t-test of sparse differences [P, F]."""
    from scipy.stats import t

    n = difference.shape[0]
    mean = np.asarray(difference.sum(0)).ravel() / n
    square = np.asarray(difference.multiply(difference).sum(0)).ravel()
    deviation = np.sqrt(np.maximum(square - n * mean**2, 0) / max(n - 1, 1))
    effect = np.divide(mean, deviation, out=np.full(len(mean), np.nan), where=deviation > 0)
    return PairedTest(mean, effect, 2 * t.sf(np.abs(effect) * np.sqrt(n), max(n - 1, 1)))


def length_test(difference: Any, length: np.ndarray, block: int = 512) -> LengthTest:
    """Regress each column of sparse differences [P, F] on the length differences [P]; `block` latents at a time."""
    from scipy.stats import norm

    columns = difference.tocsc()
    n, latents = columns.shape
    scale = length.std() or 1.0
    x = length / scale
    design = np.stack([np.ones(n), x, x**2], 1)
    weights = np.linalg.pinv(design)  # [3, P]
    intercept, error, correlation = (np.full(latents, np.nan) for _ in range(3))
    centred = (x - x.mean()) / (np.linalg.norm(x - x.mean()) or np.nan)
    for start in range(0, latents, block):
        part = slice(start, min(start + block, latents))
        y = columns[:, part].toarray()
        fitted = weights @ y
        intercept[part] = fitted[0]
        residual = y - design @ fitted
        error[part] = np.sqrt((weights[0] ** 2) @ residual**2 * n / max(n - design.shape[1], 1))
        norms = np.linalg.norm(y - y.mean(0), axis=0)
        correlation[part] = np.divide(centred @ y, norms, out=np.full(y.shape[1], np.nan), where=norms > 0)
    ratio = np.divide(intercept, error, out=np.full(latents, np.nan), where=error > 0)
    return LengthTest(correlation, _correlation_p(correlation, n), intercept, 2 * norm.sf(np.abs(ratio)))


def _correlation_p(r: np.ndarray, n: int) -> np.ndarray:
    from scipy.stats import t

    return np.asarray(2 * t.sf(np.abs(r) * np.sqrt((n - 2) / np.maximum(1 - r**2, 1e-300)), n - 2))


def false_discovery(p: np.ndarray, tested: np.ndarray) -> np.ndarray:
    """[F]: Benjamini and Hochberg's q-values over the latents where `tested` is true and p is defined; NaN elsewhere."""
    from scipy.stats import false_discovery_control

    q = np.full(len(p), np.nan)
    known = tested & ~np.isnan(p)
    if known.any():
        q[known] = false_discovery_control(p[known], method="bh")
    return q
