"""One optimizer step of a dictionary: the trainer that the loop, the tests and the benchmark share."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tsae.config.run import RunConfig, require_processes
from tsae.parallel.group import ALONE, Group
from tsae.runtime.errors import TsaeError
from tsae.runtime.late import Late
from tsae.sae.dictionary import Dictionary, ThresholdDictionary
from tsae.sae.init import centre, geometric_median, new_dictionary
from tsae.sae.kinds import KINDS, MatryoshkaBatchTopKSAE, from_state
from tsae.sae.sparse import kernels_for, sum_of_squares
from tsae.store.moments import Moments
from tsae.training.objective import DenseEngine, Encoded, Engine, Losses, Weights
from tsae.training.penalty_engine import PenaltyEngine
from tsae.training.recorded import Recorded, Recordings, Result, on_cuda
from tsae.training.sparse_engine import SparseEngine
from tsae.training.start import begin_with
from tsae.training.update import Adam, Gradients, LatentShares, Shard, lay_out_by_latent, project_and_measure


class Terms(NamedTuple):
    """What one step computed; all but those of groups are scalars on the training device, under the reference's names where it has one.

    All are of the whole batch, and the same in every process.
    """

    loss: Tensor
    l2_loss: Tensor
    auxk_loss: Tensor
    temp_loss: Tensor
    min_l2_loss: Tensor
    max_l2_loss: Tensor
    grad_norm: Tensor
    """Norm of the gradient after the decoder projection, before clipping."""
    threshold: Tensor
    """Inference threshold on raw activations: 0 where there is none, the mean where each latent has one, the low-level
    split's where each split has one."""
    dead_features: Tensor
    n_active: Tensor
    """Nonzero entries of the current half's codes."""
    n_fired_features: Tensor
    fve: Tensor
    """Fraction of variance explained on this batch."""
    group_shares: Tensor
    """Share of each group in the sum of the current half's feature activations [G]."""
    group_active: Tensor
    """Nonzero entries of the current half's codes in each group [G]."""
    group_fve: Tensor
    """Fraction of variance that each group explains on this batch with the decoder's bias, without the others [G]."""
    sparsity_loss: Tensor
    sparsity_weight: Tensor
    lr: float
    bytes_handed: int
    """What this process put into collectives for this step; 0 in one process."""

    def on_host(self) -> Terms:
        """The same in the host's memory; a GPU is waited for once, not at each number."""
        if not self.loss.is_cuda:
            return self
        there = {
            name: value.detach()
            for name, value in self._asdict().items()
            if isinstance(value, Tensor) and value.is_cuda
        }
        numbers = torch.cat([value.double().flatten() for value in there.values()]).cpu()  # float64 holds each of them
        parts = numbers.split([value.numel() for value in there.values()])
        here = {
            name: part.view(there[name].shape).to(there[name].dtype) for name, part in zip(there, parts, strict=True)
        }
        return self._replace(**here)


