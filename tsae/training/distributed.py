"""The processes of one training: what a step asks of the others, and how many bytes that costs.

Weights, and every number that decides something, are the same in all processes; batches, codes and residuals are a
process's own. Numbers that are summed here are summed in one order for all, so they stay the same to the last bit.
"""

from __future__ import annotations

import atexit
from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
import torch.distributed as dist
from torch import Tensor

from tsae.errors import TsaeError

Wait = Callable[[], None]


class Group:
    """A training in one process: every collective returns what it was given.

    Collectives must be called by all processes of a training, in the same order.
    """

    rank: int = 0
    world: int = 1
    bytes_handed: int = 0
    """Bytes that this process has put into collectives so far."""

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over processes."""
        return tensor

    def mean(self, tensor: Tensor) -> Tensor:
        """Mean over processes: of equal shares' means, the mean of the whole."""
        return tensor

    def max(self, tensor: Tensor) -> Tensor:
        """Largest over processes, element by element."""
        return tensor

    def any(self, flags: Tensor) -> Tensor:
        """Whether a flag (bool) is set in some process."""
        return flags

    def sums(self, *scalars: Tensor) -> tuple[Tensor, ...]:
        """Sums over processes of several scalars, in one collective."""
        return scalars

    def gather(self, tensor: Tensor) -> Tensor:
        """All processes' tensors, of equal shapes, one after the other along the first dimension."""
        return tensor

    def gather_ragged(self, tensor: Tensor, lengths: Sequence[int]) -> Tensor:
        """As `gather`, of vectors whose lengths differ; every process knows all of them, in order of rank."""
        del lengths
        return tensor

    def start_sum(self, *tensors: Tensor) -> Wait:
        """Begin to replace contiguous tensors by their sums over processes; they may be used after the wait."""
        del tensors
        return lambda: None

    def on_first(self, action: Callable[[], None]) -> None:
        """Call `action` in the first process alone; the others wait for it. Raises TsaeError there if it fails."""
        action()

    def share(self, n: int) -> slice:
        """Where this process's rows lie among `n` rows a process, put together in order of rank."""
        return slice(self.rank * n, (self.rank + 1) * n)

    def take_bytes(self) -> int:
        """Bytes handed over since the last call."""
        taken, self.bytes_handed = self.bytes_handed, 0
        return taken


ALONE = Group()


class Processes(Group):
    """The processes of torch.distributed's default group (gloo or nccl), each working on its own `device`."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.rank, self.world, self._device = dist.get_rank(), dist.get_world_size(), torch.device(device)
        self.bytes_handed = 0

    def sum(self, tensor: Tensor) -> Tensor:
        return self._reduced(tensor, dist.ReduceOp.SUM)

    def mean(self, tensor: Tensor) -> Tensor:
        return self.sum(tensor) / self.world

    def max(self, tensor: Tensor) -> Tensor:
        return self._reduced(tensor, dist.ReduceOp.MAX)

    def any(self, flags: Tensor) -> Tensor:
        return self._reduced(flags.to(torch.uint8), dist.ReduceOp.MAX).bool()

    def sums(self, *scalars: Tensor) -> tuple[Tensor, ...]:
        # In double: a count must come out exact, whatever it is summed with.
        packed = torch.stack([scalar.detach().to(self._device, torch.float64) for scalar in scalars])
        totals = self._reduced(packed, dist.ReduceOp.SUM)
        return tuple(total.to(scalar.dtype) for total, scalar in zip(totals, scalars, strict=True))

    def gather(self, tensor: Tensor) -> Tensor:
        own = tensor.detach().contiguous()
        parts = [torch.empty_like(own) for _ in range(self.world)]
        self._count(own)
        dist.all_gather(parts, own)
        return torch.cat(parts)

    def gather_ragged(self, tensor: Tensor, lengths: Sequence[int]) -> Tensor:
        padded = tensor.new_zeros(max(1, *lengths))
        padded[: len(tensor)] = tensor
        parts = self.gather(padded).view(self.world, -1)
        return torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)])

    def start_sum(self, *tensors: Tensor) -> Wait:
        works = []
        for tensor in tensors:
            assert tensor.is_contiguous()
            self._count(tensor)
            works.append(dist.all_reduce(tensor, async_op=True))

        def wait() -> None:
            for work in works:
                work.wait()

        return wait

    def on_first(self, action: Callable[[], None]) -> None:
        done = False
        try:
            if self.rank == 0:
                action()
            done = True
        finally:
            # Told even on the way out, lest the others wait for ever.
            failed = self._reduced(torch.tensor(int(not done), device=self._device), dist.ReduceOp.MAX)
        if failed:
            raise TsaeError(f"process {self.rank} of {self.world}: ends, because the first one could not go on")

    def _reduced(self, tensor: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
        total = tensor.detach().to(self._device, copy=True).contiguous()
        self._count(total)
        dist.all_reduce(total, operation)
        return total

    def _count(self, tensor: Tensor) -> None:
        self.bytes_handed += tensor.numel() * tensor.element_size()


def started_together(cpu: bool) -> Group:
    """The processes that torchrun, accelerate or a scheduler started with this one (as RANK, WORLD_SIZE, LOCAL_RANK and
    MASTER_ADDR in the environment tell); waits for them to meet. `cpu`: though there may be GPUs.
    """
    from accelerate import PartialState

    known = dist.is_initialized()
    state = PartialState(cpu=cpu)
    if state.num_processes == 1:
        return ALONE
    if not known:
        atexit.register(state.destroy_process_group)
    return Processes(state.device)


def starts(lengths: Sequence[int]) -> list[int]:
    """Where each of some runs, put together, begins; and the end."""
    return [0, *accumulate(lengths)]
