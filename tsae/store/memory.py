"""Memory for batches that is used again."""

from __future__ import annotations

import weakref

import numpy as np
import torch
from torch import Tensor

MOST_FREE = 8


class Recycled:
    """Memory for batches that serves again once no tensor refers to it: new pages cost as much as filling them."""

    def __init__(self) -> None:
        self._free: list[np.ndarray] = []

    def take(self, shape: tuple[int, ...]) -> Tensor:
        """An uninitialised float32 tensor."""
        fitting = self._free and self._free[-1].shape == shape
        memory = self._free.pop() if fitting else np.empty(shape, np.float32)
        # torch holds this very object until the last view of the tensor is gone.
        held = memory[:]
        weakref.finalize(held, self._give_back, memory).atexit = False
        return torch.from_numpy(held)

    def _give_back(self, memory: np.ndarray) -> None:
        if len(self._free) < MOST_FREE:
            self._free.append(memory)
