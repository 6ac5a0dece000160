"""Statistics of activations, gathered shard by shard and merged in shard order, so that the cutting of the work over
tasks does not change a bit of them.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass
class Summary:
    """Sums in float64 over activations of one width D."""

    count: int
    total: np.ndarray  # [D]
    squares: np.ndarray  # [D]
    largest: np.ndarray  # [D] largest magnitude

    @classmethod
    def empty(cls, activation_dim: int) -> Summary:
        """The summary of no activations."""
        return cls(0, *(np.zeros(activation_dim) for _ in range(3)))

    def add(self, activations: Tensor) -> None:
        """Take in activations [n, D]."""
        if len(activations) == 0:
            return
        values = activations.to(torch.float64)
        self.count += len(values)
        self.total += values.sum(0).cpu().numpy()
        self.squares += values.square().sum(0).cpu().numpy()
        self.largest = np.maximum(self.largest, values.abs().amax(0).cpu().numpy())

    def to_json(self) -> dict[str, Any]:
        """The sums, exactly: float64 in base64."""
        arrays = {"total": self.total, "squares": self.squares, "largest": self.largest}
        return {"count": self.count, **{name: encode(array, "<f8") for name, array in arrays.items()}}

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Summary:
        """The summary that `to_json` wrote."""
        return cls(record["count"], *(decode(record[name], "<f8") for name in ("total", "squares", "largest")))


def merge(summaries: Iterable[Summary], activation_dim: int) -> Summary:
    """One summary of several, added up in their order."""
    merged = Summary.empty(activation_dim)
    for summary in summaries:
        merged.count += summary.count
        merged.total += summary.total
        merged.squares += summary.squares
        merged.largest = np.maximum(merged.largest, summary.largest)
    return merged


def statistics(summary: Summary) -> dict[str, Any]:
    """The attribute `statistics`: `count`, `mean` [D], `variance` [D], `mean_squared_norm`, `max_abs` [D]."""
    count = max(summary.count, 1)
    mean = summary.total / count
    return {
        "of": "training part, positions after the first that belong to a document",
        "count": summary.count,
        "mean": mean.tolist(),
        "variance": np.maximum(summary.squares / count - mean**2, 0).tolist(),
        "mean_squared_norm": float(summary.squares.sum() / count),
        "max_abs": summary.largest.tolist(),
    }


def encode(array: np.ndarray, dtype: str) -> str:
    """A small array as base64 text."""
    return base64.b64encode(array.astype(dtype).tobytes()).decode()


def decode(text: str, dtype: str) -> np.ndarray:
    """The array that `encode` wrote, one-dimensional."""
    return np.frombuffer(base64.b64decode(text), dtype)
