"""The objective and its gradients in closed form, at the selected entries only.

Equal to autograd through `tsae.training.objective` up to rounding. After batch-top-k a step needs one encoder product
of both halves; everything else is sums over the k·B nonzero entries, and no [B, F] tensor outlives its block of rows.

With several processes each has its share of the batch. Its gradients are its share of the whole batch's, whose size
divides every sum; they are summed over processes once, the decoder's while the encoder's are being made, and the
encoder's while the update of the decoder is prepared.

Shapes: B rows, D activation_dim, F dict_size, G groups, n entries.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tsae.parallel.group import ALONE, Group
from tsae.runtime.late import Late
from tsae.runtime.phases import phase
from tsae.sae.dictionary import ThresholdDictionary
from tsae.sae.selection.global_top_k import global_top_k_codes
from tsae.sae.selection.listed import Listed, listed_codes
from tsae.sae.selection.screens import products_at
from tsae.sae.selection.top_k import GUESS_MARGIN, Encoder, Selection, batch_top_k_codes, top_k_codes
from tsae.sae.sparse import (
    ByLatent,
    Part,
    SparseCode,
    add_rows,
    kernels_for,
    kernels_that_run,
    row_squares,
    sampled_products,
    side_by_side,
    weighted_rows,
)
from tsae.training.objective import Encoded, Engine, Losses, Weights
from tsae.training.temporal import Pairs
from tsae.training.update import (
    DECODER,
    OTHERS,
    DenseRows,
    Gradient,
    Gradients,
    RowSums,
    Shard,
    WholeGradient,
    by_latent,
    chunk_rows,
)


class _Codes(NamedTuple):
    centred: Tensor
    """Inputs minus b_dec, [halves · B, D]: current tokens, then partners where those are encoded."""
    current: SparseCode
    partner: SparseCode | None
    listed: Listed | None
    """The selection, where the host has not seen whether it is right."""


class Entries(NamedTuple):
    """Entries that carry a gradient into a matrix; rows index what they are multiplied with there."""

    rows: Tensor
    latents: Tensor
    gradient: Tensor


class Revived(NamedTuple):
    """What aux-k asks of dead latents."""

    latents: Tensor
    """The dead ones [m], ascending."""
    decoder: Tensor
    """Their rows in the decoder's gradient [m, D]."""
    gradient: Tensor
    """That of their pre-activations [B, m]."""


