"""Scores of a dictionary over many contexts: one row of values per context, and what is pooled over all tokens.

Shapes: N tokens of a batch of contexts, T of one context, S contexts in all, R ranges of latents (all, high-level,
low-level, each group), D activation_dim, F dict_size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tsae.evaluation import reconstruction
from tsae.evaluation.codes import ActiveCode, context_code, split_ranges
from tsae.evaluation.smoothness import smoothness
from tsae.parallel.group import Group, in_turns
from tsae.runtime.errors import TsaeError
from tsae.sae.dictionary import Dictionary
from tsae.sae.inference import encode_sparse
from tsae.sae.selection.top_k import Encoder


class _Context(NamedTuple):
    """What is kept of a context."""

    row: dict[str, Tensor]
    """Its measures, scalars or [R]."""
    document: int
    length: int
    sum: Tensor
    """Of its activations, float64 [D]."""


class Scores:
    """Collects the measures of contexts given to `add`."""

    def __init__(self, dictionary: Dictionary) -> None:
        self.dictionary = dictionary
        self.ranges = split_ranges(dictionary.group_sizes)
        self.firings = torch.zeros(dictionary.dict_size, dtype=torch.int64)
        """Tokens on which each latent was active, [F]."""
        self._encoder = Encoder()
        self._batches: list[list[_Context]] = []

    @torch.no_grad()
    def add(self, x: Tensor, lengths: Sequence[int], documents: Sequence[int]) -> None:
        """Score contexts that lie one after the other in x [N, D]: lengths and document index of each."""
        x = x.float()
        code = encode_sparse(self.dictionary, x, self._encoder)
        reconstructions = reconstruction.decode_ranges(self.dictionary, code)
        self._batches.append([])
        start = 0
        for length, document in zip(lengths, documents, strict=True):
            here = slice(start, start + length)
            row = self._measures(x[here], context_code(code, here), [x_hat[here] for x_hat in reconstructions])
            self._batches[-1].append(_Context(row, document, length, x[here].double().sum(0).cpu()))
            start += length

    def _measures(self, x: Tensor, code: ActiveCode, reconstructions: list[Tensor]) -> dict[str, Tensor]:
        self.firings.index_add_(0, code.latents.cpu(), (code.values > 0).sum(1).cpu())
        measures = {
            **smoothness(code, x, self.ranges)._asdict(),
            **reconstruction.sparsity(code, self.ranges),
            **reconstruction.token_means(x, reconstructions[0]),
            "variance_explained": reconstruction.variance_explained(x, reconstructions),
            "squared_error": reconstruction.squared_errors(x, reconstructions, self.dictionary.b_dec),
            "squared_norm": x.square().sum(1).double().sum(),
        }
        return {name: value.double().cpu() for name, value in measures.items()}

    def collect(self, group: Group) -> None:
        """In the first process, take in what those of `group` have scored, which take the batches in turns."""
        found = group.collect((self._batches, self.firings))
        if found:
            self._batches = in_turns([batches for batches, _ in found])
            self.firings = torch.stack([firings for _, firings in found]).sum(dim=0)

    @property
    def _contexts(self) -> list[_Context]:
        return [context for batch in self._batches for context in batch]

    @property
    def contexts(self) -> int:
        """S, the number of contexts so far."""
        return len(self._contexts)

    @property
    def tokens(self) -> int:
        """Tokens of all contexts so far."""
        return sum(context.length for context in self._contexts)

    @property
    def documents(self) -> np.ndarray:
        """Document index of each context, [S]."""
        return np.array([context.document for context in self._contexts])

    def table(self) -> dict[str, np.ndarray]:
        """Measure → its values per context, float64 [S] or [S, R]. Raises TsaeError if nothing was scored."""
        rows = [context.row for context in self._contexts]
        if not rows:
            raise TsaeError("evaluation: no held-out context with a valid position; harvest more text")
        return {name: torch.stack([row[name] for row in rows]).numpy() for name in rows[0]}

    def squared_deviations(self) -> np.ndarray:
        """Sum over each context's tokens of the squared distance to the mean of all scored tokens, [S]."""
        sums = torch.stack([context.sum for context in self._contexts])
        lengths = torch.tensor([context.length for context in self._contexts], dtype=torch.float64)
        mean = sums.sum(0) / lengths.sum()
        norms = torch.from_numpy(self.table()["squared_norm"])
        return np.asarray(norms - 2 * (sums @ mean) + lengths * mean.square().sum())
