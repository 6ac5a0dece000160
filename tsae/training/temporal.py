"""The temporal terms: what each asks of the high-level codes of tokens and their partners, dense and sparse.

The dense form is the definition, which autograd differentiates. The sparse form sees the entries of the codes alone and
has its gradients in closed form; no [B, B] array outlives its block of rows, and a GPU has one of at most `LOGITS_BYTES`. A new term is both forms and an entry of
`TERMS` here, and a name in `tsae.config.sections.TERM_SETTINGS`.

Shapes: B pairs of this process, D activation_dim, F0 latents of the high-level split, n entries of a code. Sources:
T-SAE paper (arXiv 2511.05541) eqs. 3-5, and what stands at each term.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, cross_entropy

from tsae.config.run import RunConfig, group_weights
from tsae.parallel.group import ALONE, Group, starts
from tsae.sae.sparse import Part, SparseCode, kernels_for, kernels_that_run, sampled_products, weighted_rows

EXCLUDED = -1e30
"""The logit of a pair that is not to count."""
BLOCK_ELEMENTS, CUDA_BLOCK_ELEMENTS = 2**19, 64 * 2**20
LOGITS_BYTES = 512 * 2**20
"""Of the logits that kernels make at a time: a batch of 8,192 has half as many."""


class Pairs(NamedTuple):
    """What a term may look at besides the high-level codes."""

    current: Tensor
    """Activations of the tokens [B, D]."""
    partner: Tensor
    """Activations of their partners [B, D]."""
    document: Tensor | None
    """Document of each pair [B], if those of one document are no negatives."""
    similarity: str
    temperature: float
    group: Group = ALONE
    """The processes that share the batch."""
    negatives: Group = ALONE
    """Those of them whose partners are each other's negatives: all, or each for itself."""


class Differentiated(NamedTuple):
    """Value of a term and its gradient with respect to the entries of both codes."""

    loss: Tensor
    current: Tensor
    """[n of the current code]"""
    partner: Tensor
    """[n of the partner code]"""


@dataclass(frozen=True)
class Term:
    """One temporal term."""

    dense: Callable[[Tensor, Tensor, Pairs], Tensor]
    """Of the codes [B, F0] of tokens and partners, in one process: a scalar."""
    sparse: Callable[[SparseCode, SparseCode, Pairs, float], Differentiated]
    """The same times a weight. It is this process's share: the sum over `group` is that of the whole batch."""
    weight: Callable[[RunConfig], float] = lambda _: 1.0
    """That weight, which comes on top of objective.temporal_alpha."""


def contrastive(high: Tensor, other: Tensor, pairs: Pairs) -> Tensor:
    """InfoNCE in both directions: each token's own partner against all partners of the batch, and the reverse.

    With documents, against those of other documents.
    """
    logits = _similarities(high, other, pairs)
    if pairs.document is not None:
        true_pair = torch.eye(len(logits), dtype=torch.bool, device=logits.device)
        logits = logits.masked_fill((pairs.document[:, None] == pairs.document) & ~true_pair, EXCLUDED)
    labels = torch.arange(len(logits), device=logits.device)
    return cross_entropy(logits, labels) + cross_entropy(logits.T, labels)


def linear(high: Tensor, other: Tensor, pairs: Pairs) -> Tensor:
    """What InfoNCE is to first order: the mean similarity of all pairs minus that of the true ones, twice.

    Both directions are equal. Proposed by a reviewer of the paper (openreview.net, bojVI4l9Kn).
    """
    similarities = _similarities(high, other, pairs)
    return 2 * (similarities.mean() - similarities.diagonal().mean())


def squared_distance(high: Tensor, other: Tensor, _: Pairs) -> Tensor:
    """Mean squared distance of the codes: the paper's ablation without contrast."""
    return (high - other).square().sum(dim=-1).mean()


