"""All feature activations in some stored sequences, latent by latent, in one pass and without a dense [N, F] matrix.

Positions are counted over the sequences read: place = row · L + position. Skipped positions, pads and special tokens are
no places of a text and hold no activations.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from tsae.runtime import preemption
from tsae.runtime.errors import TsaeError
from tsae.runtime.progress import Progress

if TYPE_CHECKING:
    from tsae.experiments.shared.subject import Subject
    from tsae.store.reader import Store

log = logging.getLogger("tsae")

TOKENS_AT_ONCE = 4096
MOST_DENSE = 1 << 26
"""Values of a dense code, which classes without a single threshold compute for the tokens of a batch."""
MOST_ENTRIES = 1 << 25
"""Activations that are held at most: 0.3 GB, and four times as much while they are sorted."""


class Firings(NamedTuple):
    """Nonzero feature activations of S sequences of L positions, sorted by latent and then by place."""

    offsets: np.ndarray
    """Where each latent's entries begin [F + 1], int64."""
    places: np.ndarray
    """Place of each entry [n], int32."""
    values: np.ndarray
    """Feature activation of each entry [n], float32."""
    tokens: np.ndarray
    """[S, L] int32."""
    document: np.ndarray
    """[S, L] int32: document of each position, -1 where there is no text to look at."""
    distance: np.ndarray
    """[S, L] float32: how far the activation vector moved since the position before; NaN where no text goes on."""

    @property
    def dict_size(self) -> int:
        """F."""
        return len(self.offsets) - 1

    @property
    def n_tokens(self) -> int:
        """Positions of a text."""
        return int((self.document >= 0).sum())

    @property
    def counts(self) -> np.ndarray:
        """Positions at which each latent fires [F]."""
        return np.diff(self.offsets)

    @property
    def latents(self) -> np.ndarray:
        """Latent of each entry [n]."""
        return np.repeat(np.arange(self.dict_size, dtype=np.int32), self.counts)

    def of(self, latent: int) -> tuple[np.ndarray, np.ndarray]:
        """Places and values of one latent."""
        part = slice(self.offsets[latent], self.offsets[latent + 1])
        return self.places[part], self.values[part]


def collect(subject: Subject, store: Store, rows: Sequence[int], what: str) -> Firings:
    """The feature activations in the sequences `rows` of a store; fewer of them if a dense code would not fit.

    Raises TsaeError if the store was made for activations of another width, or the rows hold no text.
    """
    if subject.dictionary.activation_dim != store.activation_dim:
        raise TsaeError(
            f"{subject.run.path}: reads activations of {subject.dictionary.activation_dim} dimensions, "
            f"the store {store.path} holds {store.activation_dim}"
        )
    taken = np.asarray(rows, dtype=np.int64)
    valid = store.valid(subject.config.data.skip_positions)[taken]
    if not valid.any():
        raise TsaeError(f"{store.path}: the {len(rows)} sequences to read hold no text beyond the skipped positions")
    progress = Progress(f"{what} {subject.name}: activations", len(taken), "sequences", subject.run.progress)
    distance = np.full(valid.shape, np.nan, np.float32)
    pieces, held, done = [], 0, 0
    for done, batch in _batches(subject, store, taken, valid, distance):
        pieces.append(batch)
        held += len(batch[0])
        progress.update(done)
        if held > MOST_ENTRIES:
            log.warning("%s: %d activations are enough; only %d of %d sequences are read", what, held, done, len(taken))
            break
    taken, valid = taken[:done], valid[:done]
    document = np.where(valid, store.document[taken], -1)
    offsets, places, values = _by_latent(pieces, subject.dictionary.dict_size)
    return Firings(offsets, places, values, np.asarray(store.tokens[taken]), document, distance[:done])


def _batches(
    subject: Subject, store: Store, rows: np.ndarray, valid: np.ndarray, distance: np.ndarray
) -> Iterator[tuple[int, tuple[np.ndarray, np.ndarray, np.ndarray]]]:
    """Rows done so far, and (latents, places, values) of a batch; fills `distance` on the way."""
    length = store.context_length
    size = max(1, min(TOKENS_AT_ONCE, MOST_DENSE // subject.dictionary.dict_size) // length)
    for start in preemption.polled(range(0, len(rows), size)):
        stop = min(start + size, len(rows))
        x = store.read(rows[start:stop]).float()
        there = valid[start:stop]
        moved = torch.linalg.vector_norm(x.diff(dim=1), dim=2).numpy()
        distance[start:stop, 1:] = np.where(there[:, 1:] & there[:, :-1], moved, np.nan)
        code = subject.codes(x[torch.from_numpy(there)])
        places = (start * length + np.flatnonzero(there)).astype(np.int32)
        latents = code.latents.numpy().astype(np.uint16 if code.dict_size <= 1 << 16 else np.int32)
        yield stop, (latents, places[code.rows.numpy()], code.values.float().numpy())


def _by_latent(
    pieces: list[tuple[np.ndarray, np.ndarray, np.ndarray]], dict_size: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Offsets, places and values of all batches in the order of their latents; empties `pieces`."""
    latents, places, values = (np.concatenate(column) for column in zip(*pieces, strict=True))
    pieces.clear()
    order = np.argsort(latents, kind="stable")  # a radix sort, where latents fit into 16 bits
    counts = np.bincount(latents, minlength=dict_size)
    return np.concatenate([[0], np.cumsum(counts)]), places[order], values[order]
