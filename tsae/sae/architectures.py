"""The dictionary classes of the field, under the names their files carry.

Which tensors a file holds, and how each class encodes, follows the library that introduced the names
(github.com/saprmarks/dictionary_learning) and the T-SAE authors' fork of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from tsae.runtime.errors import TsaeError
from tsae.sae.dictionary import Dictionary, ThresholdDictionary
from tsae.sae.selection.dense import top_k

LINEAR_LAYERS = {"encoder.weight": "W_enc.T", "encoder.bias": "b_enc", "decoder.weight": "W_dec.T"}
FOUR_TENSORS = {"W_enc": "W_enc", "b_enc": "b_enc", "W_dec": "W_dec", "b_dec": "b_dec"}


class AutoEncoderNew(Dictionary):
    """ReLU SAE of Anthropic's April 2024 update: the input is not centred, decoder norms are free."""

    file_tensors: ClassVar[dict[str, str]] = {**LINEAR_LAYERS, "decoder.bias": "b_dec"}
    centre_input: ClassVar[bool] = False

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
        self.threshold = nn.Parameter(torch.zeros(dict_size))

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
    """BatchTopK SAE with nested groups of latents (Bussmann et al. 2025, arXiv 2503.17547)."""

    file_tensors: ClassVar[dict[str, str]] = {
        **FOUR_TENSORS,
        "k": "k",
        "threshold": "threshold",
        "group_sizes": "group_size_tensor",
    }
    group_size_tensor: Tensor

    def __init__(self, activation_dim: int, dict_size: int, k: int, group_sizes: Sequence[int]) -> None:
        super().__init__(activation_dim, dict_size, k)
        if not group_sizes or sum(group_sizes) != dict_size or min(group_sizes) <= 0:
            raise TsaeError(f"group sizes {tuple(group_sizes)} are not positive numbers that sum to {dict_size}")
        self.register_buffer("group_size_tensor", torch.tensor(list(group_sizes), dtype=torch.int64))

    @property
    def group_sizes(self) -> tuple[int, ...]:
        """Latents per group."""
        return tuple(int(size) for size in self.group_size_tensor)


class TemporalMatryoshkaBatchTopKSAE(MatryoshkaBatchTopKSAE):
    """Temporal SAE (Bhalla & Oesterling et al. 2025, arXiv 2511.05541): a Matryoshka SAE in every file and at inference,
    whose first group was trained to agree between neighbouring tokens."""
