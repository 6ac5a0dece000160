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

from tsae.evaluation.measures import REFERENCE
from tsae.evaluation.smoothness import (
    ActiveCode,
    context_code,
    in_reference,
    latents_of,
    reduce_ranges,
    reduced,
    split_ranges,
)
from tsae.parallel.group import Group, in_turns
from tsae.runtime.errors import TsaeError
from tsae.sae.dictionary import Dictionary
from tsae.sae.inference import decode_latents, encode_sparse
from tsae.sae.selection.top_k import Encoder
from tsae.sae.sparse import SparseCode


def decode_ranges(dictionary: Dictionary, code: SparseCode) -> list[Tensor]:
    """R reconstructions [N, D] of the codes of N tokens: whole, high-level only, low-level only, each group alone.

    The whole one holds the decoder's bias, the others do not.
    """
    alone = [decode_latents(dictionary, code, group) for group in dictionary.group_slices]
    rest = sum(alone[2:], start=alone[1]) if len(alone) > 1 else torch.zeros_like(alone[0])
    return [sum(alone[1:], start=alone[0]) + dictionary.b_dec, alone[0], rest, *alone]


def variance_explained(x: Tensor, reconstructions: Sequence[Tensor]) -> Tensor:
    """1 - Var(x - x̂) / Var(x) within one context for each reconstruction [T, D], float64 [R]; NaN for T < 2.

    Variances are over positions, summed over D; a constant shift of x̂ has no effect. The reference's definition.
    """
    if len(x) < 2:
        return torch.full((len(reconstructions),), torch.nan, dtype=torch.float64)
    # The reference's own reduction: where the value is near 0, another order of summation changes its last digits.
    total = x.var(0).sum()
    return torch.stack([1 - (x - x_hat).var(0).sum() / total for x_hat in reconstructions]).double().cpu()


def squared_errors(x: Tensor, reconstructions: Sequence[Tensor], bias: Tensor) -> Tensor:
    """Sum of ‖x - x̂‖² over the context for each reconstruction, float64 [R]; `bias` is added to all but the first."""
    errors = [x - reconstructions[0], *(x - bias - part for part in reconstructions[1:])]
    return torch.stack([error.square().sum(1).double().sum().cpu() for error in errors])


def token_means(x: Tensor, x_hat: Tensor) -> dict[str, Tensor]:
    """Means over the T tokens of one context, as the reference defines them; scalars.

    l2_loss: distance, not squared; cossim, l2_ratio: cosine of x and x̂ and ‖x̂‖ / ‖x‖;
    relative_reconstruction_bias: E‖x̂‖² / E[x·x̂], 1 where norms are neither shrunk nor stretched.
    """
    norm, norm_hat = x.norm(dim=1), x_hat.norm(dim=1)
    dot = (x * x_hat).sum(1)
    return {
        "l2_loss": (x - x_hat).norm(dim=1).mean(),
        "cossim": (dot / (norm * norm_hat)).mean(),
        "l2_ratio": (norm_hat / norm).mean(),
        "relative_reconstruction_bias": norm_hat.square().mean() / dot.mean(),
    }


def sparsity(code: ActiveCode, slices: Sequence[slice]) -> dict[str, Tensor]:
    """Active latents per token (l0) and distinct latents (sequence_l0); each [R]."""
    return {
        "l0": reduce_ranges((code.values > 0).sum(1), slices) / code.values.shape[1],
        "sequence_l0": torch.tensor([float(part.stop - part.start) for part in slices], dtype=torch.float64),
    }


def magnitudes(
    code: ActiveCode, x: Tensor, slices: Sequence[slice], norms: Tensor, in_norms: bool
) -> dict[str, Tensor]:
    """What depends on the units of feature activations, each [R]: smoothness, and summed activation per token (l1_loss).

    Of activations times their latents' row `norms` [A]; under names with `REFERENCE`, as the reference has it, which
    takes them so for some classes only (`in_norms`).
    """
    raw, positions = latents_of(code, x), len(x)
    own = raw.times(norms)
    theirs = own if in_norms else raw
    found = reduced(own, slices)._asdict() | {"l1_loss": reduce_ranges(own.mass, slices) / positions}
    reference = in_reference(theirs, slices)._asdict() | {"l1_loss": reduce_ranges(theirs.mass, slices) / positions}
    return found | {REFERENCE + name: value for name, value in reference.items()}


class _Context(NamedTuple):
    """What is kept of a context."""

    row: dict[str, Tensor]
    """Its measures, scalars or [R]."""
    document: int
    length: int
    sum: Tensor
    """Of its activations, float64 [D]."""
    whole: bool
    """Whether no token of its sequence was left out for its norm or its id."""


class Scores:
    """Collects the measures of contexts given to `add`."""

    def __init__(self, dictionary: Dictionary) -> None:
        self.dictionary = dictionary
        self.ranges = split_ranges(dictionary.group_sizes)
        self.firings = torch.zeros(dictionary.dict_size, dtype=torch.int64)
        """Tokens on which each latent was active, [F]."""
        self._norms = dictionary.row_norms
        self._encoder = Encoder()
        self._batches: list[list[_Context]] = []

    @torch.no_grad()
    def add(
        self, x: Tensor, lengths: Sequence[int], documents: Sequence[int], whole: Sequence[bool] | None = None
    ) -> None:
        """Score contexts that lie one after the other in x [N, D]: lengths and document index of each, and whether no
        token of their sequences was left out for its norm or its id (by default all are whole)."""
        x = x.float()
        code = encode_sparse(self.dictionary, x, self._encoder)
        reconstructions = decode_ranges(self.dictionary, code)
        self._batches.append([])
        start = 0
        for length, document, kept in zip(lengths, documents, whole or [True] * len(lengths), strict=True):
            here = slice(start, start + length)
            row = self._measures(x[here], context_code(code, here), [x_hat[here] for x_hat in reconstructions])
            self._batches[-1].append(_Context(row, document, length, x[here].double().sum(0).cpu(), kept))
            start += length

    def _measures(self, x: Tensor, code: ActiveCode, reconstructions: list[Tensor]) -> dict[str, Tensor]:
        self.firings.index_add_(0, code.latents.cpu(), (code.values > 0).sum(1).cpu())
        slices, norms = code.slices(self.ranges), self._norms[code.latents].double().cpu()
        measures = {
            **magnitudes(code, x, slices, norms, self.dictionary.evaluated_by_norms),
            **sparsity(code, slices),
            **token_means(x, reconstructions[0]),
            "variance_explained": variance_explained(x, reconstructions),
            "squared_error": squared_errors(x, reconstructions, self.dictionary.b_dec),
            "squared_norm": x.square().sum(1).double().sum(),
        }
        return {name: value.double().cpu() for name, value in measures.items()}

    def collect(self, group: Group) -> None:
        """In the first process, take in what those of `group` have scored, which take the batches in turns."""
        found = group.collect((self._batches, self.firings))
        if found:
            self._batches = in_turns([batches for batches, _ in found])
            self.firings = torch.stack([firings for _, firings in found]).sum(dim=0)

    def with_all(self, others: Scores) -> Scores:
        """These with all tokens: `others` are the contexts of the sequences that are not whole here, as they are."""
        scores = Scores(self.dictionary)
        scores._batches = [[context for context in self._contexts if context.whole], others._contexts]
        return scores

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
