"""The objective and its gradients in closed form, at the selected entries only.

Equal to autograd through `tsae.training.objective` up to rounding. After batch-top-k a step needs one encoder product
of both halves; everything else is sums over the k·B nonzero entries, and no [B, F] tensor outlives its block of rows.

With several processes each has its share of the batch. Its gradients are its share of the whole batch's, whose size
divides every sum; they are summed over processes once, the decoder's while the encoder's are being made, and the
encoder's while the update of the decoder is prepared.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from tsae.parallel.group import ALONE, Group
from tsae.runtime.phases import phase
from tsae.sae.architectures import AutoEncoderTopK
from tsae.sae.dictionary import ThresholdDictionary
from tsae.sae.selection.batch import GUESS_MARGIN, Encoder, Selection, batch_top_k_codes
from tsae.sae.selection.global_batch import global_top_k_codes
from tsae.sae.selection.rows import top_k_codes
from tsae.sae.sparse import SparseCode, sampled_products, weighted_rows
from tsae.training.engine import Encoded, Engine
from tsae.training.gradients import Gradients
from tsae.training.objective import Losses, Weights, variance
from tsae.training.sharding import Shard
from tsae.training.sparse.contrast import TemporalTerm, contrast, squared_distance, weighted_l1
from tsae.training.sparse.gradients import Entries, Revived, SparseGradients


class _Codes(NamedTuple):
    centred: Tensor
    """Inputs minus b_dec, [halves · B, D]: current tokens, then partners."""
    current: SparseCode
    partner: SparseCode | None


class SparseEngine(Engine[ThresholdDictionary]):
    """Remembers the last cuts (the next guesses) and owns the gradient buffers, which are written in place.

    `encoder_precision` and `deterministic` are the settings of that name. The k·B largest activations are selected
    over the batches of all processes of `selection`, negatives come from all of `negatives`: the `group` of the
    training, or `ALONE`. Gradients are summed by `shard`, which has to be waited for.
    """

    def __init__(
        self,
        encoder_precision: str = "exact",
        deterministic: bool = True,
        group: Group = ALONE,
        selection: Group = ALONE,
        negatives: Group = ALONE,
        shard: Shard | None = None,
    ) -> None:
        self._encoder = Encoder(encoder_precision)
        self._deterministic = deterministic
        self._group, self._selection, self._negatives = group, selection, negatives
        self._shard = shard or Shard(group)
        self._guesses: list[float | None] = [None, None]

    @torch.no_grad()
    def encode(self, dictionary: ThresholdDictionary, current: Tensor, partner: Tensor | None) -> Encoded:
        halves = [current] if partner is None else [current, partner]
        centred = torch.stack(halves).sub_(dictionary.b_dec)
        selections = self._select(dictionary)(
            self._encoder,
            list(centred),
            dictionary.W_enc,
            dictionary.b_enc,
            int(dictionary.k),
            self._guesses[: len(halves)],
        )
        self._guesses = [GUESS_MARGIN * selection.cut for selection in selections]
        codes = [selection.code for selection in selections]
        fired = torch.zeros(dictionary.dict_size, dtype=torch.bool, device=current.device)
        fired[codes[0].latents] = True
        values = codes[0].values
        smallest = values.new_full((len(current),), torch.inf).scatter_reduce_(0, codes[0].rows, values, "amin")
        own = _Codes(centred.flatten(0, 1), codes[0], codes[1] if partner is not None else None)
        cut = dictionary.cut_of(self._group.gather(smallest))
        mass = torch.stack([codes[0].mass(group) for group in dictionary.group_slices])
        return Encoded(own, self._group.any(fired), torch.tensor(len(values)), cut, mass)

    def _select(self, dictionary: ThresholdDictionary) -> Callable[..., list[Selection]]:
        if isinstance(dictionary, AutoEncoderTopK):
            return top_k_codes
        if self._selection.world == 1:
            return batch_top_k_codes
        return partial(global_top_k_codes, group=self._selection)

    @torch.no_grad()
    def backward(
        self,
        dictionary: ThresholdDictionary,
        weights: Weights,
        encoded: Encoded,
        current: Tensor,
        partner: Tensor | None,
        dead: Tensor,
        document: Tensor | None = None,
    ) -> tuple[Losses, Gradients]:
        codes: _Codes = encoded.codes
        own, batch = len(current), len(current) * self._group.world
        total = batch * float(variance(current, self._group)) if weights.relative else batch
        gradients = SparseGradients(dictionary, self._deterministic, self._group.world == 1, self._shard)
        parts = [codes.current.within(group) for group in dictionary.group_slices]
        residuals = _residuals(dictionary, [part for part, _ in parts], codes.centred[:own])
        group_losses = torch.stack(
            [
                weight * residual.square().sum() / total
                for weight, residual in zip(weights.group_weights, residuals, strict=True)
            ]
        )
        auxk, revived = self._auxiliary(dictionary, weights, codes.centred[:own], residuals[-1], dead)
        through = _through_decoder(dictionary, weights, codes.current, parts, residuals, total)
        document = None if weights.same_document else document
        term = self._temporal(weights, codes, parts[0][0], dictionary.group_slices[0], current, partner, document)
        *summed, temporal = self._group.sums(*group_losses, term[0].loss if term else group_losses.new_zeros(()))
        # From here on nothing is exchanged but gradients: what came after them would wait for them.
        gradients.decoder(through.entries, through.back, through.total, revived)
        entries = [Entries(codes.current.rows, codes.current.latents, through.value_gradient)]
        if term is not None:
            through.value_gradient[parts[0][1]] += weights.temporal_alpha * term[0].current
            partner_high = term[1]
            entries.append(
                Entries(partner_high.rows + own, partner_high.latents, weights.temporal_alpha * term[0].partner)
            )
        gradients.encoder(entries, codes.centred, revived)

        group_losses = torch.stack(summed)
        l2_loss = group_losses.sum() * weights.reduction
        loss = l2_loss + weights.auxk_alpha * auxk + weights.temporal_alpha * temporal
        strongest = term[0].current.abs().max() if term and len(term[0].current) else l2_loss.new_zeros(())
        losses = Losses(loss, l2_loss, group_losses, auxk, temporal, residuals[-1], strongest)
        return losses, gradients.all()

    def state(self) -> dict[str, Any]:
        """The guesses: they change no result, but what it costs to get it."""
        return {"guesses": self._guesses}

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from what `state()` returned."""
        self._guesses = list(state["guesses"])

    @phase("contrast")
    def _temporal(
        self,
        weights: Weights,
        codes: _Codes,
        high: SparseCode,
        group: slice,
        current: Tensor,
        partner: Tensor | None,
        document: Tensor | None,
    ) -> tuple[TemporalTerm, SparseCode] | None:
        """The temporal term and the partner's high-level code; none if the objective has no such term."""
        if weights.temporal is None or codes.partner is None or partner is None:
            return None
        other, _ = codes.partner.within(group)
        if weights.temporal in ("contrastive", "linear"):
            # Each process's term is a mean over the processes that it shares negatives with.
            scale = weights.direction_scale * self._negatives.world / self._group.world
            form = (weights.temporal, high, other, weights.similarity, weights.temperature)
            return contrast(*form, scale, self._negatives, document), other
        if weights.temporal == "l2":
            term, weight = squared_distance(high, other), 1 / self._group.world
        else:
            term = weighted_l1(high, other, cosine_similarity(current, partner, dim=-1))
            weight = weights.group_weights[0] / self._group.world
        return TemporalTerm(*(weight * part for part in term)), other

    @phase("aux-k")
    def _auxiliary(
        self,
        dictionary: ThresholdDictionary,
        weights: Weights,
        centred: Tensor,
        error: Tensor,
        dead: Tensor,
    ) -> tuple[Tensor, Revived | None]:
        """Aux-k on the columns of the dead latents alone."""
        latents = dead.nonzero()[:, 0]
        if len(latents) == 0:
            return error.new_zeros(()), None
        revived, latents = _strongest(dictionary, latents, centred, weights.aux_k)
        W_dec = dictionary.W_dec[latents]
        difference = error - revived @ W_dec
        spread = error - self._group.mean(error.mean(dim=0))
        unexplained, variance = self._group.sums(
            *(deviation.square().sum(dim=1).mean() / self._group.world for deviation in (difference, spread))
        )
        loss = unexplained / variance
        if not torch.isfinite(loss):
            return loss.nan_to_num(0.0), None
        back = difference.mul_(-2 * weights.auxk_alpha / (len(error) * self._group.world * variance))
        return loss, Revived(latents, revived.T @ back, (back @ W_dec.T).mul_(revived > 0))


