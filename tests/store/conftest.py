"""Stores whose activations say where they stand, so that every number that comes back can be checked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from tsae.config import StoreConfig
from tsae.data.contexts import Contexts
from tsae.store.reader import Store
from tsae.store.writer import finalise, prepare, write_shard

SEQUENCE, POSITION, DOCUMENT = 0, 1, 2
DIM = 64


def speaking_activations(document: np.ndarray, dim: int = DIM) -> torch.Tensor:
    """[N, L, dim] float32 whose first values are the sequence, the position and the document."""
    sequences, length = document.shape
    activations = torch.zeros(sequences, length, dim)
    activations[..., SEQUENCE] = torch.arange(sequences)[:, None]
    activations[..., POSITION] = torch.arange(length)
    activations[..., DOCUMENT] = torch.from_numpy(document.astype(np.float32))
    activations[..., 3:] = torch.rand(dim - 3, generator=torch.Generator().manual_seed(0))
    return activations


def contexts_of(document: np.ndarray, heldout: int = 0) -> Contexts:
    """Contexts of a given document map; a sequence is as long as its last position that belongs to a document."""
    length = document.shape[1]
    lengths = (np.where(document >= 0, np.arange(length) + 1, 0)).max(1).astype(np.int32)
    tokens = np.arange(document.size, dtype=np.int32).reshape(document.shape)
    label = np.zeros(int(document.max()) + 1, np.int32)
    return Contexts(tokens, lengths, document.astype(np.int32), label, ("prose",), heldout, "synthetic")


def ragged_documents(sequences: int, length: int, seed: int = 0) -> np.ndarray:
    """[sequences, length]: BOS, then one or two documents, then padding."""
    random = np.random.default_rng(seed)
    document = np.full((sequences, length), -1, np.int32)
    for row in range(sequences):
        end, cut = random.integers(3, length + 1), random.integers(2, length)
        document[row, 1:end] = 2 * row
        document[row, min(cut, end) : end] = 2 * row + 1
    return document


@pytest.fixture
def make_store(tmp_path: Path) -> Callable[..., Store]:
    """Write a store with given documents [N, L] and speaking activations, and open it."""

    def make(document: np.ndarray, heldout: int = 0, dtype: str = "float32", name: str = "store") -> Store:
        settings = StoreConfig(dtype=dtype, shard_mb=1)
        layout = prepare(tmp_path / name, contexts_of(document, heldout), DIM, store=settings)
        activations = speaking_activations(document)
        for shard in range(layout.geometry.shards):
            rows = layout.geometry.sequences_of(shard)
            write_shard(layout, shard, activations[rows.start : rows.stop].split(100))
        finalise(layout)
        return Store.open(layout.path)

    return make
