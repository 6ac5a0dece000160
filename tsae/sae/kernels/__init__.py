"""Where Triton kernels take over from torch's own operations: decided here and nowhere else.

On CUDA with Triton, float32 tensors go through the kernels. Without Triton, or for float64, torch's operations work on
CUDA too, more slowly. On a CPU the kernels run in Triton's interpreter if the environment says `TRITON_INTERPRET=1`,
which is how they are tested without a GPU.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import os
from types import ModuleType

import torch
from torch import Tensor

logger = logging.getLogger(__name__)


def interpreted() -> bool:
    """Whether Triton's interpreter was asked for."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def kernels_for(tensor: Tensor) -> ModuleType | None:
    """The module of kernels where they compute on tensors like this one; else None: torch's operations do.

    They have no backward pass, so a tensor that wants a gradient is left to torch.
    """
    if not (tensor.is_cuda or interpreted()) or tensor.dtype != torch.float32:
        return None
    if tensor.requires_grad and torch.is_grad_enabled():
        return None
    return _kernels()


def screens(tensor: Tensor) -> bool:
    """Whether an encoder product on tensors like this one is worth screening in bfloat16 first."""
    if tensor.dtype != torch.float32 or (tensor.requires_grad and torch.is_grad_enabled()):
        return False
    return interpreted() or (tensor.is_cuda and _fast_bfloat16())


@functools.cache
def _kernels() -> ModuleType | None:
    if importlib.util.find_spec("triton") is None:
        logger.warning("Triton is not installed: sparse operations on CUDA are torch's, which are slower")
        return None
    return importlib.import_module("tsae.sae.kernels.operations")


@functools.cache
def _fast_bfloat16() -> bool:
    return torch.cuda.is_bf16_supported(including_emulation=False)
