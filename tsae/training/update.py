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

CHUNK_BYTES, CUDA_CHUNK_BYTES = 2**20, 256 * 2**20


def lay_out_by_latent(dictionary: Dictionary) -> None:
    """Make each latent's weights one run of memory in both matrices, as in a fresh dictionary; files know other orders."""
    dictionary.W_enc.data = dictionary.W_enc.data.T.contiguous().T
    dictionary.W_dec.data = dictionary.W_dec.data.contiguous()


@phase("projection and norm")
@torch.no_grad()
def project_and_measure(dictionary: Dictionary, unit_rows: bool) -> Tensor:
    """The gradient's norm over all parameters.

    With `unit_rows`, first takes out of each decoder row's gradient what would only change the row's norm.
    """
    norms = []
    for parameter in dictionary.parameters():
        if parameter.grad is None:
            continue
        if unit_rows and parameter is dictionary.W_dec:
            for rows, gradient in zip(_chunks(parameter.data), _chunks(parameter.grad), strict=True):
                along = (gradient * rows).sum(dim=1) / (rows.norm(dim=1) + 1e-6).square()
                gradient.addcmul_(rows, along[:, None], value=-1)
                norms.append(torch.linalg.vector_norm(gradient))
        else:
            norms.append(torch.linalg.vector_norm(parameter.grad))
    return torch.linalg.vector_norm(torch.stack(norms))


class Adam(torch.optim.Adam):
    """torch's Adam, its state included, with the clipping before it and the normalisation after it."""

    @phase("optimizer")
    @torch.no_grad()
    def update(self, norm: Tensor, clip_norm: float, unit_rows: Tensor | None) -> None:
        """One step on gradients of the given norm, clipped to `clip_norm`; scales the rows of `unit_rows` to norm 1.

        The gradients themselves stay as they are.
        """
        factor = (clip_norm / (norm + 1e-6)).clamp_max(1.0)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group, factor, parameter is unit_rows)

    def _update(self, parameter: Tensor, group: dict[str, Any], factor: Tensor, unit_rows: bool) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        assert parameter.grad is not None
        tensors = (parameter.data, parameter.grad, state["exp_avg"], state["exp_avg_sq"])
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
