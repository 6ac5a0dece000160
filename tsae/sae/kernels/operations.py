"""What the rest of the package calls of the kernels; every function returns the same as its torch counterpart."""

from __future__ import annotations

from tsae.sae.kernels.candidates import Candidates
from tsae.sae.kernels.rounding import round_rows
from tsae.sae.kernels.sums import add_rows, sampled_products, segment_sums, weighted_rows

__all__ = ["Candidates", "add_rows", "round_rows", "sampled_products", "segment_sums", "weighted_rows"]
