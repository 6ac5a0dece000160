"""The kinds of SAE: each one's class, its penalty if that makes its codes sparse, and its entry in the table `KINDS`.

Which tensors a file holds, and how each class encodes, follows the library that introduced the names
(github.com/saprmarks/dictionary_learning) and the T-SAE authors' fork of it.

A new kind is a class and an entry here, and a name in `tsae.config.sections.KIND_SETTINGS`: it is then trained,
written, read and evaluated, and refused by the formats that its entry does not name.

Shapes: B tokens, D activation_dim, F dict_size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from tsae.runtime.errors import SLIP, TsaeError, suggestion
from tsae.sae.dictionary import Dictionary, ThresholdDictionary, top_k

LINEAR_LAYERS = {"encoder.weight": "W_enc.T", "encoder.bias": "b_enc", "decoder.weight": "W_dec.T"}
FOUR_TENSORS = {"W_enc": "W_enc", "b_enc": "b_enc", "W_dec": "W_dec", "b_dec": "b_dec"}
ALIKE = 0.3
"""Mean cosine between what latents read and what they write from which the two belong together."""
FIRST_THRESHOLD = 0.001
"""Where a JumpReLU begins (arXiv 2407.14435), for activations of mean squared norm 1."""


class AutoEncoderNew(Dictionary):
    """ReLU SAE of Anthropic's April 2024 update: the input is not centred, decoder norms are free."""

    file_tensors: ClassVar[dict[str, str]] = {**LINEAR_LAYERS, "decoder.bias": "b_dec"}
    centre_input: ClassVar[bool] = False
    evaluated_by_norms: ClassVar[bool] = True

    @property
    def encode_rule(self) -> str:
        """`relu`: every positive pre-activation."""
        return "relu"

    def encode(self, x: Tensor) -> Tensor:
        """Rectified pre-activations [..., F]."""
        return torch.relu(self.pre_activations(x))


class AutoEncoder(AutoEncoderNew):
    """ReLU SAE (Bricken et al. 2023): `b_dec` is subtracted from the input, decoder rows have norm 1.

    A file whose decoder is not normalised is brought to that form: the same reconstruction from rescaled latents.
    """

    file_tensors: ClassVar[dict[str, str]] = {"bias": "b_dec", **LINEAR_LAYERS}
    centre_input: ClassVar[bool] = True

    def from_file(self, state: dict[str, Tensor], where: str = "state dict") -> None:
        """As for every dictionary; the matrices are copied only where decoder rows must be rescaled."""
        super().from_file(state, where)
        # In slices of the file's own order: norm(dim=1) of a transposed matrix takes ten times as long.
        squares = [part.square().sum(dim=1) for part in self.W_dec.detach().split(64, dim=1)]
        norms = torch.stack(squares).sum(dim=0).sqrt()
        if torch.allclose(norms, torch.ones_like(norms)):
            return
        norms = torch.where(norms > 0, norms, 1)  # an empty row stays empty
        self.W_dec = nn.Parameter(self.W_dec.detach() / norms[:, None])
        self.W_enc = nn.Parameter(self.W_enc.detach() * norms)
        self.b_enc = nn.Parameter(self.b_enc.detach() * norms)


