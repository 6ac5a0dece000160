"""Numbers of a device that the host looks at later.

Reading a number of a GPU (`float(tensor)`, `nonzero`) makes the host wait until everything launched so far is done, and
the GPU then waits for the host's next launch. A `Late` number is copied when its turn comes, while the host goes on
launching; when it is read the GPU has long passed that point, and still has work before it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Late:
    """The values of a tensor as they are now, wherever it is."""

    def __init__(self, values: Tensor) -> None:
        self._values, self._copied = values, None
        if values.is_cuda:
            self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record(torch.cuda.current_stream(values.device))

    def read(self) -> Any:
        """The values as numbers, in lists of the tensor's shape; waits for the copy, not for what was launched after it."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._values.tolist()