class SparseEngine(Engine[ThresholdDictionary]):
    """Remembers the last cuts of each budget and half (the next guesses), and owns the gradient buffers, which are written in place.

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
        self._guesses: list[float | None] = []
        self._late_guesses: Tensor | None = None
        """The guesses [G, H] where they stay on the device, always in the same place."""
        self._passes = 1

    @torch.no_grad()
    def encode(self, dictionary: ThresholdDictionary, current: Tensor, partner: Tensor | None) -> Encoded:
        halves = [current] if partner is None else [current, partner]
        centred, budgets = torch.stack(halves).sub_(dictionary.b_dec), dictionary.budgets
        known = len(self._guesses) == len(budgets) * len(halves) and None not in self._guesses
        listed: Listed | None = None
        if self._group.world == 1 and kernels_for(current) is not None:
            # One process alone can make its selection again when it has gone on: see `settled`.
            late = self._late_guesses
            if late is None and known:
                numbers = torch.tensor(self._guesses, device=current.device)
                late = self._late_guesses = numbers.view(len(budgets), len(halves))
            if late is not None and late.shape != (len(budgets), len(halves)):
                late = None
            weights, per_token = (dictionary.W_enc, dictionary.b_enc), dictionary.selects_per_token
            listed = listed_codes(self._encoder, centred, *weights, budgets, late, per_token)
            codes, smallest = listed.codes, list(listed.smallest[:, 0])
        else:
            parts: list[list[Selection]] = []
            for number, (latents, k) in enumerate(budgets):
                encoder = dictionary.W_enc.T[latents].T, dictionary.b_enc[latents]
                mine = slice(number * len(halves), (number + 1) * len(halves))
                guesses = list(self._guesses[mine]) if known else [None] * len(halves)
                parts.append(self._select(dictionary)(self._encoder, list(centred), *encoder, k, guesses))
            self._guesses = [GUESS_MARGIN * each.cut for part in parts for each in part]
            codes = [side_by_side([each.code for each in half]) for half in zip(*parts, strict=True)]
            smallest = [part[0].code.smallest() for part in parts]
        cuts = torch.stack([dictionary.cut_of(self._group.gather(each)) for each in smallest])
        code, *others = codes
        mass, n_active = code.of_groups(dictionary.group_slices)
        counts = None if listed is None else listed.check.counts
        made = _Codes(centred.flatten(0, 1), code, others[0] if others else None, listed)
        return Encoded(made, self._group.any(code.fired()), n_active, cuts, mass, counts)

    def _select(self, dictionary: ThresholdDictionary) -> Callable[..., list[Selection]]:
        """What selects from budgets one by one, and reads back what it needs to know."""
        if dictionary.selects_per_token:
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
        n_rows, slices = len(current), weights.parts
        divisor: float | Tensor = n_rows * self._group.world
        spread = None
        if weights.relative:
            mean = self._group.mean(current.mean(dim=0))
            spread = self._group.mean(row_squares(current, mean).mean())
            divisor = divisor * _number(spread)
        gradients = SparseGradients(dictionary, self._deterministic, self._group.world == 1, self._shard)
        code, contrasts = codes.current, weights.temporal is not None and codes.partner is not None
        # Among spare entries parts are as long as the whole, and only a term of codes needs one.
        parts = [code.within(group) for group in (slices[: int(contrasts)] if code.spare else slices)]
        centred = codes.centred[:n_rows]
        with phase("decode"):
            residuals, squares, alone = _residuals(dictionary, weights, code, parts, centred)
        # A tensor in double precision, as it is on a GPU, would make the losses double.
        single = divisor.to(centred.dtype) if isinstance(divisor, Tensor) else divisor
        of_parts = weights.group_weights
        if isinstance(of_parts, Tensor):
            group_losses = squares * of_parts / single
        else:
            group_losses = torch.stack([one * weight for one, weight in zip(squares, of_parts, strict=True)]) / single
        auxk, revived = self._auxiliary(dictionary, weights, centred, residuals[-1], dead)
        predicted = (current, partner) if weights.predicts and partner is not None else None
        through = _through_decoder(dictionary, weights, code, parts, residuals, predicted, divisor)
        term, partner_high = None, None
        if weights.temporal is not None and codes.partner is not None and partner is not None:
            with phase("contrast"):
                high, partner_high = parts[0].code, codes.partner.within(slices[0]).code
                if code.spare:
                    high, partner_high = gradients.sorted(code, high, partner_high)
                document = None if weights.same_document else document
                form = document, weights.similarity, weights.temperature
                pairs = Pairs(current, partner, *form, self._group, self._negatives)
                term = weights.temporal.sparse(high, partner_high, pairs, weights.temporal_weight)
        here = term.loss if term else group_losses.new_zeros(())
        if through.unpredicted is not None:
            here = through.unpredicted / single
        group_losses, temporal = self._group.sums(group_losses, here)
        # From here on nothing is exchanged but gradients: what came after them would wait for them.
        gradients.decoder(through.entries, through.back, revived)
        entries = [Entries(codes.current.rows, codes.current.latents, through.value_gradient)]
        if term is not None and partner_high is not None:
            parts[0].add(weights.temporal_alpha * term.current, through.value_gradient)
            of_partner = weights.temporal_alpha * term.partner
            entries.append(Entries(partner_high.rows + n_rows, partner_high.latents, of_partner))
        gradients.encoder(entries, codes.centred, revived)

        l2_loss = group_losses.sum() * weights.reduction
        weight = weights.prediction if predicted else weights.temporal_alpha
        loss = l2_loss + weights.auxk_alpha * auxk + weight * temporal
        of_term = term.current if term and len(term.current) else l2_loss.new_zeros(1)
        strongest = torch.linalg.vector_norm(of_term, torch.inf)
        losses = Losses(
            loss, l2_loss, group_losses, auxk, temporal, squares[-1], alone, temp_gradient=strongest, variance=spread
        )
        return losses, gradients.made

    def settled(self, encoded: Encoded, counts: Late | None) -> bool:
        """Whether the selections, of which nothing was read back while they were made, turn out to be right.

        If not, `encode` will make them with other guesses or more room. A GPU that is behind has still the backward
        pass to do when it has told this, so that it need not wait for what comes next.
        """
        listed: Listed | None = encoded.codes.listed
        if counts is None or listed is None:
            return True
        again = listed.check.again(counts.read(), self._passes)
        self._passes = 1 if again is None else self._passes + 1
        if again is not None:
            self._guess(again)
        return again is None

    def keep(self, encoded: Encoded) -> None:
        """Guess a little under the cuts of these codes in the next step."""
        if encoded.codes.listed is not None:
            self._guess(GUESS_MARGIN * encoded.codes.listed.cuts)

    def kind_of_step(self) -> Hashable | None:
        """How long the lists of candidates are; None on a CPU, in several processes, and until there are guesses."""
        listing = None if self._late_guesses is None else self._encoder.listing(self._late_guesses)
        return None if listing is None or self._group.world > 1 else listing.capacity

    def _guess(self, guesses: Tensor) -> None:
        """The next ones [G, H]."""
        if self._late_guesses is None or self._late_guesses.shape != guesses.shape:
            self._late_guesses = guesses
        else:
            self._late_guesses.copy_(guesses)

    def state(self) -> dict[str, Any]:
        """The guesses: they change no result, but what it costs to get it."""
        if self._late_guesses is not None:
            return {"guesses": self._late_guesses.flatten().tolist()}
        return {"guesses": [None if guess is None else float(guess) for guess in self._guesses]}

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from what `state()` returned."""
        self._guesses = list(state["guesses"])
        late = self._late_guesses
        if late is not None and late.numel() == len(self._guesses) and None not in self._guesses:
            late.copy_(torch.tensor(self._guesses).view_as(late))

    @phase("aux-k")
    def _auxiliary(
        self, dictionary: ThresholdDictionary, weights: Weights, centred: Tensor, error: Tensor, dead: Tensor
    ) -> tuple[Tensor, Revived | None]:
        """Aux-k on the columns of the dead latents alone; `error` [B, D] is what they are to explain."""
        most = self.most_dead
        if most == 0:
            return error.new_zeros(()), None
        latents = dead.nonzero()[:, 0] if most is None else _first_set(dead, most)
        if len(latents) == 0:
            return error.new_zeros(()), None
        revived = torch.addmm(dictionary.b_enc[latents], centred, dictionary.W_enc.T[latents].T).relu_()
        if most is None:
            # A latent without a positive pre-activation in the batch has no part in aux-k, and is no work.
            used = revived.amax(dim=0).nonzero()[:, 0]
            if len(used) < len(latents):
                revived, latents = revived[:, used], latents[used]
        else:
            # What is none is as a latent without a positive pre-activation.
            revived.masked_fill_(latents < 0, 0)
            latents = latents.clamp_min(0)
        if weights.aux_k < len(latents):
            strongest = revived.topk(weights.aux_k, dim=1, sorted=False)
            revived = revived.zero_().scatter_(1, strongest.indices, strongest.values)
        W_dec = dictionary.W_dec[latents]
        difference = error - revived @ W_dec
        mean = self._group.mean(error.mean(dim=0))
        squares = row_squares(difference), row_squares(error, mean)
        unexplained, variance = self._group.sums(*(each.mean() / self._group.world for each in squares))
        loss = unexplained / variance
        factor = -2 * weights.auxk_alpha / (len(error) * self._group.world * variance)
        if most is not None:
            factor = factor.where(loss.abs() < torch.inf, 0)
        elif not torch.isfinite(loss):
            return loss.nan_to_num(0.0), None
        back = difference.mul_(factor)
        return loss.nan_to_num(0.0), Revived(latents, revived.T @ back, (back @ W_dec.T).mul_(revived > 0))


