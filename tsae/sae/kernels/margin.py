"""What a screened product needs to become an upper bound of the true one; no Triton here.

Shapes: N rows, F dict_size.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Margin(NamedTuple):
    """How far a screened product may be from the true one: row_norm · latent_error + row_error · latent_norm."""

    bias: Tensor
    """Added to every row of the product [F]."""
    row_norms: Tensor
    """[N]"""
    row_errors: Tensor
    """[N]"""
    latent_norms: Tensor
    """[F]"""
    latent_errors: Tensor
    """[F]"""
