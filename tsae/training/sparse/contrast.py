"""The temporal terms on sparse high-level codes, with their gradients in closed form and no [B, B] array.

Shapes: B pairs of this process, F0 latents of the high-level split, n entries of a code.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from tsae.parallel.group import ALONE, Group, starts
from tsae.sae.sparse import SparseCode, sampled_products, weighted_rows
from tsae.training.objective import EXCLUDED

BLOCK_ELEMENTS, CUDA_BLOCK_ELEMENTS = 2**19, 64 * 2**20


class TemporalTerm(NamedTuple):
    """Value of the term and its gradient with respect to the entries of both codes."""

    loss: Tensor
    current: Tensor
    """[n of the current code]"""
    partner: Tensor
    """[n of the partner code]"""


def contrast(
    form: str,
    high: SparseCode,
    other: SparseCode,
    similarity: str,
    temperature: float,
    scale: float,
    group: Group = ALONE,
    document: Tensor | None = None,
) -> TemporalTerm:
    """The `contrastive` or `linear` term of codes [B, F0]; `scale` multiplies the sum of its two directions.

    Every token is told from the partners of all processes of `group`, and every partner from all their tokens; with
    `document` [B], from those of other documents (contrastive form). The value is this process's share of the whole: the
    sum over processes is the term.
    """
    by_dot = partial(_contrastive, document=document) if form == "contrastive" else _linear
    if similarity == "cosine":
        high_unit, high_norm = _unit_rows(high)
        other_unit, other_norm = _unit_rows(other)
        term = by_dot(high_unit, other_unit, temperature, scale, group)
        return TemporalTerm(
            term.loss,
            _through_norm(high_unit, high_norm, term.current),
            _through_norm(other_unit, other_norm, term.partner),
        )
    return by_dot(high, other, temperature, scale, group)


def _linear(high: SparseCode, other: SparseCode, temperature: float, scale: float, group: Group) -> TemporalTerm:
    """Means of dot products: the one over all pairs is the product of the codes' means."""
    own = len(high.offsets) - 1
    batch, factor = own * group.world, 2 * scale / temperature
    means = [group.sum(code.dense_by_latent().sum(dim=1)) / batch for code in (high, other)]
    keys, other_keys = _keys(high), _keys(other)
    of_partner = _values_at(keys, other_keys, other.values)
    of_current = _values_at(other_keys, keys, high.values)
    together = means[0] @ means[1] / group.world
    loss = factor * (together - (high.values * of_partner).sum() / batch)
    return TemporalTerm(
        loss,
        factor / batch * (means[1][high.latents] - of_partner),
        factor / batch * (means[0][other.latents] - of_current),
    )


