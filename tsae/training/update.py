"""The update of the weights, a cache-full of latents at a time: projection and norm, then clipping, Adam, unit rows.

Each number is what the plain sequence of whole-matrix operations gives, up to rounding; but the four tensors of a weight
matrix (weight, gradient, two moments) are far larger than any cache, and going through them once costs what matters.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.adam import adam

from tsae.phases import phase
from tsae.sae.dictionary import Dictionary
from tsae.sae.init import normalise_rows
from tsae.training.sharding import EVERYTHING, Shard

DECODER, OTHERS = "W_dec", "all but W_dec"
"""Names of the sums over processes of gradients."""
MOMENTS = ("exp_avg", "exp_avg_sq")
CHUNK_BYTES, CUDA_CHUNK_BYTES = 2**20, 256 * 2**20


def lay_out_by_latent(dictionary: Dictionary) -> None:
    """Make each latent's weights one run of memory in both matrices, as in a fresh dictionary; files know other orders."""
    dictionary.W_enc.data = dictionary.W_enc.data.T.contiguous().T
    dictionary.W_dec.data = dictionary.W_dec.data.contiguous()


@phase("projection and norm")
@torch.no_grad()
def project_and_measure(dictionary: Dictionary, unit_rows: bool, shard: Shard = EVERYTHING) -> Tensor:
    """The gradient's norm over all parameters.

    With `unit_rows`, first takes out of each decoder row's gradient what would only change the row's norm. That is
    done while the encoder's gradient is still being summed over processes.
    """
    decoder = dictionary.W_dec
    assert decoder.grad is not None
    matrices: list[Tensor] = []
    vectors: list[Tensor] = []
    shard.wait(DECODER)
    for rows, gradient in zip(_chunks(shard.own(decoder.data)), _chunks(shard.own(decoder.grad)), strict=True):
        if unit_rows:
            along = (gradient * rows).sum(dim=1) / (rows.norm(dim=1) + 1e-6).square()
            gradient.addcmul_(rows, along[:, None], value=-1)
        matrices.append(torch.linalg.vector_norm(gradient))
    shard.wait(OTHERS)
    for parameter in dictionary.parameters():
        if parameter.grad is not None and parameter is not decoder:
            norms = matrices if parameter.ndim > 1 else vectors
            norms.append(torch.linalg.vector_norm(shard.own(parameter.grad)))
    return shard.norm(matrices, vectors)


class Adam(torch.optim.Adam):
    """torch's Adam, its state included, with the clipping before it and the normalisation after it.

    Moments and updates are of the process's own part of each parameter, as `shard` says.
    """

    def __init__(self, *parameters: Any, shard: Shard = EVERYTHING, **options: Any) -> None:
        super().__init__(*parameters, **options)
        self._shard = shard

    @phase("optimizer")
    @torch.no_grad()
    def update(self, norm: Tensor, clip_norm: float, unit_rows: Tensor | None) -> None:
        """One step on gradients of the given norm, clipped to `clip_norm`; scales the rows of `unit_rows` to norm 1.

        The gradients themselves stay as they are.
        """
        factor = (clip_norm / (norm + 1e-6)).clamp_max(1.0)
        waits = []
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group, factor, parameter is unit_rows)
                    waits.append(self._shard.start_spread(parameter.data))
        for wait in waits:
            wait()

    def _update(self, parameter: Tensor, group: dict[str, Any], factor: Tensor, unit_rows: bool) -> None:
        assert parameter.grad is not None
        own, state = self._shard.own(parameter.data), self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), device=parameter.device)
            for name in MOMENTS:
                state[name] = torch.zeros_like(own, memory_format=torch.preserve_format)
        tensors = (own, self._shard.own(parameter.grad), *(state[name] for name in MOMENTS))
        beta1, beta2 = group["betas"]
        for rows, gradient, first, second in zip(*map(_chunks, tensors), strict=True):
            # The function counts the step itself, once for every call.
            adam(
                [rows], [gradient * factor], [first], [second], [], [state["step"].clone()],
                fused=True, amsgrad=False, beta1=beta1, beta2=beta2, lr=group["lr"],
                weight_decay=group["weight_decay"], eps=group["eps"], maximize=False,
            )  # fmt: skip
            if unit_rows:
                normalise_rows(rows)
        state["step"] += 1

    def whole_state(self) -> dict[str, Any]:
        """The state of all processes, in the first one, whoever updates what; all of them call this."""
        own, parameters = self.state_dict(), self._parameters()
        whole = {
            index: {**kept, **{name: self._shard.whole(kept[name], parameters[index]) for name in MOMENTS}}
            for index, kept in own["state"].items()
        }
        return {**own, "state": whole}

    def load_whole_state(self, state: dict[str, Any]) -> None:
        """Continue from this process's part of what `whole_state()` returned."""
        own = {
            index: {name: self._shard.own(value).clone() for name, value in kept.items()}
            for index, kept in state["state"].items()
        }
        self.load_state_dict({**state, "state": own})

    def _parameters(self) -> list[Tensor]:
        return [parameter for group in self.param_groups for parameter in group["params"]]


def _chunks(tensor: Tensor) -> tuple[Tensor, ...]:
    """Views of a vector, whole, or of a matrix that is laid out by latent, a few latents each."""
    if tensor.ndim < 2:
        return (tensor,)
    rows = tensor if tensor.is_contiguous() else tensor.T
    assert rows.is_contiguous()
    return rows.split(chunk_rows(rows))


def chunk_rows(matrix: Tensor) -> int:
    """Rows of a matrix to work on at a time: what a core's cache holds; on CUDA so many that launches are few."""
    limit = CUDA_CHUNK_BYTES if matrix.is_cuda else CHUNK_BYTES
    return max(1, limit // (matrix.shape[1] * matrix.element_size()))
