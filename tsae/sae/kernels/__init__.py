"""Triton kernels, and what launches them; each function returns the same as its torch counterpart.

Imported by `tsae.sae.sparse.kernels_for` alone, and only where they run.

An entry whose column, or target, is −1 is empty: nothing is read for it, and what is computed for it is 0.

Every sum but `add_rows` has a fixed order, so results are the same bits in every run.
"""

from tsae.sae.kernels.candidates import Candidates
from tsae.sae.kernels.codes import kept, largest_of_rows, of_groups, refined
from tsae.sae.kernels.contrast import logits_of_rows, sums_of_columns, through_logits
from tsae.sae.kernels.radix import cuts
from tsae.sae.kernels.screen import least_of_segments, maybe_above, round_rows
from tsae.sae.kernels.sums import (
    add_rows,
    bounds,
    nested_gradients,
    nested_residuals,
    row_squares,
    sampled_products,
    segment_sums,
    weighted_rows,
)
from tsae.sae.kernels.update import adam, along_and_norm

__all__ = [
    "Candidates",
    "adam",
    "add_rows",
    "along_and_norm",
    "bounds",
    "cuts",
    "kept",
    "largest_of_rows",
    "least_of_segments",
    "logits_of_rows",
    "maybe_above",
    "nested_gradients",
    "nested_residuals",
    "of_groups",
    "refined",
    "round_rows",
    "row_squares",
    "sampled_products",
    "segment_sums",
    "sums_of_columns",
    "through_logits",
    "weighted_rows",
]
