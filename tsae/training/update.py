"""The update of the weights, a cache-full of latents at a time: projection and norm, then clipping, Adam, unit rows.

Each number is what the plain sequence of whole-matrix operations gives, up to rounding; but the tensors of a weight
matrix (weight, two moments, perhaps a gradient) are far larger than any cache, and going through them is what costs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.adam import adam

from tsae.runtime.phases import phase
from tsae.sae.dictionary import Dictionary
from tsae.sae.init import normalise_rows
from tsae.training.gradients import Gradient, Gradients, by_latent, chunks
from tsae.training.sharding import EVERYTHING, Shard

DECODER, OTHERS = "W_dec", "all but W_dec"
"""Names of the sums over processes of gradients."""
MOMENTS = ("exp_avg", "exp_avg_sq")


def lay_out_by_latent(dictionary: Dictionary) -> None:
    """Make each latent's weights one run of memory in both matrices, as in a fresh dictionary; files know other orders."""
    dictionary.W_enc.data = dictionary.W_enc.data.T.contiguous().T
    dictionary.W_dec.data = dictionary.W_dec.data.contiguous()


@phase("projection and norm")
@torch.no_grad()
def project_and_measure(
    dictionary: Dictionary, gradients: Gradients, unit_rows: bool, shard: Shard = EVERYTHING
) -> Tensor:
    """The gradient's norm over all parameters.

    With `unit_rows`, first takes out of each decoder row's gradient what would only change the row's norm. That is
    done while the encoder's gradient is still being summed over processes.
    """
    decoder = dictionary.W_dec
    shard.wait(DECODER)
    matrices = list(gradients[decoder].measure(by_latent(shard.own(decoder.data)) if unit_rows else None))
    vectors: list[Tensor] = []
    shard.wait(OTHERS)
    for parameter, gradient in gradients.items():
        if parameter is not decoder:
            norms = matrices if parameter.ndim > 1 else vectors
            norms += gradient.measure(None)
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
    def update(self, gradients: Gradients, norm: Tensor, clip_norm: float, unit_rows: Tensor | None) -> None:
        """One step on gradients of the given norm, clipped to `clip_norm`; scales the rows of `unit_rows` to norm 1."""
        factor = (clip_norm / (norm + 1e-6)).clamp_max(1.0)
        waits = []
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter in gradients:
                    self._update(parameter, gradients[parameter], group, factor, parameter is unit_rows)
                    waits.append(self._shard.start_spread(parameter.data))
        for wait in waits:
            wait()

    def _update(
        self, parameter: Tensor, gradient: Gradient, group: dict[str, Any], factor: Tensor, unit_rows: bool
    ) -> None:
        own, state = self._shard.own(parameter.data), self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), device=parameter.device)
            for name in MOMENTS:
                state[name] = torch.zeros_like(own, memory_format=torch.preserve_format)
        tensors = (own, *(state[name] for name in MOMENTS))
        beta1, beta2 = group["betas"]
        done = 0
        for rows, first, second in zip(*map(chunks, tensors), strict=True):
            clipped = gradient.chunk(done, rows, factor)
            done += len(rows)
            # The function counts the step itself, once for every call.
            adam(
                [rows], [clipped], [first], [second], [], [state["step"].clone()],
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