def _strongest(dictionary: ThresholdDictionary, dead: Tensor, centred: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest positive pre-activations of dead latents in each row, dense over those that have any; and which.

    A latent without a positive one in the batch has no part in aux-k, and is no work.
    """
    pre = torch.addmm(dictionary.b_enc[dead], centred, dictionary.W_enc.T[dead].T).relu_()
    used = pre.amax(dim=0).nonzero()[:, 0]
    if len(used) < len(dead):
        pre, dead = pre[:, used], dead[used]
    if k < len(dead):
        strongest = pre.topk(k, dim=1, sorted=False)
        pre = pre.zero_().scatter_(1, strongest.indices, strongest.values)
    return pre, dead


@phase("decode")
def _residuals(dictionary: ThresholdDictionary, parts: list[SparseCode], centred: Tensor) -> list[Tensor]:
    """x minus each nested reconstruction, G tensors [B, D]."""
    residuals, residual = [], centred
    for part, group in zip(parts, dictionary.group_slices, strict=True):
        residual = residual - weighted_rows(part, dictionary.W_dec[group])
        residuals.append(residual)
    return residuals


class _Through(NamedTuple):
    """The reconstruction's gradients with respect to the code, to W_dec and to b_dec."""

    value_gradient: Tensor
    """Of the code's entries [n]."""
    entries: list[Entries]
    """Of W_dec: entries of each group; their rows are of `back`."""
    back: Tensor
    """The outputs' gradients [G · B, D], those of each group's reconstruction and all that include it."""
    total: Tensor
    """Of b_dec [D]."""


@phase("decode")
def _through_decoder(
    dictionary: ThresholdDictionary,
    weights: Weights,
    code: SparseCode,
    parts: list[tuple[SparseCode, Tensor]],
    residuals: list[Tensor],
    total: float,
) -> _Through:
    """Backward through the decoder. `total` is what the sum of squared errors over all processes is divided by."""
    value_gradient, entries = torch.empty_like(code.values), []
    batch = len(residuals[-1])
    backs = torch.empty(len(parts), *residuals[-1].shape, dtype=code.values.dtype, device=code.values.device)
    for g in reversed(range(len(parts))):
        part, places = parts[g]
        group = dictionary.group_slices[g]
        torch.mul(residuals[g], -2 * weights.groups[g] / total, out=backs[g])
        if g + 1 < len(parts):
            backs[g] += backs[g + 1]
        value_gradient[places] = sampled_products(part, backs[g], dictionary.W_dec[group])
        entries.append(Entries(part.rows + g * batch, part.latents + group.start, part.values))
    return _Through(value_gradient, entries, backs.flatten(0, 1), backs[0].sum(dim=0))
