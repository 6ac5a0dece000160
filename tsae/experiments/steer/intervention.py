"""The change that steering makes to the residual stream.

With z the code of x and e = x - decode(z), the steered activation is decode(z') + e, where z' differs from z in latent j
alone: z'_j = s (set) or z_j + s (add). So x' = x + (z'_j - z_j) · W_dec[j], and nothing has to be decoded.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tsae.experiments.shared.subject import Subject
from tsae.sae.inference import encode_sparse
from tsae.sae.selection.top_k import Encoder

NO_LATENT = -1


class Rows(NamedTuple):
    """What happens to each of R rows of a batch; a strength of 0 leaves the row as it is."""

    latents: Tensor
    """[R] the latent that is set; NO_LATENT where the strength is added along the vector, whatever the code is."""
    vectors: Tensor
    """[R, D]"""
    strengths: Tensor
    """[R]"""


class Steering:
    """Exchanges the activations [R, T, D] of a generation's successive steps, the prompt first."""

    def __init__(self, subject: Subject, rows: Rows, *, first_position: bool = False) -> None:
        self._subject, self._rows, self._first_position = subject, rows, first_position
        self._encoder = Encoder()
        self._begun = False

    def __call__(self, hidden: Tensor) -> Tensor:
        """The steered activations."""
        steered = hidden.float() + self._change(hidden)
        if not (self._begun or self._first_position):
            steered[:, 0] = hidden[:, 0].float()
        self._begun = True
        unsteered = (self._rows.strengths == 0).to(hidden.device)
        return torch.where(unsteered[:, None, None], hidden, steered.to(hidden))

    def _change(self, hidden: Tensor) -> Tensor:
        """[R, T, D] what is added."""
        rows = self._rows
        strength = rows.strengths[:, None].to(hidden.device, torch.float32)  # [R, 1]
        if bool((rows.latents != NO_LATENT).any()):
            strength = strength - self._activations(hidden)
        return strength[..., None] * rows.vectors[:, None].to(hidden.device, torch.float32)

    def _activations(self, hidden: Tensor) -> Tensor:
        """[R, T] feature activation of each row's latent; 0 for a row without one."""
        count, length, width = hidden.shape
        dictionary, device = self._subject.dictionary, self._subject.device
        x = hidden.reshape(-1, width).to(device, torch.float32)
        code = encode_sparse(dictionary, x, self._encoder)
        wanted = self._rows.latents.to(device).repeat_interleave(length)
        hits = code.latents == wanted[code.rows]
        found = torch.zeros(len(x), device=device)
        found[code.rows[hits]] = code.values[hits].float()
        return found.reshape(count, length).to(hidden.device)
