"""What every dictionary is: an encoder and a decoder over D-dimensional activations.

Legend of shapes: B batch, D activation_dim, F dict_size, G groups, K active per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from tsae.errors import TsaeError

UNCALIBRATED = -1.0


class Dictionary(nn.Module):
    """Four tensors shared by all classes: `W_enc` [D, F], `b_enc` [F], `W_dec` [F, D], `b_dec` [D].

    `W_enc` is kept as the transpose of a contiguous [F, D] block, so that one latent's weights are one run of
    memory in both matrices. Subclasses say how pre-activations become feature activations, and how their tensors
    are called in the reference's files (`file_tensors`: file key → attribute, `.T` marks a transposed matrix).
    """

    file_tensors: ClassVar[dict[str, str]] = {}
    centre_input: ClassVar[bool] = True
    """Whether `b_dec` is subtracted from the input before encoding."""

    def __init__(self, activation_dim: int, dict_size: int) -> None:
        super().__init__()
        self.W_enc = nn.Parameter(torch.empty(dict_size, activation_dim).T)
        self.b_enc = nn.Parameter(torch.zeros(dict_size))
        self.W_dec = nn.Parameter(torch.empty(dict_size, activation_dim))
        self.b_dec = nn.Parameter(torch.zeros(activation_dim))

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
        return (self.dict_size,)

    @property
    def group_slices(self) -> tuple[slice, ...]:
        """Where each group's latents lie among the F; group 0 is the high-level split."""
        slices, start = [], 0
        for size in self.group_sizes:
            slices.append(slice(start, start + size))
            start += size
        return tuple(slices)

    def pre_activations(self, x: Tensor) -> Tensor:
        """[..., D] → [..., F], before any nonlinearity."""
        return (x - self.b_dec if self.centre_input else x) @ self.W_enc + self.b_enc

    def encode(self, x: Tensor) -> Tensor:
        """Feature activations [..., F] of activations [..., D], by the class's inference rule."""
        raise NotImplementedError(f"{type(self).__name__} defines no encoder")

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

    def to_file(self) -> dict[str, Tensor]:
        """The state dict of the reference's class: CPU tensors under its names, in its order."""
        state = {}
        for key, attribute in self.file_tensors.items():
            name, _, transposed = attribute.partition(".")
            tensor = getattr(self, name).detach()
            state[key] = (tensor.T if transposed else tensor).to("cpu", copy=True).contiguous()
        return state

    def from_file(self, state: dict[str, Tensor], where: str = "state dict") -> None:
        """Take the tensors of a reference state dict (shared, not copied).

        Raises TsaeError for missing or extra tensors, wrong shapes and non-finite values.
        """
        self._check_names(state, where)
        for key, attribute in self.file_tensors.items():
            name, _, transposed = attribute.partition(".")
            own, given = getattr(self, name), state[key]
            tensor = given.T if transposed else given
            if tensor.shape != own.shape:
                expected = tuple(own.T.shape if transposed else own.shape)
                raise TsaeError(
                    f"{where}: {key} has shape {tuple(given.shape)}; {type(self).__name__} needs {expected}"
                )
            # A sum is finite only if no term is NaN or infinite; isfinite() itself would copy the whole matrix.
            if given.is_floating_point() and not bool(torch.isfinite(given.sum(dtype=torch.float64))):
                raise TsaeError(f"{where}: {key} holds values that are not finite; the file is damaged or diverged")
            tensor = tensor.to(own.dtype)
            setattr(self, name, nn.Parameter(tensor) if isinstance(own, nn.Parameter) else tensor)

    def _check_names(self, state: dict[str, Tensor], where: str) -> None:
        missing = [key for key in self.file_tensors if key not in state]
        extra = [key for key in state if key not in self.file_tensors]
        if missing or extra:
            raise TsaeError(
                f"{where}: not a {type(self).__name__}: missing tensors {missing or 'none'}, "
                f"unexpected tensors {extra or 'none'}; does dict_class in config.json match the weights?"
            )


class ThresholdDictionary(Dictionary):
    """A dictionary trained with (batch-)top-k and used with a threshold that stands in for the batch's cut."""

    k: Tensor
    threshold: Tensor

    def __init__(self, activation_dim: int, dict_size: int, k: int) -> None:
        super().__init__(activation_dim, dict_size)
        self.register_buffer("k", torch.tensor(k, dtype=torch.int32))
        self.register_buffer("threshold", torch.tensor(UNCALIBRATED))

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
                "train past training.threshold_start_step"
            )
