"""Which latents change slowly from token to token: a split of any dictionary's latents made after its training."""

from __future__ import annotations

import numpy as np

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