def _contrastive(
    high: SparseCode,
    own_other: SparseCode,
    temperature: float,
    scale: float,
    group: Group,
    document: Tensor | None,
) -> TemporalTerm:
    """Symmetric InfoNCE of dot products. Logits are made block of rows by block of rows, twice: first for the
    log-sum-exp of rows (exact) and of columns (running, then over processes), then for the gradients.
    """
    own = len(high.offsets) - 1
    other, mine = _of_all_processes(own_other, group)
    batch, shift = own * group.world, own * group.rank
    columns = other.dense_by_latent()
    documents = None if document is None else group.gather(document)

    def logits_of(block: SparseCode, start: int, stop: int) -> Tensor:
        logits = weighted_rows(block, columns).div_(temperature)
        if document is not None and documents is not None:
            excluded = document[start:stop, None] == documents
            excluded[:, shift + start : shift + stop].fill_diagonal_(False)
            logits.masked_fill_(excluded, EXCLUDED)
        return logits

    # A CPU wants a block in its cache; a GPU wants few launches, and few waits for the bounds of a block.
    rows = max(1, (CUDA_BLOCK_ELEMENTS if columns.is_cuda else BLOCK_ELEMENTS) // batch)
    blocks = [(start, min(start + rows, own)) for start in range(0, own, rows)]

    row_lse = high.values.new_empty(own)
    diagonal = high.values.new_empty(own)
    top = high.values.new_full((batch,), -torch.inf)
    total = high.values.new_zeros(batch)
    for start, stop in blocks:
        logits = logits_of(_row_block(high, start, stop), start, stop)
        highest = logits.amax(dim=1, keepdim=True)
        row_lse[start:stop] = highest[:, 0] + _exp_(logits - highest).sum(dim=1).log()
        diagonal[start:stop] = logits[:, shift + start : shift + stop].diagonal()
        new_top = torch.maximum(top, logits.amax(dim=0))
        total = total * (top - new_top).exp() + _exp_(logits.sub_(new_top)).sum(dim=0)
        top = new_top
    highest = group.max(top)
    column_lse = highest + group.sum(total * (top - highest).exp()).log()
    loss = scale * (row_lse + column_lse[group.share(own)] - 2 * diagonal).mean() / group.world

    current = torch.empty_like(high.values)
    partner = torch.zeros_like(other.values)
    factor = scale / (batch * temperature)
    for start, stop in blocks:
        block = _row_block(high, start, stop)
        logits = logits_of(block, start, stop)
        gradient = _exp_(logits - row_lse[start:stop, None]).add_(_exp_(logits.sub_(column_lse)))
        gradient[:, shift + start : shift + stop].diagonal().sub_(2)
        gradient *= factor
        first, last = int(high.offsets[start]), int(high.offsets[stop])
        current[first:last] = sampled_products(block, gradient, columns)
        partner += sampled_products(other, gradient.T.contiguous(), block.dense_by_latent())
    return TemporalTerm(loss, current, group.sum(partner)[mine])


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


def _row_block(code: SparseCode, start: int, stop: int) -> SparseCode:
    offsets = code.offsets[start : stop + 1]
    first, last = int(offsets[0]), int(offsets[-1])
    return SparseCode(offsets - first, code.latents[first:last], code.values[first:last], code.dict_size)


def _unit_rows(code: SparseCode) -> tuple[SparseCode, Tensor]:
    """Rows scaled to norm 1, and the norm of each entry's row [n]."""
    norms = code.sum_values(code.values.square()).sqrt().clamp_min(1e-8)[code.rows]
    return code.with_values(code.values / norms), norms


def _through_norm(unit: SparseCode, norms: Tensor, gradient: Tensor) -> Tensor:
    """Gradient with respect to the entries before they were scaled to unit rows."""
    along = unit.sum_values(gradient * unit.values)
    return (gradient - along[unit.rows] * unit.values) / norms


def weighted_l1(high: SparseCode, other: SparseCode, cosine: Tensor) -> TemporalTerm:
    """Mean over pairs of the L1 distance of codes [B, F0] times the cosine [B] of their inputs."""
    batch = len(high.offsets) - 1
    difference, reverse, alone = _differences(high, other)
    weight, reverse_weight = cosine[high.rows] / batch, cosine[other.rows] / batch
    distance = (difference.abs() * weight).sum() + (reverse.abs() * reverse_weight)[alone].sum()
    return TemporalTerm(distance, difference.sign() * weight, reverse.sign() * reverse_weight)


def squared_distance(high: SparseCode, other: SparseCode) -> TemporalTerm:
    """Mean over pairs of the squared distance of codes [B, F0]."""
    batch = len(high.offsets) - 1
    difference, reverse, alone = _differences(high, other)
    distance = difference.square().sum() + reverse[alone].square().sum()
    return TemporalTerm(distance / batch, 2 * difference / batch, 2 * reverse / batch)


def _differences(high: SparseCode, other: SparseCode) -> tuple[Tensor, Tensor, Tensor]:
    """Each entry less its counterpart in the other code, for the entries of both; and which of the second the first lacks.

    An entry that both codes hold is in both lists; it counts once, on the current side.
    """
    keys, other_keys = _keys(high), _keys(other)
    difference = high.values - _values_at(keys, other_keys, other.values)
    reverse = other.values - _values_at(other_keys, keys, high.values)
    return difference, reverse, ~torch.isin(other_keys, keys, assume_unique=True)


def _keys(code: SparseCode) -> Tensor:
    """A number for the row and latent of each entry, ascending."""
    return code.rows * code.dict_size + code.latents


def _values_at(keys: Tensor, among: Tensor, values: Tensor) -> Tensor:
    """The value stored under each of `keys` in the ascending list `among`; 0 where there is none."""
    if len(among) == 0:
        return values.new_zeros(len(keys))
    place = torch.searchsorted(among, keys).clamp_max(len(among) - 1)
    return torch.where(among[place] == keys, values[place], 0)
