"""Short texts cut from what was read, and which of them a latent is active in: the units of explaining and scoring."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from tsae.experiments.shared.firings import Firings
from tsae.experiments.shared.latents import texts


class Windows(NamedTuple):
    """W texts of consecutive positions of one document, none overlapping."""

    first: np.ndarray
    """Place of the first position of each [W]."""
    last: np.ndarray
    """Place of the last position of each [W]."""
    document: np.ndarray
    """Document of each [W]."""
    number: np.ndarray
    """Window of each place [S · L], -1 for none."""


def cut(firings: Firings, length: int) -> Windows:
    """Windows of `length` positions; what remains of a text is one too if it is half as long."""
    text = texts(firings).reshape(-1)
    places = np.flatnonzero(text >= 0)
    owner = text[places]
    begins = np.flatnonzero(np.append(True, owner[1:] != owner[:-1]))
    step = np.arange(len(places)) - np.repeat(begins, np.diff(np.append(begins, len(places))))
    starts = np.flatnonzero(step % length == 0)
    ends = np.append(starts[1:], len(places)) - 1
    long_enough = ends - starts + 1 >= (length + 1) // 2
    starts, ends = starts[long_enough], ends[long_enough]
    number = np.full(text.shape, -1, np.int32)
    for window, (start, end) in enumerate(zip(starts, ends, strict=True)):
        number[places[start : end + 1]] = window
    document = firings.document.reshape(-1)[places[starts]]
    return Windows(places[starts], places[ends], document, number)


def peaks(firings: Firings, windows: Windows, latent: int) -> tuple[np.ndarray, np.ndarray]:
    """The windows in which a latent is active, ascending, and its largest activation in each."""
    places, values = firings.of(latent)
    number = windows.number[places]
    inside = number >= 0
    number, values = number[inside], values[inside]
    starts = np.flatnonzero(np.append(True, number[1:] != number[:-1])) if len(number) else np.empty(0, np.int64)
    return number[starts], np.maximum.reduceat(values, starts) if len(starts) else values


def strongest_per_document(windows: Windows, active: np.ndarray, peak: np.ndarray) -> np.ndarray:
    """Of the windows `active`, the one with the largest peak of each document, strongest first."""
    order = np.lexsort((active, -peak))
    _, first = np.unique(windows.document[active[order]], return_index=True)
    return active[order[np.sort(first)]]


def any_per_document(
    windows: Windows, active: np.ndarray, peak: np.ndarray, generator: np.random.Generator
) -> np.ndarray:
    """Of the windows `active`, a random one of each document, those with the largest peaks first."""
    order = generator.permutation(len(active))
    _, first = np.unique(windows.document[active[order]], return_index=True)
    chosen = np.sort(order[first])
    return active[chosen[np.argsort(-peak[chosen], kind="stable")]]


def spread(ranked: np.ndarray, count: int) -> np.ndarray:
    """`count` of the items, evenly over their ranks, the first and the last among them; all if there are fewer."""
    if len(ranked) <= count:
        return ranked
    return ranked[np.linspace(0, len(ranked) - 1, count).round().astype(np.int64)]


def silent(windows: Windows, active: np.ndarray, count: int, generator: np.random.Generator) -> np.ndarray:
    """Up to `count` windows that are not `active`, of different documents where possible, at random."""
    quiet = np.ones(len(windows.first), bool)
    quiet[active] = False
    order = generator.permutation(np.flatnonzero(quiet))
    _, first = np.unique(windows.document[order], return_index=True)
    distinct = np.zeros(len(order), bool)
    distinct[first] = True
    return np.concatenate([order[distinct], order[~distinct]])[:count]


def excerpt(firings: Firings, windows: Windows, window: int, latent: int, strings: dict[int, str]) -> dict[str, Any]:
    """A window as `{"document", "tokens": [text of each], "values": {position: activation of the latent}}`."""
    first, last = int(windows.first[window]), int(windows.last[window])
    places, values = firings.of(latent)
    begin, end = np.searchsorted(places, [first, last + 1])
    fired = zip((places[begin:end] - first).tolist(), values[begin:end].tolist(), strict=True)
    tokens = firings.tokens.reshape(-1)[first : last + 1]
    return {
        "document": int(windows.document[window]),
        "tokens": [strings[token] for token in tokens.tolist()],
        "values": {str(position): float(f"{value:.4g}") for position, value in fired},
    }
