"""What is known of each latent from its activations: how often it fires, how strongly, how smoothly."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from tsae.experiments.shared.firings import Firings


class LatentStatistics(NamedTuple):
    """Each [F]; NaN where a latent never fires."""

    rate: np.ndarray
    """Share of the tokens at which it fires."""
    largest: np.ndarray
    """Largest activation."""
    mean: np.ndarray
    """Mean activation where it fires."""
    smoothness: np.ndarray
    """Largest step of the activation over the step of x, mean over the texts in which it fires (paper section 4.3)."""
    persistence: np.ndarray
    """Share of its firings after which it fires at the next token too, among those that have a next token."""


def latent_statistics(firings: Firings) -> LatentStatistics:
    """The figures of every latent; lower smoothness is smoother."""
    counts = firings.counts.astype(np.float64)
    fires = counts > 0
    sums = np.add.reduceat(np.append(firings.values, 0.0), firings.offsets[:-1])
    tops = np.maximum.reduceat(np.append(firings.values, 0.0), firings.offsets[:-1])
    undefined = np.full(len(counts), np.nan)
    return LatentStatistics(
        rate=counts / firings.n_tokens,
        largest=np.where(fires, tops, np.nan),
        mean=np.divide(sums, counts, out=undefined.copy(), where=fires),
        smoothness=_smoothness(firings),
        persistence=_persistence(firings),
    )


def texts(firings: Firings) -> np.ndarray:
    """[S, L] int32: number of the text that each position belongs to, a run of one document in one sequence; -1: none."""
    document = firings.document
    begins = np.ones(document.shape, bool)
    begins[:, 1:] = document[:, 1:] != document[:, :-1]
    begins &= document >= 0
    return np.where(document >= 0, np.cumsum(begins).reshape(document.shape) - 1, -1).astype(np.int32)


def _continues(firings: Firings) -> np.ndarray:
    """[S · L + 1] bool: whether a position goes on with the text of the position before it."""
    return np.append(~np.isnan(firings.distance.reshape(-1)), False)


def _persistence(firings: Firings) -> np.ndarray:
    places, latents = firings.places, firings.latents
    has_next = _continues(firings)[places + 1]
    again = np.zeros(len(places), bool)
    again[:-1] = (places[1:] == places[:-1] + 1) & (latents[1:] == latents[:-1])
    possible = np.bincount(latents[has_next], minlength=firings.dict_size).astype(np.float64)
    repeated = np.bincount(latents[has_next & again], minlength=firings.dict_size)
    return np.divide(repeated, possible, out=np.full(firings.dict_size, np.nan), where=possible > 0)


def _smoothness(firings: Firings) -> np.ndarray:
    """Every firing is a step up from the value before it and, unless it goes on, a step down to the value after it."""
    places, values, latents = firings.places, firings.values, firings.latents
    follows = np.zeros(len(places), bool)
    follows[1:] = (places[1:] == places[:-1] + 1) & (latents[1:] == latents[:-1])
    before = np.where(follows, np.append(np.float32(0), values[:-1]), 0)
    ends = ~np.append(follows[1:], False)
    steepness = np.maximum(
        _slope(firings, places, np.abs(values - before)), np.where(ends, _slope(firings, places + 1, values), 0)
    )
    text = texts(firings).reshape(-1)[places]
    first = np.ones(len(places), bool)
    first[1:] = (text[1:] != text[:-1]) | (latents[1:] != latents[:-1])
    starts = np.flatnonzero(first)
    if not len(starts):
        return np.full(firings.dict_size, np.nan)
    steepest = np.maximum.reduceat(steepness, starts)
    owner = latents[starts]
    number = np.bincount(owner, minlength=firings.dict_size).astype(np.float64)
    total = np.bincount(owner, weights=steepest, minlength=firings.dict_size)
    return np.divide(total, number, out=np.full(firings.dict_size, np.nan), where=number > 0)


def _slope(firings: Firings, places: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """|step of f| over |step of x| at each place; 0 where no text goes on, or x does not move."""
    distance = np.append(firings.distance.reshape(-1), np.nan)[places]
    moves = np.nan_to_num(distance, nan=0.0) > 0
    return np.divide(steps, distance, out=np.zeros(len(places), np.float64), where=moves)
