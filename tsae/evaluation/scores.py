"""Scores of a dictionary over many contexts: one row of values per context, and what is pooled over all tokens.

Shapes: N tokens of a batch of contexts, T of one context, S contexts in all, R ranges of latents (all, high-level,
low-level, each group), D activation_dim, F dict_size.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from tsae.errors import TsaeError
from tsae.evaluation import reconstruction
from tsae.evaluation.codes import ActiveCode, context_code, split_ranges
from tsae.evaluation.smoothness import smoothness
from tsae.sae.dictionary import Dictionary
from tsae.sae.inference import encode_sparse
from tsae.sae.select import Encoder


class Scores:
    """Collects the measures of contexts given to `add`."""

    def __init__(self, dictionary: Dictionary) -> None:
        self.dictionary = dictionary
        self.ranges = split_ranges(dictionary.group_sizes)
        self.firings = torch.zeros(dictionary.dict_size, dtype=torch.int64)
        """Tokens on which each latent was active, [F]."""
        self._encoder = Encoder()
        self._rows: list[dict[str, Tensor]] = []
        self._documents: list[int] = []
        self._lengths: list[int] = []
        self._sums: list[Tensor] = []

    @torch.no_grad()
    def add(self, x: Tensor, lengths: Sequence[int], documents: Sequence[int]) -> None:
        """Score contexts that lie one after the other in x [N, D]: lengths and document index of each."""
        x = x.float()
        code = encode_sparse(self.dictionary, x, self._encoder)
        reconstructions = reconstruction.decode_ranges(self.dictionary, code)
        start = 0
        for length, document in zip(lengths, documents, strict=True):
            here = slice(start, start + length)
            self._add_context(x[here], context_code(code, here), [x_hat[here] for x_hat in reconstructions])
            self._documents.append(document)
            self._lengths.append(length)
            start += length

    def _add_context(self, x: Tensor, code: ActiveCode, reconstructions: list[Tensor]) -> None:
        self.firings.index_add_(0, code.latents.cpu(), (code.values > 0).sum(1).cpu())
        self._sums.append(x.double().sum(0).cpu())
        self._rows.append(
            {
                **smoothness(code, x, self.ranges)._asdict(),
                **reconstruction.sparsity(code, self.ranges),
                **reconstruction.token_means(x, reconstructions[0]),
                "variance_explained": reconstruction.variance_explained(x, reconstructions),
                "squared_error": reconstruction.squared_errors(x, reconstructions, self.dictionary.b_dec),
                "squared_norm": x.square().sum(1).double().sum(),
            }
        )

    @property
    def contexts(self) -> int:
        """S, the number of contexts so far."""
        return len(self._rows)

    @property
    def tokens(self) -> int:
        """Tokens of all contexts so far."""
        return sum(self._lengths)

    @property
    def documents(self) -> np.ndarray:
        """Document index of each context, [S]."""
        return np.array(self._documents)

    def table(self) -> dict[str, np.ndarray]:
        """Measure → its values per context, float64 [S] or [S, R]. Raises TsaeError if nothing was scored."""
        if not self._rows:
            raise TsaeError("evaluation: no held-out context with a valid position; harvest more text")
        return {name: torch.stack([row[name].double().cpu() for row in self._rows]).numpy() for name in self._rows[0]}

    def squared_deviations(self) -> np.ndarray:
        """Sum over each context's tokens of the squared distance to the mean of all scored tokens, [S]."""
        sums, lengths = torch.stack(self._sums), torch.tensor(self._lengths, dtype=torch.float64)
        mean = sums.sum(0) / lengths.sum()
        norms = torch.from_numpy(self.table()["squared_norm"])
        return np.asarray(norms - 2 * (sums @ mean) + lengths * mean.square().sum())
