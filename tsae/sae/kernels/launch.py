"""Where kernels are launched."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def on_device_of(tensor: Tensor) -> AbstractContextManager[Any]:
    """Makes the tensor's GPU the current one: Triton launches there, wherever the arguments are."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