class Trainer:
    """A dictionary in training, by one process or by the processes of `group` together.

    Each process's trainer steps on its share of the batch and ends with the same weights, which do not depend on how
    many processes there are (but for rounding).

    `config` gives kind, objective and schedule. `state_dict`, in the reference's names, replaces the fresh weights.
    `step(batch)` takes pairs [B, 2, D] (slot 0 current, slot 1 partner) or single tokens [B, D], as a store has them,
    float32 or shorter: where the configuration says so, `shift`, their mean [D], is subtracted and they are divided by `scale`, both from the
    store's `moments`. `start`, a dictionary for raw activations that is not larger, gives the first latents of each group
    and the decoder's bias. Weights are kept for activations so changed; `dictionary.to_file(scale, shift)` and every file
    are for raw ones.
    """

    def __init__(
        self,
        config: RunConfig,
        activation_dim: int,
        state_dict: dict[str, Tensor] | None = None,
        device: torch.device | str = "cpu",
        moments: Moments | None = None,
        group: Group = ALONE,
        start: Dictionary | None = None,
    ) -> None:
        self.config, self.settings, self.group = config, config.training, group
        self.kind = KINDS[config.sae.kind]
        require_processes(config, group.world)
        self.scale, shift = _units(config, activation_dim, moments)
        self.shift = None if shift is None else shift.to(device)
        self.steps_done = 0
        dictionary = new_dictionary(config.sae, activation_dim, config.training.seed)
        if state_dict is not None:
            dictionary = _given(config, state_dict, self.scale, shift)
        if start is not None:
            begin_with(dictionary, start, self.scale, shift)
        self._fresh, self._started = state_dict is None, start is not None
        self.weights = self._resolved = Weights.of(config, activation_dim)
        if self.weights.paired and isinstance(dictionary, MatryoshkaBatchTopKSAE) and config.objective.high_share:
            dictionary.reserve(config.objective.high_share)
        self.dictionary: Dictionary = dictionary.to(device)
        lay_out_by_latent(self.dictionary)
        shard = LatentShares(group, config.sae.dict_size) if self.settings.shard == "optimizer" else Shard(group)
        self._shard, self.engine = shard, _engine(config, group, shard)
        # The sparse engine rounds its encoder product itself; rounding its sums over entries would make nothing faster.
        rounds = self.settings.precision == "bf16" and not isinstance(self.engine, SparseEngine)
        self._products = torch.autocast(torch.device(device).type, torch.bfloat16, enabled=rounds)
        self.peak_lr = config.training.lr or 2e-4 / (config.sae.dict_size / 16384) ** 0.5
        self._warmup, self._threshold_start = self.settings.warmup, self.settings.threshold_start
        self._clip_norm = config.clip_norm
        parameters = dict(self.dictionary.named_parameters())
        biases = [parameters.pop(name) for name in ("b_enc", "b_dec")]
        groups: list[dict[str, Any]] = [
            {"params": list(parameters.values()), "relative_lr": 1.0},
            {"params": biases, "relative_lr": config.bias_lr},
        ]
        betas = (self.kind.first_moment, 0.999)
        self.optimizer = Adam(groups, lr=self.peak_lr, betas=betas, fused=True, shard=shard)
        self.tokens_since_fired = torch.zeros(config.sae.dict_size, dtype=torch.int64, device=device)
        b_dec = self.dictionary.b_dec.detach()
        # Where the host does not look at the data it need not know the weights either, which change.
        self._told = self.weights.numbers()
        late = group.world == 1 and kernels_for(b_dec) is not None
        self._numbers = torch.tensor(self._told, device=b_dec.device) if late else None
        records = self.settings.cuda_graphs and b_dec.is_cuda
        self.recordings = Recordings(on_cuda(b_dec.device)) if records else None
        self._may_die: tuple[int, int, Late] | None = None
        self._bound_dead(config.training.batch_size)

    def step(self, batch: Tensor, document: Tensor | None = None) -> Terms:
        """Update the weights once on this process's share of the batch.

        `document` [B] of each pair is needed where those of one document are no negatives.
        Raises TsaeError if the batch does not fit the objective.
        """
        return self.advance(batch, document)()

    def advance(self, batch: Tensor, document: Tensor | None = None) -> Callable[[], Terms]:
        """The same; what it returns tells the terms, until the next step, for who wants them: in all processes or in none."""
        tokens = len(batch) * self.group.world
        self.group.take_bytes()  # only this step's are counted
        if 2 * (self.steps_done - 1) < self.settings.steps:  # in the step before they may still have changed
            self._weigh()
        if self.steps_done == 0 and not self._started and (self._fresh or self.dictionary.centre_input):
            centre(self.dictionary, geometric_median(self.group.gather(self._halves(batch)[0])))
        needs_document = not self.weights.same_document and self.weights.paired
        if needs_document and document is None:
            raise TsaeError("objective.same_document: false needs the document of each pair: step(batch, document)")
        self.engine.most_dead = self._most_dead(tokens)
        recorded = None if self.recordings is None else self.recordings.of(self._kind_of_step(batch))
        if recorded is not None:
            batch = recorded.fixed("batch", batch)
            document = recorded.fixed("document", document) if needs_document and document is not None else None
        while True:
            current, partner, encoded = _run(recorded, "encode", partial(self._encode, batch))
            counts = None if encoded.counts is None else Late(encoded.counts)
            differentiate = partial(self._differentiate, encoded, current, partner, document, tokens)
            losses, gradients, dead, silence = _run(recorded, "differentiate", differentiate)
            if self.engine.settled(encoded, counts):
                break
            recorded = None  # a second pass goes by what has been seen
        self._bound_dead(tokens, _run(recorded, "keep", partial(self._keep, encoded, silence, tokens)))
        must_act = self.steps_done == 0 and self.weights.paired and self.config.objective.temporal_alpha != 0
        if must_act and partner is not None:
            # A term that is a mean over the batch has gradients of about 1/B; a millionth of that is rounding noise.
            acts = (partner - current).abs().max() if self.weights.predicts else losses.temp_gradient
            if float(losses.temp_loss) == 0 or float(self.group.max(acts)) < 1e-6 / tokens:
                raise TsaeError(
                    "the temporal term is switched on but is zero or has no gradient in the first batch: "
                    "are the two halves of every pair equal, or is the high-level split silent?"
                )

        unit_rows = self.kind.unit_rows
        grad_norm = project_and_measure(self.dictionary, gradients, unit_rows, self._shard)
        lr = self.learning_rate(self.steps_done)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["relative_lr"]
        self.optimizer.update(gradients, grad_norm, self._clip_norm, self.dictionary.W_dec if unit_rows else None)
        if self.kind.after_update is not None:
            self.kind.after_update(self.dictionary)
        self.steps_done += 1

        def tell() -> Terms:
            part = partial(self._tell, encoded, losses, dead, current)
            terms = part() if recorded is None else _copied(recorded.run("tell", part, always=False))
            return terms._replace(grad_norm=grad_norm, lr=lr, bytes_handed=self.group.take_bytes())

        return tell

    # The parts of a step that may be recorded: see `tsae.training.recorded`.

    def _encode(self, batch: Tensor) -> tuple[Tensor, Tensor | None, Encoded]:
        """Activations of tokens and partners [B, D], and their codes."""
        current, partner = self._halves(batch)
        # Only a term of codes needs the partners'.
        coded = None if self.weights.temporal is None else partner
        with self._products:
            return current, partner, self.engine.encode(self.dictionary, current, coded)

    def _differentiate(
        self, encoded: Encoded, current: Tensor, partner: Tensor | None, document: Tensor | None, tokens: int
    ) -> tuple[Losses, Gradients, Tensor, Tensor]:
        """Losses and gradients; which latents are dead, and for how many tokens each has been silent [F]."""
        silence = (self.tokens_since_fired + tokens).masked_fill_(encoded.fired, 0)
        dead = silence >= self.settings.dead_after
        with self._products:
            losses, gradients = self.engine.backward(
                self.dictionary, self.weights, encoded, current, partner, dead, document
            )
        return losses, gradients, dead, silence

    def _keep(self, encoded: Encoded, silence: Tensor, tokens: int) -> Tensor:
        """Take over what is right; how many latents the next step of so many tokens may find dead."""
        self.tokens_since_fired.copy_(silence)
        self.engine.keep(encoded)
        self._track_thresholds(encoded.cuts)
        return self._dying(tokens)

    def _tell(self, encoded: Encoded, losses: Losses, dead: Tensor, current: Tensor) -> Terms:
        """The terms, but for what is no part's."""
        spread = losses.variance
        if spread is None:
            mean = self.group.mean(current.mean(dim=0))
            spread = sum_of_squares(current, mean)
        else:
            spread = spread * len(current)
        of_groups = encoded.n_active, encoded.mass, losses.group_errors
        error, variance, active, mass, alone = self.group.sums(losses.squared_error, spread, *of_groups)
        return Terms(
            losses.loss,
            losses.l2_loss,
            losses.auxk_loss,
            losses.temp_loss,
            min_l2_loss=losses.group_losses.min(),
            max_l2_loss=losses.group_losses.max(),
            grad_norm=losses.l2_loss,
            threshold=self._threshold(),
            dead_features=dead.sum(),
            n_active=active.sum(),
            n_fired_features=encoded.fired.sum(),
            fve=1 - error / variance,
            group_shares=mass / mass.sum(),
            group_active=active,
            group_fve=1 - alone / variance,
            sparsity_loss=losses.sparsity_loss,
            sparsity_weight=losses.sparsity_weight,
            lr=0.0,
            bytes_handed=0,
        )

    def _weigh(self) -> None:
        """Set the objective's weights for the next step; on a GPU they change where recorded launches look for them."""
        self.weights = self._resolved.at(self.steps_done / self.settings.steps)
        if self._numbers is None:
            return
        numbers = self.weights.numbers()
        for place, (number, told) in enumerate(zip(numbers, self._told, strict=True)):
            if number != told:
                self._numbers[place].fill_(number)
        self._told = numbers
        self.weights = self.weights.on_device(self._numbers)

    def set_silent(self, latents: Tensor, tokens: int) -> None:
        """Take some latents to have been silent for so many tokens."""
        self.tokens_since_fired.index_fill_(0, latents, tokens)
        self._bound_dead(self.settings.batch_size)

    def learning_rate(self, step: int) -> float:
        """Learning rate of update `step`: linear warm-up from 0, constant, linear decay towards 0."""
        settings = self.settings
        if step < self._warmup:
            return self.peak_lr * step / self._warmup
        if settings.decay_start is not None and step >= settings.decay_start:
            return self.peak_lr * (settings.steps - step) / (settings.steps - settings.decay_start)
        return self.peak_lr

    def _kind_of_step(self, batch: Tensor) -> Hashable | None:
        """What decides which launches the next step makes; None if only it will know."""
        kind, most_dead = self.engine.kind_of_step(), self.engine.most_dead
        if kind is None or most_dead is None:
            return None
        return kind, batch.shape, batch.dtype, most_dead, self.steps_done > self._threshold_start

    def _halves(self, batch: Tensor) -> tuple[Tensor, Tensor | None]:
        """Tokens and, where they are paired, partners, in the units of training."""
        if self.shift is not None:
            batch = (batch - self.shift).div_(self.scale)  # float32, in whatever type a store keeps it
        else:
            batch = batch.to(torch.promote_types(batch.dtype, torch.float32))
            if self.scale != 1:
                batch = batch / self.scale
        paired = batch.ndim == 3 and batch.shape[1] == 2
        if not paired and batch.ndim != 2:
            raise TsaeError(f"a batch of shape {tuple(batch.shape)} is neither pairs [B, 2, D] nor tokens [B, D]")
        if not self.weights.paired:
            return (batch[:, 0] if paired else batch), None
        if not paired:
            raise TsaeError("a temporal SAE needs pairs [B, 2, D]; single tokens would silently drop its temporal term")
        return batch[:, 0], batch[:, 1]

    def _track_thresholds(self, cuts: Tensor) -> None:
        """Move each inference threshold towards the smallest activation that survived its selection, where one did."""
        if self.steps_done <= self._threshold_start:
            return
        if isinstance(self.dictionary, ThresholdDictionary):
            beta, before = self.settings.threshold_beta, torch.stack(self.dictionary.thresholds)
            moved = torch.where(before < 0, cuts, beta * before + (1 - beta) * cuts)
            moved = torch.where(cuts < torch.inf, moved, before)
            torch._foreach_copy_(list(self.dictionary.thresholds), list(moved.unbind()))

    def _dying(self, tokens: int) -> Tensor:
        """How many latents will be dead unless a step of so many tokens wakes them."""
        return (self.tokens_since_fired + tokens >= self.settings.dead_after).sum()

    def _bound_dead(self, tokens: int, dying: Tensor | None = None) -> None:
        """Have the number of latents that may be dead told to the host, where the next step is not to wait for it."""
        if self._numbers is not None:
            told = Late(self._dying(tokens) if dying is None else dying)
            self._may_die = tokens, self.tokens_since_fired._version, told

    def _most_dead(self, tokens: int) -> int | None:
        """How many latents may be dead in a step of `tokens`, or some more; none if that was not counted.

        Steps that differ only in this are steps of two kinds, so it is one of four numbers between powers of two.
        """
        if self._may_die is None:
            return None
        most_tokens, version, told = self._may_die
        # Someone may have set the counters since.
        if tokens > most_tokens or version != self.tokens_since_fired._version:
            return None
        most: int = told.read()
        unit = max(16, 2 ** most.bit_length() // 8)
        return min(-(-most // unit) * unit, self.config.sae.dict_size)

    def _threshold(self) -> Tensor:
        threshold = getattr(self.dictionary, "threshold", None)
        if threshold is None:
            return self.dictionary.b_dec.new_zeros(())
        mean: Tensor = threshold.detach().mean()
        return mean if self.scale == 1 else torch.where(mean < 0, mean, mean * self.scale)  # −1 is a mark

    def state(self) -> dict[str, Any]:
        """Everything that a bit-exact continuation needs, besides the configuration; whole in the first process.

        All processes call this. It does not depend on how many they are.
        """
        return {
            "dictionary": self.dictionary.state_dict(),
            "optimizer": self.optimizer.whole_state(),
            "engine": self.engine.state(),
            "tokens_since_fired": self.tokens_since_fired,
            "steps_done": self.steps_done,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from what `state()` returned."""
        self.dictionary.load_state_dict(state["dictionary"])
        self.optimizer.load_whole_state(state["optimizer"])
        self.engine.load_state(state["engine"])
        self.tokens_since_fired.copy_(state["tokens_since_fired"])
        self.steps_done = int(state["steps_done"])
        self._weigh()
        self._bound_dead(self.settings.batch_size)


def _run(recorded: Recorded | None, name: str, part: Callable[[], Result]) -> Result:
    return part() if recorded is None else recorded.run(name, part)


def _copied(terms: Terms) -> Terms:
    """The same in other memory: the next step that is recorded will make its own in the same place."""
    names = [name for name, value in terms._asdict().items() if isinstance(value, Tensor)]
    copies: dict[str, Any] = {}
    for kind in {(getattr(terms, name).dtype, getattr(terms, name).device) for name in names}:
        alike = {name: value for name in names if ((value := getattr(terms, name)).dtype, value.device) == kind}
        together = torch.cat([value.reshape(-1) for value in alike.values()])
        pieces = together.split([value.numel() for value in alike.values()])
        copies |= {name: piece.view(value.shape) for (name, value), piece in zip(alike.items(), pieces, strict=True)}
    return terms._replace(**copies)


def _engine(config: RunConfig, group: Group, shard: Shard) -> Engine[Any]:
    settings = config.training
    if KINDS[config.sae.kind].penalty is not None:
        return PenaltyEngine(config, group, shard)
    if settings.engine == "dense":
        return DenseEngine()
    selection, negatives = (group if scope == "global" else ALONE for scope in (settings.selection, settings.negatives))
    product = "bf16" if settings.precision == "bf16" else settings.encoder_precision
    return SparseEngine(product, settings.deterministic, group, selection, negatives, shard)


def _units(config: RunConfig, activation_dim: int, moments: Moments | None) -> tuple[float, Tensor | None]:
    """What activations are divided by before training, and what is subtracted from them before that [D]."""
    if config.normalize == "none":
        return 1.0, None
    if moments is None:
        raise TsaeError(
            f"training.normalize: {config.normalize} needs the activations' moments; "
            "pass moments=moments_of(store, config.counted), or set normalize=none"
        )
    centred = config.normalize == "centred"
    square = float(moments.variance.sum()) if centred else moments.mean_squared_norm
    if not square > 0:
        what = "vary" if centred else "are not all zero"
        raise TsaeError(
            f"training.normalize: {config.normalize} needs activations that {what}; harvest others, or set normalize=none"
        )
    kept = 1 if config.normalize == "mean_squared_norm" else activation_dim
    return float((square / kept) ** 0.5), moments.mean if centred else None


def _given(config: RunConfig, state_dict: dict[str, Tensor], scale: float, shift: Tensor | None) -> Dictionary:
    """The dictionary of a state dict (for raw activations), which is copied."""
    name, where = KINDS[config.sae.kind].dictionary.__name__, "initial state"
    copies = {key: tensor.clone() for key, tensor in state_dict.items()}
    dictionary = from_state(name, copies, config.sae.k, where)
    if scale == 1 and shift is None:
        return dictionary
    inverse = dictionary.to_file(1 / scale, None if shift is None else -shift / scale)
    return from_state(name, inverse, config.sae.k, where)