def _residuals(
    dictionary: ThresholdDictionary, weights: Weights, code: SparseCode, parts: list[Part], centred: Tensor
) -> tuple[Tensor | list[Tensor], Tensor, Tensor]:
    """Centred inputs [B, D] less each nested reconstruction, and the sum of its squares [P]; and that of each group's alone [G]."""
    if code.spare:
        kernels = kernels_that_run(centred)
        csr = code.offsets, code.latents, code.values
        residuals, squares, alone = kernels.nested_residuals(
            *csr, dictionary.W_dec, centred, weights.parts, weights.ends
        )
        if len(weights.ends) < len(weights.parts):
            alone = torch.stack([alone[end] for end in weights.ends])
        return residuals, squares, alone
    residuals = [centred]
    for part, latents in zip(parts, weights.parts, strict=True):
        # A part's reconstruction adds to that of the parts before it.
        residuals.append(residuals[-1] - weighted_rows(part.code, dictionary.W_dec[latents]))
    # A group is what it takes from the residual before it; nothing is decoded again.
    after_groups = [centred, *(residuals[end + 1] for end in weights.ends)]
    alone = [(centred - before + after).square().sum() for before, after in pairwise(after_groups)]
    return residuals[1:], torch.stack([residual.square().sum() for residual in residuals[1:]]), torch.stack(alone)