def weighted_l1(high: Tensor, other: Tensor, pairs: Pairs) -> Tensor:
    """Mean L1 distance of the codes, each pair weighted by the cosine of its inputs: the released code's other branch."""
    return ((high - other).abs().sum(dim=-1) * cosine_similarity(pairs.current, pairs.partner, dim=-1)).mean()


def _similarities(high: Tensor, other: Tensor, pairs: Pairs) -> Tensor:
    """[B, B] similarities of codes [B, F0], divided by the temperature."""
    if pairs.similarity == "cosine":
        high, other = (f / f.norm(dim=-1, keepdim=True).clamp_min(1e-8) for f in (high, other))
    return high @ other.T / pairs.temperature


def sparse_contrastive(high: SparseCode, other: SparseCode, pairs: Pairs, weight: float) -> Differentiated:
    """InfoNCE, with the partners, and the tokens, of all processes of `negatives`."""
    return _by_similarity(_contrastive_dots, high, other, pairs, weight)


def sparse_linear(high: SparseCode, other: SparseCode, pairs: Pairs, weight: float) -> Differentiated:
    """The linear term, with the means of all processes of `negatives`."""
    return _by_similarity(_linear_dots, high, other, pairs, weight)


def _by_similarity(
    by_dots: Callable[[SparseCode, SparseCode, Pairs, float], Differentiated],
    high: SparseCode,
    other: SparseCode,
    pairs: Pairs,
    weight: float,
) -> Differentiated:
    """A term of dot products, of codes that have been scaled to norm 1 where the similarity is the cosine."""
    # Each process's term is a mean over the processes that it shares negatives with.
    scale = weight * pairs.negatives.world / pairs.group.world
    if pairs.similarity != "cosine":
        return by_dots(high, other, pairs, scale)
    (high_unit, high_norm), (other_unit, other_norm) = _with_norms(high), _with_norms(other)
    term = by_dots(high_unit, other_unit, pairs, scale)
    return Differentiated(
        term.loss,
        _through_norm(high_unit, high_norm, term.current),
        _through_norm(other_unit, other_norm, term.partner),
    )


def _linear_dots(high: SparseCode, other: SparseCode, pairs: Pairs, scale: float) -> Differentiated:
    """Means of dot products: the one over all pairs is the product of the codes' means."""
    group, n_rows = pairs.negatives, len(high.offsets) - 1
    batch, factor = n_rows * group.world, 2 * scale / pairs.temperature
    means = [group.sum(code.dense_by_latent().sum(dim=1)) / batch for code in (high, other)]
    of_partner, of_current = _counterparts(high, other)
    together = means[0] @ means[1] / group.world
    loss = factor * (together - (high.values * of_partner).sum() / batch)
    return Differentiated(
        loss,
        # An empty entry has no gradient.
        factor / batch * (means[1][high.latents] - of_partner).where(high.latents >= 0, 0),
        factor / batch * (means[0][other.latents] - of_current).where(other.latents >= 0, 0),
    )


