"""Which tokens a direction in the residual stream speaks for: its scores through the output layer (the logit lens).

What is added to the residual stream reaches the output layer through the final norm. Up to the norm's division by the size of the
whole, which is one positive factor for all tokens, a direction d adds W_U · (gain * (d - mean(d))) to the scores [V]; only a
LayerNorm takes the mean off. That an architecture does it so is not looked up but proved on real positions.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn

from tsae.lm.hook import find_blocks, proof_rows, watch
from tsae.lm.model import LanguageModel

TOLERANCE = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 3e-2}
"""Of the norm's output, the largest share that its line may leave unexplained."""


class Unembedding(NamedTuple):
    """A model's output layer with its final norm folded in."""

    weight: Tensor
    """[V, D], float32."""
    gain: Tensor
    """[D]"""
    centres: bool

    def scores(self, directions: Tensor) -> Tensor:
        """[N, V]: what directions [N, D] add to the scores, up to a positive factor."""
        directions = directions.to(self.weight).float()
        if self.centres:
            directions = directions - directions.mean(1, keepdim=True)
        return (directions * self.gain) @ self.weight.T


@torch.no_grad()
def unembedding(model: LanguageModel) -> Unembedding | None:
    """The output layer of `model`; None if none reads what one norm makes of a stream as wide as what the hook point gives."""
    module = model.module
    head = module.get_output_embeddings()
    if not isinstance(head, nn.Linear) or head.in_features != model.activation_dim:
        return None
    paths = {id(part): path for path, part in module.named_modules()}
    holder = find_blocks(module, model.n_layers).rpartition(".")[0]
    beside = [path for path in paths.values() if path and path.rpartition(".")[0] == holder]
    tokens = proof_rows(model.vocabulary, model.max_length)[:1].to(model.device)
    seen, _ = watch(module, [*beside, paths[id(head)]], {"input_ids": tokens, "use_cache": False})
    read = next(taken for path, taken, _ in seen if path == paths[id(head)])
    for path, stream, given in seen:
        is_last = isinstance(given, Tensor) and given.shape == read.shape and torch.equal(given.to(read.dtype), read)
        if path != paths[id(head)] and is_last and isinstance(stream, Tensor) and stream.shape == given.shape:
            with align_module_device(head):  # which may lie on the disk
                return _folded(stream, given, head.weight)
    return None


def _folded(stream: Tensor, given: Tensor, weight: Tensor) -> Unembedding | None:
    """The norm's gain, if `given` [1, L, D] is `stream` divided by its size, times a gain, plus a constant."""
    fits = []
    for centres in (False, True):
        flat, y = stream[0].double(), given[0].double()
        flat = flat - flat.mean(-1, keepdim=True) if centres else flat
        flat = flat / flat.square().mean(-1, keepdim=True).sqrt()
        # Two unknowns for each dimension and L positions: a least-squares line.
        x, y = flat - flat.mean(0), y - y.mean(0)
        gain = (x * y).sum(0) / x.square().sum(0).clamp_min(1e-12)
        fits.append((float((x * gain - y).norm() / y.norm()), centres, gain.float().to(weight.device)))
    left, centres, gain = min(fits, key=lambda fit: fit[0])
    return Unembedding(weight.float(), gain, centres) if left < TOLERANCE[weight.dtype] else None