class _Through(NamedTuple):
    """The reconstruction's gradients with respect to the code, to W_dec and to b_dec."""

    value_gradient: Tensor
    """Of the code's entries [n]."""
    entries: list[Entries]
    """Of W_dec: entries of each group; their rows are of `back`."""
    back: Tensor
    """The outputs' gradients [G, B, D], those of each group's reconstruction and all that include it."""
    unpredicted: Tensor | None
    """Sum of squares of what the high-level reconstruction leaves of the partners, if it is to explain those."""


@phase("decode")
def _through_decoder(
    dictionary: ThresholdDictionary,
    weights: Weights,
    code: SparseCode,
    parts: list[Part],
    residuals: Tensor | list[Tensor],
    predicted: tuple[Tensor, Tensor] | None,
    divisor: float | Tensor,
) -> _Through:
    """Backward through the decoder. `divisor` is that of the sum of squared errors over all processes.

    `predicted` are tokens and partners, where the high-level reconstruction is to explain those, too.

    Group g is part of the reconstructions g, g + 1, …, so its gradient is the sum of theirs: with three groups and
    residuals r_0, r_1, r_2 a latent of the first gets −2 (w_0 r_0 + w_1 r_1 + w_2 r_2), one of the last −2 w_2 r_2.
    Going backwards over the groups each sum is the one before it and one more residual.
    """
    batch = len(residuals[-1])
    if isinstance(residuals, Tensor):
        kernels = kernels_that_run(residuals)
        numbers = (*weights.part_weights, weights.prediction)
        factors = torch.stack([n if isinstance(n, Tensor) else residuals.new_full((), n) for n in numbers])
        backs, unpredicted = kernels.nested_gradients(residuals, -2 * factors / divisor, predicted)
        # Parts have as many entries as the whole: rather all at once.
        begin = kernels.bounds(weights.parts, residuals.device)[1:-1]
        rows = torch.add(code.rows, torch.bucketize(code.latents, begin, right=True), alpha=batch)
        value_gradient = products_at(rows, code.latents, backs.flatten(0, 1), dictionary.W_dec)
        return _Through(value_gradient, [Entries(rows, code.latents, code.values)], backs, unpredicted)
    value_gradient, entries, unpredicted = torch.zeros_like(code.values), [], None
    backs = torch.empty(len(residuals), *residuals[-1].shape, dtype=code.values.dtype, device=code.values.device)
    for g in reversed(range(len(residuals))):
        torch.mul(residuals[g], -2 * weights.part_weights[g] / divisor, out=backs[g])
        if g + 1 < len(residuals):
            backs[g] += backs[g + 1]
        if g == 0 and predicted is not None:
            current, partner = predicted
            further = residuals[0] + (partner - current)
            unpredicted = further.square().sum()
            backs[g] += further.mul_(-2 * weights.prediction / divisor)
        part, group = parts[g].code, weights.parts[g]
        parts[g].add(sampled_products(part, backs[g], dictionary.W_dec[group]), value_gradient)
        entries.append(Entries(part.rows + g * batch, part.latents + group.start, part.values))
    return _Through(value_gradient, entries, backs, unpredicted)


