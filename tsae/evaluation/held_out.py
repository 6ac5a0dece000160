"""Held-out contexts from the store: what evaluation scores one by one.

A context here is a run of positions that count, of one document inside one stored sequence: no skipped position, no
pad, no special token, no token that is left out for its norm or its id, and never a document boundary. Where documents are
packed, or a token is left out, a sequence holds several.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tsae.config.run import Counted
from tsae.parallel.group import ALONE, Group
from tsae.store.reader import Store

SHORTEST = 2
"""Positions below which a context has neither variance nor a step."""


class HeldOutBatch(NamedTuple):
    """Contexts one after the other: activations [N, D]; length and document index of each; sequences read so far."""

    x: Tensor
    lengths: list[int]
    documents: list[int]
    sequences_done: int


def held_out_batches(
    store: Store, sequences: int, batch_size: int, counted: Counted, group: Group = ALONE
) -> Iterator[HeldOutBatch]:
    """The first `sequences` held-out sequences (they are in random order), `batch_size` at a time.

    The processes of `group` take whole batches in turns, so that a batch is what it is for one process.
    """
    rows = np.asarray(store.heldout_range)[:sequences]
    document, valid = store.document[rows], store.valid(counted, rows)
    for start in group.turns(len(rows), batch_size):
        batch = rows[start : start + batch_size]
        here = range(start, start + len(batch))
        found = [(i, *run) for i, row in enumerate(here) for run in runs(document[row], valid[row])]
        activations = store.read(batch)
        pieces = [activations[i, positions] for i, positions, _ in found]
        yield HeldOutBatch(
            torch.cat(pieces) if pieces else activations.new_empty(0, store.activation_dim),
            [len(piece) for piece in pieces],
            [document for _, _, document in found],
            start + len(batch),
        )


def runs(document: np.ndarray, valid: np.ndarray) -> list[tuple[slice, int]]:
    """Runs of at least two valid positions of one document in a sequence [L], with the document's index."""
    owner = np.where(valid, document, -1)
    edges = np.flatnonzero(np.diff(owner)) + 1
    starts, ends = [0, *edges.tolist()], [*edges.tolist(), len(owner)]
    return [
        (slice(start, end), int(owner[start]))
        for start, end in zip(starts, ends, strict=True)
        if owner[start] >= 0 and end - start >= SHORTEST
    ]
