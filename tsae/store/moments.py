"""Mean and variance of the activations that are trained on.

A harvest records those of all training tokens. A few massive tokens can decide them: on SmolLM2-135M (output of block 15)
one in 5,000 holds three quarters of the squared norm. Where tokens are left out, so is their part in the sums.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tsae.config import schema
from tsae.config.run import Counted
from tsae.runtime import metadata, preemption
from tsae.runtime.errors import TsaeError
from tsae.runtime.progress import Progress
from tsae.runtime.rows import parts
from tsae.store.reader import Store
from tsae.store.writer import Summary

READ_BYTES = 16_000_000
FEW = 0.25
"""Share of the sequences up to which the tokens that are left out are read, and the others not."""


class Moments(NamedTuple):
    """Of the training tokens after the first position of a context that count."""

    tokens: int
    mean: Tensor
    """[D] float32"""
    variance: Tensor
    """[D] float64"""
    mean_squared_norm: float


def moments_of(store: Store, counted: Counted) -> Moments:
    """Moments of the tokens that count: exactly those that the harvest recorded where no token is left out for its norm or id.

    Where many are left out the store is read once, and what was found is kept in it. Raises TsaeError if none counts.
    """
    statistics = store.attributes["statistics"]
    if not counted.all_tokens:
        statistics = _remaining(store, counted)
    mean = torch.tensor(statistics["mean"], dtype=torch.float32)
    variance = torch.tensor(statistics["variance"], dtype=torch.float64)
    return Moments(int(statistics["count"]), mean, variance, float(statistics["mean_squared_norm"]))


def _remaining(store: Store, counted: Counted) -> dict[str, object]:
    def kept(rows: np.ndarray) -> np.ndarray:
        return store.valid(counted, rows) & store.valid(Counted(1), rows)

    def dropped(rows: np.ndarray) -> np.ndarray:
        return store.valid(Counted(1), rows) & ~store.valid(counted, rows)

    sequences = np.arange(len(store.sample))
    some = [sequences[part] for part in parts(len(sequences), store.context_length)]
    keeping, dropping = (
        np.concatenate([part[which(part).any(1)] for part in some] or [sequences]) for which in (kept, dropped)
    )
    if not len(keeping):
        raise TsaeError(
            f"{store.path}: no training token counts; a larger data.max_norm_multiple or fewer data.exclude_tokens are needed"
        )
    if len(dropping) <= FEW * len(sequences):
        less = _summed(store, dropping, dropped)
        return Summary.of(store.attributes["statistics"]).without(less).statistics()
    key = schema.stable_hash([store.attributes["manifest"]["checksums"], *counted])
    path = store.path / "moments" / f"{key}.json"
    found = metadata.whole(path)
    if not found:
        found = _summed(store, keeping, kept).statistics()
        if os.access(store.path, os.W_OK):
            metadata.write(path, found)
    return found


def _summed(store: Store, sequences: np.ndarray, which: Callable[[np.ndarray], np.ndarray]) -> Summary:
    """Sums over those tokens of `sequences` that `which` tells, [n, L] of n sequences."""
    summary = Summary.empty(store.activation_dim)
    step = max(1, READ_BYTES // store.layout.geometry.sequence_bytes)
    progress = Progress("moments of activations", len(sequences), "sequences")
    for first in preemption.polled(range(0, len(sequences), step)):
        part = sequences[first : first + step]
        summary.add(store.read(part)[torch.from_numpy(which(part))])
        progress.update(first + len(part))
    return summary