class SparseGradients:
    """Gathers the gradients of one step; sums over processes are begun as soon as they can be.

    One process on a CPU makes those of matrices a few rows at a time. Several processes have to sum whole ones, and on
    CUDA it has not been measured; whole ones are in the parameters' `.grad`, which are made once, then overwritten.
    """

    made: dict[Tensor, Gradient]
    """The gradients so far; in the end of all four parameters. Whole ones have to be waited for."""

    def __init__(self, dictionary: ThresholdDictionary, deterministic: bool, alone: bool, shard: Shard) -> None:
        W_dec = dictionary.W_dec
        self._dictionary, self._shard, self.made = dictionary, shard, {}
        self._sorted: tuple[Tensor, ByLatent] | None = None
        """Latents of entries, and their order: the encoder's are the decoder's where no partner is coded."""
        self._orders: tuple[ByLatent | None, ByLatent | None] = None, None
        """That of the decoder's and that of the encoder's, where both have been sorted already."""
        self._whole = not alone or W_dec.is_cuda or kernels_for(W_dec) is not None
        # Atomic additions pay only on CUDA.
        self._in_order = deterministic or not W_dec.is_cuda

    def sorted(self, code: SparseCode, high: SparseCode, partner: SparseCode) -> tuple[SparseCode, SparseCode]:
        """Sort the entries of a code and its partner's at once: all that is to be sorted in this step.

        Returns the high-level parts of both, which know their order. The entries have to be spare ones.
        """
        if not self._in_order:
            return high, partner
        own, others, both = ByLatent.of_two(code, partner)
        self._orders = own, both
        return high._replace(known_order=own), partner._replace(known_order=others)

    @phase("weight gradients")
    def decoder(self, entries: list[Entries], back: Tensor, revived: Revived | None) -> None:
        """W_dec's and b_dec's, from the outputs' gradients `back` [G, B, D] and entries that index its G · B rows.

        b_dec is part of every reconstruction, as the first group is.
        """
        W_dec, b_dec = self._dictionary.W_dec, self._dictionary.b_dec
        dense = None if revived is None else DenseRows(revived.latents, revived.decoder)
        order = self._orders[0]
        order = None if order is None else order.of_other_rows(entries[0].rows)
        self._matrix(W_dec, entries, _one([each.gradient for each in entries]), back.flatten(0, 1), dense, order)
        torch.sum(back[0], dim=0, out=self._vector(b_dec))
        if self._whole:
            self._shard.start_sum(DECODER, _buffer(W_dec))

    @phase("weight gradients")
    def encoder(self, entries: list[Entries], centred: Tensor, revived: Revived | None) -> None:
        """W_enc's and b_enc's, from entries that index the centred inputs [N, D], and b_dec's through the encoder.

        Aux-k looks at the first of the inputs alone.
        """
        dictionary, dense, gradient = self._dictionary, None, _one([each.gradient for each in entries])
        b_enc, b_dec = self._vector(dictionary.b_enc), self._vector(dictionary.b_dec)
        if revived is not None:
            with phase("aux-k"):
                dense = DenseRows(revived.latents, revived.gradient.T @ centred[: len(revived.gradient)])
        order = self._matrix(dictionary.W_enc, entries, gradient, centred, dense, self._orders[1])
        if order is not None:
            order.sum_values(gradient, b_enc)
        else:
            latents = _places(entries)[1]
            b_enc.zero_().index_add_(0, latents.clamp_min(0), gradient)
        if revived is not None:
            b_enc.index_add_(0, revived.latents, revived.gradient.sum(dim=0))
        # Both halves are centred by b_dec before they are encoded.
        b_dec.addmv_(dictionary.W_enc, b_enc, alpha=-1)
        if self._whole:
            self._shard.start_sum(OTHERS, by_latent(_buffer(dictionary.W_enc)), b_enc, b_dec)

    def _matrix(
        self,
        parameter: Tensor,
        entries: list[Entries],
        gradient: Tensor,
        x: Tensor,
        dense: DenseRows | None,
        order: ByLatent | None,
    ) -> ByLatent | None:
        """Take in the gradient of a matrix from entries, whose gradients [n] are given together, too, and perhaps their order.

        Returns the order if there is one.
        """
        if order is None and self._in_order:
            rows, latents = _places(entries)
            if self._sorted is not None and self._sorted[0] is latents:
                order = self._sorted[1].of_other_rows(rows)
            else:
                order = ByLatent.of(rows, latents, self._dictionary.dict_size)
                self._sorted = latents, order
        if order is not None and not self._whole:
            self.made[parameter] = RowSums(order, gradient, x, dense)
            return order
        buffer = _buffer(parameter)
        sums = by_latent(buffer)
        if order is not None:
            order.sum_rows(gradient, x, sums, chunk_rows(sums))
        else:
            add_rows(*_places(entries), gradient, x, sums)
        if dense is not None:
            sums.index_add_(0, dense.latents, dense.rows)
        self.made[parameter] = WholeGradient(self._shard.part(buffer))
        return order

    def _vector(self, parameter: Tensor) -> Tensor:
        buffer = _buffer(parameter)
        self.made[parameter] = WholeGradient(buffer)
        return buffer


def _number(value: Tensor) -> float | Tensor:
    """A scalar in double precision; one on a GPU stays there."""
    return float(value) if kernels_for(value) is None else value.double()


def _first_set(flags: Tensor, most: int) -> Tensor:
    """Where `flags` [F] are set, ascending, in a list of fixed length [most] that has room for all; then −1."""
    places = torch.where(flags, flags.cumsum(0) - 1, most)
    numbers = torch.arange(len(flags), device=flags.device)
    return numbers.new_full((most + 1,), -1).scatter_(0, places, numbers)[:most]


def _places(entries: list[Entries]) -> tuple[Tensor, Tensor]:
    """Rows and latents of all."""
    return _one([each.rows for each in entries]), _one([each.latents for each in entries])


def _one(tensors: list[Tensor]) -> Tensor:
    """One after the other; if it is one, the same tensor."""
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def _buffer(parameter: Tensor) -> Tensor:
    """The gradient of `parameter`, made (not filled) where there is none; it keeps the [F, D] memory order of W_enc."""
    if parameter.grad is None:
        parameter.grad = torch.empty_like(parameter)
    return parameter.grad
