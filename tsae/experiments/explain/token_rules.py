"""Explanations without a language model: the tokens a latent fires on, and the tokens that give away where it is active."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from tsae.experiments.shared.firings import Firings
from tsae.experiments.shared.windows import Windows

MOST_TOKENS = 6
CANDIDATES = 16
SMALLEST_SHARE = 0.05
"""Tokens with less of a latent's activation are not named."""
ENOUGH_SHARE = 0.8
LEAST_GAIN = 0.01
"""What another token must add to the rule's balanced accuracy, twice over."""


class TokenRules:
    """Looks for the tokens that explain latents, in the texts to explain from."""

    def __init__(self, firings: Firings, windows: Windows) -> None:
        self._firings, self._windows = firings, windows
        self._types, types = np.unique(firings.tokens.reshape(-1), return_inverse=True)
        self._type_of_place = types.reshape(-1)
        inside = np.flatnonzero(windows.number >= 0)
        count = len(windows.first)
        pairs = np.unique(self._type_of_place[inside].astype(np.int64) * count + windows.number[inside])
        self._pair_type, self._pair_window = pairs // count, pairs % count
        self._frequency = np.bincount(self._pair_type, minlength=len(self._types))
        self._offsets = np.concatenate([[0], np.cumsum(self._frequency)])

    def fires_on(self, latent: int) -> list[int]:
        """The tokens that carry most of a latent's activation, largest share first."""
        places, values = self._firings.of(latent)
        mass = np.bincount(self._type_of_place[places], weights=values, minlength=len(self._types))
        order = np.argsort(-mass, kind="stable")[:MOST_TOKENS]
        shares = mass[order] / max(mass.sum(), 1e-12)
        before = np.concatenate([[0.0], np.cumsum(shares)[:-1]])
        named = (shares >= SMALLEST_SHARE) & (before < ENOUGH_SHARE)
        return self._types[order[named]].tolist()

    def given_away_by(self, active: np.ndarray) -> list[int]:
        """Tokens such that a text with any of them is `active`, chosen one by one for the best balanced accuracy."""
        count = len(self._windows.first)
        is_active = np.zeros(count, bool)
        is_active[active] = True
        # Two more texts than there are keep a handful of texts from proving anything.
        weight = np.where(is_active, 1 / (len(active) + 2), -1 / (count - len(active) + 2))
        gain = np.bincount(self._pair_type, weights=weight[self._pair_window], minlength=len(self._types))
        candidates = np.argsort(-gain, kind="stable")[:CANDIDATES]
        candidates = candidates[gain[candidates] > 0]
        if not len(candidates):
            return []
        bounds = np.concatenate([[0], np.cumsum(self._frequency[candidates])])
        texts = np.concatenate([self._texts_with(token) for token in candidates])
        chosen: list[int] = []
        while len(chosen) < MOST_TOKENS:
            gains = np.add.reduceat(weight[texts], bounds[:-1])
            best = int(gains.argmax())
            if gains[best] < LEAST_GAIN:
                break
            chosen.append(int(candidates[best]))
            weight[texts[bounds[best] : bounds[best + 1]]] = 0.0  # these are found already
        return self._types[chosen].tolist()

    def _texts_with(self, token: int) -> np.ndarray:
        """The windows that hold a token, given by its number among those that occur."""
        return self._pair_window[self._offsets[token] : self._offsets[token + 1]]


def describe(on: Sequence[str], given_away_by: Sequence[str]) -> str:
    """The rule in words."""
    parts = [f"on {_listed(on)}"] if on else []
    if given_away_by and set(given_away_by) != set(on):
        parts.append(f"in text with {_listed(given_away_by)}")
    return "; ".join(parts)


def says_active(rule: dict[str, Any], excerpt: dict[str, Any]) -> bool:
    """Whether a text holds one of the tokens that give the latent away."""
    return not set(rule["given_away_by"]).isdisjoint(excerpt["tokens"])


def says_right(rule: dict[str, Any], marked: Sequence[str]) -> bool:
    """Whether at least half of the marked tokens are among those that the latent fires on."""
    return 2 * sum(token in rule["on"] for token in marked) >= len(marked)


def _listed(tokens: Sequence[str]) -> str:
    return ", ".join(json.dumps(token, ensure_ascii=False) for token in tokens)
