"""Massive tokens of a store: how many there are, where they stand, and what share of the squared norm they hold.

A language model writes very large activations at a few tokens (arXiv 2402.17762): the first of a context, and others that
depend on the model. They are not what a dictionary is trained for, and a mean square is mostly theirs.
"""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import numpy as np

from tsae.config.run import MAX_NORM_MULTIPLE, Counted
from tsae.runtime.rows import parts
from tsae.store import norms
from tsae.store.reader import Store
from tsae.store.window import held

MOST_PLACES = 4


class MassiveTokens(NamedTuple):
    """Those above a multiple of the median norm, among the tokens past the skipped positions that belong to a document."""

    counted: Counted
    """Whether they are left out."""
    tokens: int
    """All there are."""
    multiple: float
    median: float
    largest: float
    positions: np.ndarray
    """[n] position of each massive token in its context."""
    share_of_squares: float
    """What part of the sum of all tokens' squared norms is theirs."""

    @classmethod
    def of(cls, store: Store, counted: Counted) -> MassiveTokens:
        """Those above the multiple that leaves tokens out or, where none does, above the one that does by default."""
        multiple = counted.max_norm_multiple or MAX_NORM_MULTIPLE
        limit = store.limit(Counted(counted.skip_positions, multiple))
        tokens, largest, all_squares, their_squares, positions = 0, 0.0, 0.0, 0.0, [np.zeros(0, np.int64)]
        measured = store.layout.measured_sequences
        for part in parts(len(measured), store.context_length):
            rows = measured[part]
            valid = store.valid(Counted(counted.skip_positions), rows)
            lengths = store.norms[rows][valid]
            squares, massive = np.square(lengths, dtype=np.float64), lengths > limit
            tokens, largest = tokens + len(lengths), max(largest, float(lengths.max(initial=0)))
            all_squares, their_squares = all_squares + squares.sum(), their_squares + squares[massive].sum()
            positions.append(np.nonzero(valid)[1][massive])
        return cls(
            counted,
            tokens=tokens,
            multiple=multiple,
            median=limit / multiple,
            largest=largest,
            positions=np.concatenate(positions),
            share_of_squares=float(their_squares / max(all_squares, np.finfo(float).tiny)),
        )

    def line(self) -> str:
        """One line that says all of it."""
        found = len(self.positions)
        words = (
            f"{found:,} of {self.tokens:,} tokens ({100 * found / max(self.tokens, 1):.2g} %) have norms above "
            f"{self.multiple:g} times the median {self.median:.4g} (the largest: {self.largest:.4g})"
        )
        if not found:
            return words
        at = Counter(self.positions.tolist()).most_common()
        places = [f"{count:,} at position {position}" for position, count in at[:MOST_PLACES]]
        rest = sum(count for _, count in at[MOST_PLACES:])
        where = ", ".join([*places, *([f"{rest:,} elsewhere"] if rest else [])])
        fate = "leave them out" if self.counted.max_norm_multiple else "take them as any other"
        return (
            f"{words} and hold {100 * self.share_of_squares:.3g} % of the squared norm: {where}; training and evaluation {fate} "
            "(data.max_norm_multiple)"
        )


def _window(store: Store) -> list[str]:
    """What of a rolling store is on disk, and what the figures below are of."""
    layout = store.layout
    if not layout.rolling:
        return []
    here, size = held(layout), layout.geometry.shard_bytes(0)
    return [
        f"window         {len(here):,} of {layout.kept.start:,} shards of the training part are on disk ({len(here) * size / 1e6:,.4g} MB); "
        "others are made when they are read",
        f"sample         what follows is of the first {layout.sample:,} sequences and of those held out",
    ]


def describe(store: Store) -> str:
    """What `store` holds, in a few lines."""
    statistics, geometry = store.attributes["statistics"], store.layout.geometry
    quantiles = norms.quantiles(store.layout, store.norms)
    mean, variance = (np.array(statistics[name]) for name in ("mean", "variance"))
    gamma = float(np.sqrt(np.square(mean).sum() / variance.sum())) if variance.any() else float("nan")
    return "\n".join(
        [
            f"{store.path}",
            f"sequences      {store.n_sequences:,} of {store.context_length} positions, {store.heldout:,} of them held out",
            f"activations    {store.activation_dim} dimensions, {geometry.dtype}",
            f"tokens         {store.attributes['tokens']:,}",
            *_window(store),
            f"norms          {', '.join(f'{share} %: {value:.4g}' for share, value in quantiles.items())}",
            f"gamma          {gamma:.3g} (norm of the mean over norm of the standard deviation)",
            f"massive        {MassiveTokens.of(store, Counted(1)).line().partition('; training')[0]}",
        ]
    )
