"""How much of a passage's topic a language model's residual stream tells: a linear probe on pooled activations."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from tsae.lm.embedded_text import Rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TRAIN_ROWS_PER_TOPIC = 300
MIN_TOKENS = 64  # shorter passages say little about their topic


def probe_accuracy(model: PreTrainedModel, train: Rows, heldout: Rows, layer: int, seed: int = 0) -> float:
    """Accuracy on passages of held-out documents of a logistic regression fitted on passages of training documents.

    Features are the outputs of block `layer`, averaged over a passage (its first position, the attention sink, left
    out) and standardised; training passages are balanced over topics as far as there are enough.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    chosen_train, chosen_heldout = _balanced(train, seed), _long_rows(heldout)
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=500))
    probe.fit(_pooled(model, chosen_train, layer), chosen_train.label)
    return float(probe.score(_pooled(model, chosen_heldout, layer), chosen_heldout.label))


def majority_share(heldout: Rows) -> float:
    """Accuracy of always naming the most frequent topic of the passages that `probe_accuracy` scores."""
    label = _long_rows(heldout).label
    return float(np.bincount(label).max() / len(label))


def _long_rows(rows: Rows) -> Rows:
    keep = rows.lengths >= MIN_TOKENS
    return Rows(rows.tokens[keep], rows.lengths[keep], rows.label[keep])


def _balanced(rows: Rows, seed: int) -> Rows:
    rows, generator = _long_rows(rows), np.random.default_rng(seed)
    found = [np.flatnonzero(rows.label == label) for label in np.unique(rows.label)]
    chosen = np.concatenate([generator.permutation(part)[:TRAIN_ROWS_PER_TOPIC] for part in found])
    return Rows(rows.tokens[chosen], rows.lengths[chosen], rows.label[chosen])


@torch.no_grad()
def _pooled(model: PreTrainedModel, rows: Rows, layer: int, batch_rows: int = 64) -> np.ndarray:
    """[S, D] float32: mean over the real positions from 1 on."""
    parts = []
    for start in range(0, len(rows.tokens), batch_rows):
        tokens, lengths = (torch.from_numpy(part[start : start + batch_rows]) for part in (rows.tokens, rows.lengths))
        states: Tensor = model(input_ids=tokens, use_cache=False, output_hidden_states=True).hidden_states[layer + 1]
        position = torch.arange(tokens.shape[1])
        weight = ((position >= 1) & (position < lengths[:, None])).float()
        parts.append((states * weight[..., None]).sum(1) / weight.sum(1, keepdim=True))
    return torch.cat(parts).numpy()