def _contrastive_dots(high: SparseCode, other: SparseCode, pairs: Pairs, scale: float) -> Differentiated:
    """InfoNCE of dot products, from logits S [B, all B] that are made twice and never all in memory.

    With S_ij = h_i · o_j / τ the two directions are the means over i of lse_j S_ij − S_ii and of lse_j S_ji − S_ii (lse:
    the logarithm of the sum of exponentials). The derivative of an lse is a softmax, so that

        B · ∂loss/∂S_ij = G_ij = (softmax of row i)_j + (softmax of column j)_i − 2 [i = j],

    and as S is bilinear, that array times the partners' codes (over τ) is the gradient of the tokens' codes, its
    transpose times the tokens' that of the partners'. For S = ((2, 0), (1, 3)) the rows' softmax is ((.88, .12),
    (.12, .88)), the columns' ((.73, .05), (.27, .95)), and the array ((−.39, .17), (.39, −.17)): true pairs are pulled
    together, and the pair that competes most with them, S_10 = 1, is pushed apart most.

    The first pass finds the lse of rows, which a process has whole, and of columns, of which it has a piece: those are
    kept as a maximum and a sum relative to it, and put together over processes. The second makes the logits again, if
    they were more than one block of rows, and from them the gradients.
    """
    group, n_rows, temperature, document = pairs.negatives, len(high.offsets) - 1, pairs.temperature, pairs.document
    others, mine = _of_all_processes(other, group)
    documents = None if document is None else (document, group.gather(document))

    logits = (_Logits if kernels_for(high.values) is None else _LogitsOfMatches)(
        high, others, n_rows * group.rank, temperature, documents
    )
    row_lse, true, top, column_sum = logits.sums()
    if group.world > 1:
        highest = group.max(top)
        top, column_sum = highest, group.sum(column_sum * (top - highest).exp())
    column_lse = top + column_sum.log()
    loss = (row_lse + column_lse[group.share(n_rows)]).sub_(true, alpha=2).mean() * (scale / group.world)
    factor = scale / (n_rows * group.world * temperature)
    current, partner = logits.gradients(row_lse, column_lse, factor)
    return Differentiated(loss, current, group.sum(partner)[mine])


