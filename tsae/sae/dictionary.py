"""What every dictionary is: an encoder and a decoder over D-dimensional activations.

Legend of shapes: B batch, D activation_dim, F dict_size, G groups, K active per token.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from tsae.runtime.errors import TsaeError
from tsae.runtime.phases import phase

if TYPE_CHECKING:
    from tsae.config.sections import ModelConfig

UNCALIBRATED = -1.0
EPSILON = float(torch.finfo(torch.float32).eps)
UNIT = 1e-5
"""How near 1 the norm of a row of norm 1 is, files in half precision aside."""


class Dictionary(nn.Module, ABC):
    """Four tensors shared by all classes: `W_enc` [D, F], `b_enc` [F], `W_dec` [F, D], `b_dec` [D].

    `W_enc` is kept as the transpose of a contiguous [F, D] block, so that one latent's weights are one run of
    memory in both matrices. Subclasses say how pre-activations become feature activations, and how their tensors
    are called in the reference's files (`file_tensors`: file key → attribute, `.T` marks a transposed matrix).
    """

    file_tensors: ClassVar[dict[str, str]] = {}
    centre_input: ClassVar[bool] = True
    """Whether `b_dec` is subtracted from the input before encoding."""
    scales_with_input: ClassVar[tuple[str, ...]] = ("b_enc", "b_dec")
    """Tensors that must grow with the activations for the dictionary to do the same on a larger scale."""
    evaluated_by_norms: ClassVar[bool] = False
    """Whether the reference's `evaluate` multiplies feature activations by `row_norms` first."""
    reads: ModelConfig | None = None
    """The language model and the place that it was trained on, where `tsae.load` found that out."""

    def __init__(self, activation_dim: int, dict_size: int) -> None:
        super().__init__()
        self.W_enc = nn.Parameter(torch.empty(dict_size, activation_dim).T)
        self.b_enc = nn.Parameter(torch.zeros(dict_size))
        self.W_dec = nn.Parameter(torch.empty(dict_size, activation_dim))
        self.b_dec = nn.Parameter(torch.zeros(activation_dim))

    def __repr__(self) -> str:
        """One line: class, sizes, splits, what decides which latents are active, and what it reads."""
        parts = [f"{self.dict_size:,} latents on {self.activation_dim:,} dimensions"]
        if len(self.group_sizes) > 1:
            parts.append("splits " + " + ".join(f"{size:,}" for size in self.group_sizes))
        parts += self._rule()
        if self.reads is not None:
            parts.append(f"reads {self.reads.hook_point or f'block {self.reads.layer}'} of {self.reads.name}")
        return f"{type(self).__name__}: {', '.join(parts)}"

    def _rule(self) -> list[str]:
        """In words, what decides which latents are active."""
        return [f"rule {self.encode_rule}"]

    @classmethod
    def sized(cls, activation_dim: int, dict_size: int, k: int, group_sizes: Sequence[int]) -> Dictionary:
        """One of these sizes, of which each class takes those that it has; its weights are not set yet."""
        del k, group_sizes
        return cls(activation_dim, dict_size)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Dictionary:
        """Whole numbers (k, sizes) are asked for by the host alone, in every step: they stay with it."""
        kept = {name: buffer for name, buffer in self._buffers.items() if _is_whole(buffer)}
        super()._apply(fn, recurse)
        self._buffers.update(kept)
        return self

    @property
    def activation_dim(self) -> int:
        """D, the width of the activations."""
        return self.W_dec.shape[1]

    @property
    def dict_size(self) -> int:
        """F, the number of latents."""
        return self.W_dec.shape[0]

    @property
    def group_sizes(self) -> tuple[int, ...]:
        """Latents per group; a class without groups has one."""
        stored = self._buffers.get("group_size_tensor")
        return (self.dict_size,) if stored is None else tuple(stored.tolist())

    @property
    def group_slices(self) -> tuple[slice, ...]:
        """Where each group's latents lie among the F; group 0 is the high-level split."""
        slices, start = [], 0
        for size in self.group_sizes:
            slices.append(slice(start, start + size))
            start += size
        return tuple(slices)

    @property
    def row_norms(self) -> Tensor:
        """Norms of the decoder's rows [F]; exactly 1 where they are 1 but for rounding.

        A feature activation times its row's norm is how much the latent writes: what may be compared between latents
        and dictionaries, since encoder and decoder may share a scale between them in any way.
        """
        norms = self.W_dec.detach().float().norm(dim=1)
        return torch.where((norms - 1).abs() < UNIT, 1.0, norms)

    @property
    @abstractmethod
    def encode_rule(self) -> str:
        """What decides at inference which latents are active."""

    @property
    def scalar_threshold(self) -> float | None:
        """The one threshold that encoding uses; none where the rule has none, or one for each latent."""
        return None

    def pre_activations(self, x: Tensor) -> Tensor:
        """[..., D] → [..., F], before any nonlinearity."""
        return (x - self.b_dec if self.centre_input else x) @ self.W_enc + self.b_enc

    @abstractmethod
    def encode(self, x: Tensor) -> Tensor:
        """Feature activations [..., F] of activations [..., D], by the class's inference rule."""

    def decode(self, f: Tensor) -> Tensor:
        """Reconstruction [..., D] of feature activations [..., F]."""
        return f @ self.W_dec + self.b_dec

    def decode_groups(self, f: Tensor, groups: Sequence[int]) -> Tensor:
        """What the latents of `groups` alone write, [..., D]; without the bias."""
        slices = self.group_slices
        return sum((f[..., slices[g]] @ self.W_dec[slices[g]] for g in groups), start=f.new_zeros(()))

    def require_calibrated(self, where: str) -> None:
        """Raise TsaeError if encoding needs a threshold that was never set; most classes need none."""

    def forward(self, x: Tensor) -> Tensor:
        """Reconstruction [..., D] of activations [..., D]."""
        return self.decode(self.encode(x))

    def to_file(self, scale: float = 1.0, shift: Tensor | None = None) -> dict[str, Tensor]:
        """The state dict of the reference's class: CPU tensors under its names, in its order.

        With `scale` and `shift` [D], of the same dictionary for activations `scale` · x + `shift` where it knows x: its
        feature activations are `scale` times as large, its reconstructions scaled and shifted alike.
        """
        state = {}
        for key, attribute in self.file_tensors.items():
            name, _, transposed = attribute.partition(".")
            tensor = getattr(self, name).detach()
            state[key] = (tensor.T if transposed else tensor).to("cpu", copy=True).contiguous()
            if scale != 1 and name in self.scales_with_input:
                state[key] *= scale
            if shift is not None and name == "b_dec":
                state[key] += shift.cpu()
            elif shift is not None and name == "b_enc" and not self.centre_input:
                # In double precision, so that only the result is rounded: the shift may be far larger than the codes.
                state[key] -= (shift.double() @ self.W_enc.detach().double()).cpu()
        return state

    def from_file(self, state: dict[str, Tensor], where: str = "state dict") -> None:
        """Take the tensors of a reference state dict (shared, not copied).

        Raises TsaeError for missing or extra tensors, wrong shapes and non-finite values.
        """
        self.check_names(state, where)
        for key, attribute in self.file_tensors.items():
            name, _, transposed = attribute.partition(".")
            present, given = getattr(self, name), state[key]
            expected = present.T.shape if transposed else present.shape
            if given.shape != expected:
                raise TsaeError(
                    f"{where}: {key} has shape {tuple(given.shape)}; {type(self).__name__} needs {tuple(expected)}"
                )
            if given.is_floating_point() != present.is_floating_point():
                raise TsaeError(f"{where}: {key} is {given.dtype}; {type(self).__name__} needs {present.dtype}")
            if not is_finite(given):
                raise TsaeError(f"{where}: {key} holds values that are not finite; the file is damaged or diverged")
            tensor = (given.T if transposed else given).to(present.dtype)
            setattr(self, name, nn.Parameter(tensor) if isinstance(present, nn.Parameter) else tensor)

    @classmethod
    def check_names(cls, state: dict[str, Tensor], where: str) -> None:
        """Raise TsaeError unless `state` has exactly the tensors of this class."""
        missing = [key for key in cls.file_tensors if key not in state]
        extra = [key for key in state if key not in cls.file_tensors]
        if missing or extra:
            raise TsaeError(
                f"{where}: not a {cls.__name__}: missing tensors {missing or 'none'}, "
                f"unexpected tensors {extra or 'none'}; does dict_class in config.json match the weights?"
            )