class GatedAutoEncoder(Dictionary):
    """Gated SAE (Rajamanoharan et al. 2024, arXiv 2404.16014). `b_enc` is the gate's bias."""

    file_tensors: ClassVar[dict[str, str]] = {
        "decoder_bias": "b_dec",
        "r_mag": "r_mag",
        "gate_bias": "b_enc",
        "mag_bias": "mag_bias",
        "encoder.weight": "W_enc.T",
        "decoder.weight": "W_dec.T",
    }
    scales_with_input: ClassVar[tuple[str, ...]] = ("b_enc", "b_dec", "mag_bias")

    def __init__(self, activation_dim: int, dict_size: int) -> None:
        super().__init__(activation_dim, dict_size)
        self.r_mag = nn.Parameter(torch.zeros(dict_size))
        self.mag_bias = nn.Parameter(torch.zeros(dict_size))

    @property
    def encode_rule(self) -> str:
        """`gate`: a latent is active where its gate is open and its magnitude positive."""
        return "gate"

    def gates_and_magnitudes(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Gate pre-activations and rectified magnitudes, both [..., F]; they share the encoder matrix."""
        shared = (x - self.b_dec) @ self.W_enc
        return shared + self.b_enc, torch.relu(self.r_mag.exp() * shared + self.mag_bias)

    def encode(self, x: Tensor) -> Tensor:
        """Magnitudes [..., F] of the latents whose gate is open."""
        gates, magnitudes = self.gates_and_magnitudes(x)
        return magnitudes * (gates > 0)


class JumpReluAutoEncoder(Dictionary):
    """JumpReLU SAE (Rajamanoharan et al. 2024, arXiv 2407.14435): a learned threshold for each latent."""

    file_tensors: ClassVar[dict[str, str]] = {**FOUR_TENSORS, "threshold": "threshold"}
    centre_input: ClassVar[bool] = False
    scales_with_input: ClassVar[tuple[str, ...]] = ("b_enc", "b_dec", "threshold")

    def __init__(self, activation_dim: int, dict_size: int) -> None:
        super().__init__(activation_dim, dict_size)
        self.threshold = nn.Parameter(torch.full((dict_size,), FIRST_THRESHOLD))

    @property
    def encode_rule(self) -> str:
        """`latent thresholds`: each latent has its own."""
        return "latent thresholds"

    def encode(self, x: Tensor) -> Tensor:
        """Pre-activations [..., F] that are positive and above their latent's threshold (strict inequality)."""
        pre = self.pre_activations(x)
        return torch.relu(pre * (pre > self.threshold))


class BatchTopKSAE(ThresholdDictionary):
    """BatchTopK SAE (Bussmann et al. 2024, arXiv 2412.06410)."""

    file_tensors: ClassVar[dict[str, str]] = {
        "b_dec": "b_dec",
        "k": "k",
        "threshold": "threshold",
        "decoder.weight": "W_dec.T",
        "encoder.weight": "W_enc.T",
        "encoder.bias": "b_enc",
    }


class AutoEncoderTopK(ThresholdDictionary):
    """TopK SAE (Gao et al. 2024, arXiv 2406.04093): k latents for every token, at inference too.

    `rule` may be set to `threshold` where one was calibrated; files say nothing about it, config.json does.
    """

    file_tensors: ClassVar[dict[str, str]] = BatchTopKSAE.file_tensors
    selects_per_token: ClassVar[bool] = True

    def __init__(self, activation_dim: int, dict_size: int, k: int) -> None:
        super().__init__(activation_dim, dict_size, k)
        self.rule: Literal["top_k", "threshold"] = "top_k"

    @property
    def encode_rule(self) -> str:
        """`top_k` or `threshold`."""
        return self.rule

    @property
    def scalar_threshold(self) -> float | None:
        """The threshold, if encoding uses it."""
        return super().scalar_threshold if self.rule == "threshold" else None

    def keep_largest(self, activations: Tensor) -> Tensor:
        """The code in training: the k largest of each token's rectified pre-activations [..., F]."""
        return top_k(activations, int(self.k))

    def cut_of(self, smallest: Tensor) -> Tensor:
        """What the threshold follows: the mean over tokens of the smallest kept activation [N] (infinite: none kept)."""
        found = torch.isfinite(smallest)
        total, count = torch.where(found, smallest, 0).sum(), found.sum()
        return torch.where(count > 0, total / count, torch.inf)

    def encode(self, x: Tensor) -> Tensor:
        """Feature activations [..., F]: the k largest of each token, or all above the threshold."""
        if self.rule == "threshold":
            return super().encode(x)
        return self.keep_largest(torch.relu(self.pre_activations(x)))

    def require_calibrated(self, where: str) -> None:
        """Raise TsaeError if encoding uses a threshold that was never set."""
        if self.rule == "threshold":
            super().require_calibrated(where)


class MatryoshkaBatchTopKSAE(ThresholdDictionary):
    """BatchTopK SAE with nested groups of latents (Bussmann et al. 2025, arXiv 2503.17547).

    In training the high-level split may have a share of k for itself (`reserve`), and then a threshold of its own.
    Files have one threshold: there the split's latents are in other units, with decoder rows of another norm, such that
    the one is right for both.
    """

    file_tensors: ClassVar[dict[str, str]] = {
        **FOUR_TENSORS,
        "k": "k",
        "threshold": "threshold",
        "group_sizes": "group_size_tensor",
    }
    group_size_tensor: Tensor
    high_threshold: Tensor | None
    high_k: float | None = None
    """Active latents per token of the high-level split; none: of all latents together the largest are selected."""

    def __init__(self, activation_dim: int, dict_size: int, k: int, group_sizes: Sequence[int]) -> None:
        super().__init__(activation_dim, dict_size, k)
        if not group_sizes or sum(group_sizes) != dict_size or min(group_sizes) <= 0:
            raise TsaeError(f"group sizes {tuple(group_sizes)} are not positive numbers that sum to {dict_size}")
        self.register_buffer("group_size_tensor", torch.tensor(list(group_sizes), dtype=torch.int64))
        self.register_buffer("high_threshold", None)

    @classmethod
    def sized(cls, activation_dim: int, dict_size: int, k: int, group_sizes: Sequence[int]) -> MatryoshkaBatchTopKSAE:
        return cls(activation_dim, dict_size, k, group_sizes)

    def reserve(self, share: float) -> None:
        """From now on the high-level split has `share` of k for itself.

        Rows of norm 1, which training keeps, are brought about here, so that each part has one threshold in one unit.
        """
        high, norms = self.group_slices[0], self.row_norms
        own_unit = norms[high].mean()
        self.W_enc.data = self.W_enc.data * norms
        self.b_enc.data = self.b_enc.data * norms
        self.W_dec.data = self.W_dec.data / norms[:, None]
        self.high_k = share * int(self.k)
        self.high_threshold = torch.where(self.threshold < 0, self.threshold, self.threshold * own_unit)

    @property
    def budgets(self) -> tuple[tuple[slice, float], ...]:
        if self.high_k is None:
            return super().budgets
        split = self.group_slices[0].stop
        return (slice(0, split), self.high_k), (slice(split, self.dict_size), int(self.k) - self.high_k)

    @property
    def thresholds(self) -> tuple[Tensor, ...]:
        return (self.threshold,) if self.high_threshold is None else (self.high_threshold, self.threshold)

    def apply_threshold(self, pre: Tensor) -> Tensor:
        if self.high_threshold is None:
            return super().apply_threshold(pre)
        self.require_calibrated(type(self).__name__)
        activations, limits = torch.relu(pre), self.threshold.repeat(self.dict_size)
        limits[self.group_slices[0]] = self.high_threshold
        return activations * (activations > limits)

    def to_file(self, scale: float = 1.0, shift: Tensor | None = None) -> dict[str, Tensor]:
        state = super().to_file(scale, shift)
        if self.high_threshold is not None and self.high_threshold > 0 and self.threshold > 0:
            high, factor = self.group_slices[0], float(self.threshold / self.high_threshold)
            state["W_enc"][:, high] *= factor
            state["b_enc"][high] *= factor
            state["W_dec"][high] /= factor
        return state


class TemporalMatryoshkaBatchTopKSAE(MatryoshkaBatchTopKSAE):
    """Temporal SAE (Bhalla & Oesterling et al. 2025, arXiv 2511.05541): a Matryoshka SAE in every file and at inference,
    whose first group was trained to agree between neighbouring tokens."""


class PenaltySettings(NamedTuple):
    """What the penalties need of a configuration."""

    target_l0: float
    bandwidth: float
    mean: Callable[[Tensor], Tensor]
    """Over the processes that share the batch."""


class Penalised(NamedTuple):
    """A code [B, F] and the terms that come with it, scalars that carry their gradients."""

    f: Tensor
    penalty: Tensor
    auxiliary: Tensor


def l1(dictionary: AutoEncoder, x: Tensor, _: PenaltySettings) -> Penalised:
    """L1 of the code; decoder rows have norm 1, so that it cannot be evaded by scaling (Bricken et al. 2023)."""
    f = dictionary.encode(x)
    return Penalised(f, f.sum(dim=-1).mean(), f.new_zeros(()))


def l1_by_norms(dictionary: AutoEncoderNew, x: Tensor, _: PenaltySettings) -> Penalised:
    """L1 of the code weighted by decoder norms, which are free (Anthropic's April 2024 update)."""
    f = dictionary.encode(x)
    return Penalised(f, (f * dictionary.W_dec.norm(dim=1)).sum(dim=-1).mean(), f.new_zeros(()))


def l1_of_gates(dictionary: GatedAutoEncoder, x: Tensor, _: PenaltySettings) -> Penalised:
    """L1 of the rectified gates, which must also reconstruct through a frozen decoder (arXiv 2404.16014, eq. 8)."""
    gates, magnitudes = dictionary.gates_and_magnitudes(x)
    opened = torch.relu(gates)
    through_gates = opened @ dictionary.W_dec.detach() + dictionary.b_dec.detach()
    auxiliary = (x - through_gates).pow(2).sum(dim=-1).mean()
    return Penalised(magnitudes * (gates > 0), opened.sum(dim=-1).mean(), auxiliary)


def l0_distance(dictionary: JumpReluAutoEncoder, x: Tensor, settings: PenaltySettings) -> Penalised:
    """Squared relative distance of L0 from its target, through a kernel (arXiv 2407.14435, eqs. 10-12 and appendix)."""
    pre = torch.relu(dictionary.pre_activations(x))
    f = _JumpRelu.apply(pre, dictionary.threshold, settings.bandwidth)
    l0 = _Step.apply(pre, dictionary.threshold, settings.bandwidth).sum(dim=-1).mean()
    # The penalty is not linear in L0, so its slope is that at the whole batch's; the gradient is this process's own.
    l0 = l0 + (settings.mean(l0.detach()) - l0.detach())
    return Penalised(f, (l0 / settings.target_l0 - 1).square(), f.new_zeros(()))


def _near(pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
    """The rectangular kernel: 1 where a pre-activation is within half a bandwidth of its threshold."""
    return ((pre - threshold).abs() < bandwidth / 2).to(pre.dtype)


class _JumpRelu(torch.autograd.Function):
    """pre · [pre > threshold], with the threshold's expected gradient estimated near it."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth = bandwidth
        return pre * (pre > threshold)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        pre, threshold = ctx.saved_tensors
        near = gradients[0] * _near(pre, threshold, ctx.bandwidth)
        return gradients[0] * (pre > threshold), -threshold / ctx.bandwidth * near.sum(dim=0), None


class _Step(torch.autograd.Function):
    """[pre > threshold], with the threshold's expected gradient estimated near it; none for the pre-activation."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth = bandwidth
        return (pre > threshold).to(pre.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor, None]:
        pre, threshold = ctx.saved_tensors
        return None, -(gradients[0] * _near(pre, threshold, ctx.bandwidth)).sum(dim=0) / ctx.bandwidth, None


@dataclass(frozen=True, kw_only=True)
class Kind:
    """What is particular to a kind, besides what settings must know of it."""

    dictionary: type[Dictionary]
    """Its class, by whose name files know it."""
    trainer_class: str
    """The reference's name, in config.json, of what trains it."""
    penalty: Callable[[Any, Tensor, PenaltySettings], Penalised] | None = None
    """What makes its codes sparse, and the `PenaltyEngine` its engine; none: the selection of the largest activations,
    by the engine of `training.engine`."""
    penalty_weight: float | None = None
    """The penalty's weight if no one chose another; none: it is adjusted until target_l0 is reached."""
    unit_rows: bool = True
    """Whether training keeps decoder rows at norm 1."""
    first_norm: float = 1.0
    """Norm of decoder rows at the start."""
    first_moment: float = 0.9
    """Adam's β₁."""
    after_update: Callable[[Any], object] | None = None
    """Called with the dictionary after every update: what the weights must obey."""
    formats: tuple[str, ...] = ()
    """Formats of `tsae export` that can carry it."""
    sae_bench: type[Dictionary] | None = None
    """The class as which SAEBench reads it, if not its own."""


EVERY_FORMAT = ("sae_lens", "sae_bench", "reference")

KINDS: dict[str, Kind] = {
    "standard": Kind(dictionary=AutoEncoder, trainer_class="StandardTrainer", penalty=l1, formats=EVERY_FORMAT),
    "standard_april": Kind(
        dictionary=AutoEncoderNew,
        trainer_class="StandardTrainerAprilUpdate",
        penalty=l1_by_norms,
        unit_rows=False,
        first_norm=0.1,
        formats=EVERY_FORMAT,
        # It subtracts b_dec in every ReLU file, and does not find the bias under this class's own name for it.
        sae_bench=AutoEncoder,
    ),
    "gated": Kind(
        dictionary=GatedAutoEncoder,
        trainer_class="GatedSAETrainer",
        penalty=l1_of_gates,
        first_moment=0.0,
        formats=EVERY_FORMAT,
    ),
    "jump_relu": Kind(
        dictionary=JumpReluAutoEncoder,
        trainer_class="JumpReluTrainer",
        penalty=l0_distance,
        penalty_weight=1.0,
        first_moment=0.0,
        after_update=lambda dictionary: dictionary.threshold.data.clamp_min_(0),
        formats=EVERY_FORMAT,
    ),
    "topk": Kind(dictionary=AutoEncoderTopK, trainer_class="TopKTrainer", formats=EVERY_FORMAT),
    "batch_topk": Kind(dictionary=BatchTopKSAE, trainer_class="BatchTopKTrainer", formats=EVERY_FORMAT),
    "matryoshka": Kind(
        dictionary=MatryoshkaBatchTopKSAE, trainer_class="MatryoshkaBatchTopKTrainer", formats=EVERY_FORMAT
    ),
    "temporal": Kind(
        dictionary=TemporalMatryoshkaBatchTopKSAE,
        trainer_class="TemporalMatryoshkaBatchTopKTrainer",
        formats=EVERY_FORMAT,
        sae_bench=MatryoshkaBatchTopKSAE,
    ),
}
"""The kinds by the names that settings give them."""


def classes() -> dict[str, Kind]:
    """The kinds by the names of their classes, which files give them."""
    return {kind.dictionary.__name__: kind for kind in KINDS.values()}


def kind_of_class(name: object, where: str) -> Kind:
    """The kind that a file's `dict_class` names. Raises TsaeError for an unknown one."""
    known = classes()
    if not isinstance(name, str) or name not in known:
        near = suggestion(name, known, SLIP)
        raise TsaeError(f"{where}: dict_class {name!r} is unknown; {near}known: {', '.join(known)}")
    return known[name]


def from_state(name: object, state: dict[str, Tensor], k: int | None, where: str) -> Dictionary:
    """A dictionary of class `name` around the tensors of a reference state dict (shared, not copied).

    Raises TsaeError if the tensors are not those of the class, or if `k` (of the config) disagrees with the file.
    """
    cls = kind_of_class(name, where).dictionary
    cls.check_names(state, where)
    key = "W_dec" if "W_dec" in state else "decoder.weight"
    if state[key].ndim != 2:
        raise TsaeError(f"{where}: {key} has shape {tuple(state[key].shape)}; a matrix is expected")
    dict_size, activation_dim = state[key].shape if key == "W_dec" else state[key].T.shape
    k = _agreed_k(state["k"], k, dict_size, where) if "k" in state else 0
    group_sizes = _group_sizes(state["group_sizes"], dict_size, where) if "group_sizes" in state else ()
    with torch.device("meta"):
        dictionary = cls.sized(activation_dim, dict_size, k, group_sizes)
    dictionary.from_file(state, where)
    _require_orientation(dictionary, where)
    return dictionary


def _require_orientation(dictionary: Dictionary, where: str) -> None:
    """Refuse a square encoder that lies on its side: of a dictionary, what a latent reads is much like what it writes."""
    if dictionary.dict_size != dictionary.activation_dim:
        return
    reads, writes = dictionary.W_enc.detach(), dictionary.W_dec.detach()
    upright, turned = (float(torch.cosine_similarity(each, writes, dim=1).mean()) for each in (reads.T, reads))
    if turned > ALIKE and upright < turned / 2:
        raise TsaeError(
            f"{where}: W_enc is transposed: its rows are like those of W_dec (mean cosine {turned:.2f}), its columns are "
            f"not ({upright:.2f}); [activation_dim, dict_size] is expected"
        )


def _agreed_k(stored: Tensor, k: int | None, dict_size: int, where: str) -> int:
    if stored.numel() != 1 or not 0 < int(stored) <= dict_size:
        raise TsaeError(f"{where}: k is {stored.tolist()}; one number from 1 to {dict_size} (the latents) is expected")
    if k is not None and int(stored) != k:
        raise TsaeError(f"{where}: k is {int(stored)} in the weights and {k} in config.json; one of them is wrong")
    return int(stored)


def _group_sizes(stored: Tensor, dict_size: int, where: str) -> Sequence[int]:
    sizes: list[int] = stored.flatten().tolist()
    if stored.ndim != 1 or not sizes or min(sizes) <= 0 or sum(sizes) != dict_size:
        raise TsaeError(
            f"{where}: group_sizes are {stored.tolist()}; positive numbers that sum to the {dict_size} latents are expected"
        )
    return sizes