@dataclass(frozen=True)
class _Logits:
    """S by torch's operations, one block of rows after the other."""

    high: SparseCode
    others: SparseCode
    shift: int
    """Row i's true pair is column i + shift."""
    temperature: float
    documents: tuple[Tensor, Tensor] | None
    """Of rows and of columns, if those of one document are no negatives."""

    def sums(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """lse of each row and its true pair's logit; largest of each column, and the sum of exponentials relative to it."""
        n_rows, batch, values = len(self.high.offsets) - 1, len(self.others.offsets) - 1, self.high.values
        row_lse, true = values.new_empty(n_rows), values.new_empty(n_rows)
        top, column_sum = values.new_full((batch,), -torch.inf), values.new_zeros(batch)
        for rows, own, _, logits in self._blocks():
            highest = logits.amax(dim=1, keepdim=True)
            row_lse[rows] = highest[:, 0] + _exp_(logits - highest).sum(dim=1).log()
            true[rows] = logits[:, own].diagonal()
            new_top = torch.maximum(top, logits.amax(dim=0))
            column_sum = column_sum * (top - new_top).exp() + _exp_(logits.sub_(new_top)).sum(dim=0)
            top = new_top
        return row_lse, true, top, column_sum

    def gradients(self, row_lse: Tensor, column_lse: Tensor, factor: float) -> tuple[Tensor, Tensor]:
        """factor · G at the entries of both codes, summed over the other code's."""
        current, partner = torch.zeros_like(self.high.values), torch.zeros_like(self.others.values)
        for rows, own, part, logits in self._blocks():
            gradient = _exp_(logits - row_lse[rows, None]).add_(_exp_(logits.sub_(column_lse)))
            gradient[:, own].diagonal().sub_(2)
            gradient *= factor
            part.add(sampled_products(part.code, gradient, self.partners), current)
            partner += sampled_products(self.others, gradient.T.contiguous(), part.code.dense_by_latent())
        return current, partner

    @cached_property
    def partners(self) -> Tensor:
        return self.others.dense_by_latent()

    def _blocks(self) -> Iterator[tuple[slice, slice, Part, Tensor]]:
        """Rows, the columns of their true pairs, their entries and their logits."""
        n_rows, batch = len(self.high.offsets) - 1, self.partners.shape[1]
        # A CPU wants a block in its cache; a GPU wants few launches, and few waits for the bounds of a block.
        size = max(1, (CUDA_BLOCK_ELEMENTS if self.partners.is_cuda else BLOCK_ELEMENTS) // batch)
        for start in range(0, n_rows, size):
            rows = slice(start, min(start + size, n_rows))
            own = slice(self.shift + rows.start, self.shift + rows.stop)
            part = self.high.block(rows.start, rows.stop)
            logits = weighted_rows(part.code, self.partners).div_(self.temperature)
            if self.documents is not None:
                excluded = self.documents[0][rows, None] == self.documents[1]
                excluded[:, own].fill_diagonal_(False)
                logits.masked_fill_(excluded, EXCLUDED)
            yield rows, own, part, logits


class _LogitsOfMatches(_Logits):
    """The same by kernels, which multiply where two codes have a latent in common; one block of rows after the other."""

    _logits: Tensor | None = None
    """All of them, from the sums to the gradients, if they are one block."""

    def sums(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        columns = []
        for rows in self._rows:
            logits = self._block(rows)
            columns.append(self._kernels.sums_of_columns(logits))
        self._logits = logits if len(self._rows) == 1 else None
        top, column_sum = columns[0]
        for highest, total in columns[1:]:
            higher = torch.maximum(top, highest)
            column_sum = column_sum * (top - higher).exp() + total * (highest - higher).exp()
            top = higher
        return *self._of_rows, top, column_sum

    def gradients(self, row_lse: Tensor, column_lse: Tensor, factor: float) -> tuple[Tensor, Tensor]:
        current, partner = torch.zeros_like(self.high.values), torch.zeros_like(self.others.values)
        every = slice(0, len(column_lse))
        for rows in self._rows:
            logits = self._block(rows) if self._logits is None else self._logits
            own, lse = self.shift + rows.start, (row_lse, column_lse)
            through = self._kernels.through_logits
            through(self.high[:2], rows, self._by_latent[1], 0, logits, lse, own, factor, current)
            through(self.others[:2], every, self._by_latent[0], rows.start, logits.T, lse[::-1], -own, factor, partner)
        return current, partner

    def _block(self, rows: slice) -> Tensor:
        logits: Tensor = self._kernels.logits_of_rows(
            self.high[:3],
            rows,
            self._by_latent[1],
            len(self.others.offsets) - 1,
            self.shift + rows.start,
            self.temperature,
            self.documents,
            *self._of_rows,
        )
        return logits

    @cached_property
    def _of_rows(self) -> tuple[Tensor, Tensor]:
        """lse of each row and its true pair's logit, once they have been made."""
        lse, true = self.high.values.new_empty(2, len(self.high.offsets) - 1)
        return lse, true

    @cached_property
    def _rows(self) -> list[slice]:
        n_rows, n_columns = len(self.high.offsets) - 1, len(self.others.offsets) - 1
        size = max(1, LOGITS_BYTES // (4 * n_columns))
        return [slice(start, min(start + size, n_rows)) for start in range(0, n_rows, size)]

    @cached_property
    def _by_latent(self) -> list[tuple[tuple[Tensor, Tensor], Tensor, Tensor]]:
        """Both codes' entries by latent: where they begin and end, rows and values."""
        return [
            (by.bounds, by.rows, code.values[by.order]) for code in (self.high, self.others) for by in (code.by_latent,)
        ]

    @property
    def _kernels(self) -> Any:
        return kernels_that_run(self.high.values)


def _of_all_processes(code: SparseCode, group: Group) -> tuple[SparseCode, slice]:
    """The rows of all processes' codes, in order of rank; and where this process's entries are among theirs."""
    if group.world == 1:
        return code, slice(None)
    counts = group.gather(code.offsets.diff())
    lengths = counts.view(group.world, -1).sum(dim=1).tolist()
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(dim=0)])
    latents = group.gather_ragged(code.latents.int(), lengths).long()
    whole = SparseCode(offsets, latents, group.gather_ragged(code.values, lengths), code.dict_size)
    bounds = starts(lengths)
    return whole, slice(bounds[group.rank], bounds[group.rank + 1])


def _exp_(exponents: Tensor) -> Tensor:
    """exp in place, of values up to 0. What is below e^-80 of the whole is cut there: subnormal results are slow."""
    return exponents.clamp_min_(-80).exp_()


def _with_norms(code: SparseCode) -> tuple[SparseCode, Tensor]:
    """Rows scaled to norm 1, and the norm of each entry's row [n]."""
    norms = code.sum_values(code.values.square()).sqrt().clamp_min(1e-8)[code.rows]
    return code.with_values(code.values / norms), norms


def _through_norm(unit: SparseCode, norms: Tensor, gradient: Tensor) -> Tensor:
    """Gradient with respect to the entries before they were scaled: what would only lengthen a row falls away."""
    along = unit.sum_values(gradient * unit.values)
    return (gradient - along[unit.rows] * unit.values) / norms


def sparse_weighted_l1(high: SparseCode, other: SparseCode, pairs: Pairs, weight: float) -> Differentiated:
    """The L1 term at the entries of both codes."""
    batch, scale = len(high.offsets) - 1, weight / pairs.group.world
    cosine = cosine_similarity(pairs.current, pairs.partner, dim=-1)
    difference, reverse, alone = _differences(high, other)
    of_entries, of_others = cosine[high.rows] / batch, cosine[other.rows] / batch
    distance = (difference.abs() * of_entries).sum() + _those(reverse.abs() * of_others, alone, other).sum()
    return Differentiated(
        scale * distance, scale * (difference.sign() * of_entries), scale * (reverse.sign() * of_others)
    )


def sparse_squared_distance(high: SparseCode, other: SparseCode, pairs: Pairs, weight: float) -> Differentiated:
    """The squared distance at the entries of both codes."""
    batch, scale = len(high.offsets) - 1, weight / pairs.group.world
    difference, reverse, alone = _differences(high, other)
    distance = difference.square().sum() + _those(reverse, alone, other).square().sum()
    return Differentiated(scale * (distance / batch), scale * (2 * difference / batch), scale * (2 * reverse / batch))


def _differences(high: SparseCode, other: SparseCode) -> tuple[Tensor, Tensor, Tensor]:
    """Each entry less its counterpart in the other code, for the entries of both; and which of the second the first lacks.

    An entry that both codes hold is in both lists; it counts once, on the current side.
    """
    of_partner, of_current = _counterparts(high, other)
    # Entries are positive.
    return high.values - of_partner, other.values - of_current, of_current == 0


def _those(values: Tensor, chosen: Tensor, code: SparseCode) -> Tensor:
    """The chosen ones of values [n] that are to be summed; how many the host does not ask for where the code has spare entries."""
    return values.where(chosen, 0) if code.spare else values[chosen]


def _counterparts(high: SparseCode, other: SparseCode) -> tuple[Tensor, Tensor]:
    """For the entries of each code the value at the same place in the other; 0 where there is none."""
    if high.spare:
        return other.at(high.rows, high.latents), high.at(other.rows, other.latents)
    keys, other_keys = _keys(high), _keys(other)
    return _values_at(keys, other_keys, other.values), _values_at(other_keys, keys, high.values)


def _keys(code: SparseCode) -> Tensor:
    """A number for the row and latent of each entry, ascending."""
    return code.rows * code.dict_size + code.latents


def _values_at(keys: Tensor, among: Tensor, values: Tensor) -> Tensor:
    """The value stored under each of `keys` in the ascending list `among`; 0 where there is none."""
    if len(among) == 0:
        return values.new_zeros(len(keys))
    place = torch.searchsorted(among, keys).clamp_max(len(among) - 1)
    return torch.where(among[place] == keys, values[place], 0)


def _of_directions(config: RunConfig) -> float:
    """What makes a mean, or the sum, of a term's two directions."""
    return 0.5 if config.objective.directions == "mean" else 1.0


TERMS: dict[str, Term] = {
    "contrastive": Term(contrastive, sparse_contrastive, _of_directions),
    "linear": Term(linear, sparse_linear, _of_directions),
    "l2": Term(squared_distance, sparse_squared_distance),
    # The released code puts it among the losses of the first group.
    "l1": Term(weighted_l1, sparse_weighted_l1, lambda config: group_weights(config)[0]),
}