def _is_whole(buffer: Tensor | None) -> bool:
    return buffer is not None and not buffer.is_floating_point()


def is_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite, without a copy of the tensor (which isfinite would make)."""
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    # Both extremes of a tensor that holds a NaN are NaN.
    return bool(torch.isfinite(torch.stack(torch.aminmax(tensor if tensor.is_contiguous() else tensor.T))).all())


class ThresholdDictionary(Dictionary):
    """A dictionary trained with (batch-)top-k and used with a threshold that stands in for the batch's cut."""

    scales_with_input: ClassVar[tuple[str, ...]] = ("b_enc", "b_dec", "threshold")
    selects_per_token: ClassVar[bool] = False
    """Whether training selects the k largest of each token, rather than k·N of all."""
    k: Tensor
    threshold: Tensor

    def __init__(self, activation_dim: int, dict_size: int, k: int) -> None:
        super().__init__(activation_dim, dict_size)
        self.register_buffer("k", torch.tensor(k, dtype=torch.int32))
        self.register_buffer("threshold", torch.tensor(UNCALIBRATED))

    @classmethod
    def sized(cls, activation_dim: int, dict_size: int, k: int, group_sizes: Sequence[int]) -> ThresholdDictionary:
        del group_sizes
        return cls(activation_dim, dict_size, k)

    @property
    def encode_rule(self) -> str:
        """`threshold`: one for all latents, whatever else is in the batch."""
        return "threshold"

    @property
    def scalar_threshold(self) -> float | None:
        """The threshold; none before it was calibrated."""
        return float(self.threshold) if self.threshold >= 0 else None

    def _rule(self) -> list[str]:
        if self.encode_rule != "threshold":
            return [f"k {int(self.k)}", *super()._rule()]
        cuts = " and ".join(f"{float(cut):.4g}" for cut in self.thresholds)
        return [f"k {int(self.k)}", f"threshold {'not calibrated' if self.scalar_threshold is None else cuts}"]

    @property
    def budgets(self) -> tuple[tuple[slice, float], ...]:
        """In which latents training selects the largest activations by themselves, and how many of each token, on average."""
        return ((slice(0, self.dict_size), int(self.k)),)

    @property
    def thresholds(self) -> tuple[Tensor, ...]:
        """The thresholds that training tracks, one for each of the budgets."""
        return (self.threshold,)

    def keep_largest(self, activations: Tensor) -> Tensor:
        """The code in training: of rectified pre-activations [..., F], the k·N largest of N tokens, or of each budget."""
        kept = [batch_top_k(activations[..., part], k) for part, k in self.budgets]
        return kept[0] if len(kept) == 1 else torch.cat(kept, dim=-1)

    def cut_of(self, smallest: Tensor) -> Tensor:
        """What the threshold follows: the least of each token's smallest kept activation [N] (infinite: none kept)."""
        return smallest.min()

    def to_file(self, scale: float = 1.0, shift: Tensor | None = None) -> dict[str, Tensor]:
        """As for every dictionary; a threshold that was never calibrated keeps its mark."""
        state = super().to_file(scale, shift)
        if self.threshold < 0:
            state["threshold"].fill_(UNCALIBRATED)
        return state

    def encode(self, x: Tensor) -> Tensor:
        """Feature activations [..., F]: those above the threshold, exactly (strict inequality)."""
        return self.apply_threshold(self.pre_activations(x))

    def apply_threshold(self, pre: Tensor) -> Tensor:
        """Zero out pre-activations [..., F] that are not above the threshold. Raises TsaeError if uncalibrated."""
        self.require_calibrated(type(self).__name__)
        activations = torch.relu(pre)
        return activations * (activations > self.threshold)

    def require_calibrated(self, where: str) -> None:
        """Raise TsaeError while the threshold is the −1 of a dictionary that never tracked one."""
        if self.threshold < 0:
            raise TsaeError(
                f"{where}: the threshold was never calibrated ({float(self.threshold):g}), so codes would be dense; "
                "train past training.threshold_start_step, or set it with: tsae calibrate RUN"
            )


def normalise_rows(rows: Tensor) -> None:
    """Scale each row of [F, D] to norm 1, in place; the tiny summand keeps a zero row finite, as in the reference."""
    rows /= rows.norm(dim=1, keepdim=True) + EPSILON


@phase("selection")
def batch_top_k(activations: Tensor, k: float) -> Tensor:
    """Keep the k·N (rounded) largest of non-negative activations [..., F] over all N leading rows; zeros elsewhere.

    With fewer than k·N positive entries all positive ones are kept. Ties at the cut keep any of the tied.
    """
    flat = activations.flatten()
    count = min(round(k * (flat.numel() // activations.shape[-1])), flat.numel())
    top = flat.topk(count, sorted=False)
    return torch.zeros_like(flat).scatter(0, top.indices, top.values).reshape(activations.shape)


def top_k(activations: Tensor, k: int) -> Tensor:
    """Keep the k largest of non-negative activations [..., F] of each token; zeros elsewhere."""
    top = activations.topk(min(k, activations.shape[-1]), dim=-1, sorted=False)
    return torch.zeros_like(activations).scatter(-1, top.indices, top.values)
