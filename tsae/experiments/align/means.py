"""Mean feature activations of responses, as sparse arrays over pairs.

Shapes: P pairs, S = 2P dialogues (the chosen ones first), L positions, F latents of a split.
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
