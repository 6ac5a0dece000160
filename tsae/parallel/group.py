"""The processes that work together: what one asks of the others, and how many bytes that costs.

Weights, and every number that decides something, are the same in all processes; batches, codes and residuals are a
process's own. Numbers that are summed here are summed in one order for all, so they stay the same to the last bit.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from tsae.runtime import preemption
from tsae.runtime.errors import TsaeError

Wait = Callable[[], None]
Result = TypeVar("Result")
PIECE_BYTES = 64 * 2**20


def lost(rank: int, world: int, error: Exception) -> TsaeError:
    """What a process says that cannot reach another one any more."""
    return TsaeError(
        f"process {rank} of {world}: ends, because another one has ended or cannot be reached "
        f"({reason_of(error)}); the same command continues"
    )


def reason_of(error: Exception) -> str:
    """The first sentence of a connection's error, without the line of C++ that it comes from."""
    first = (str(error).splitlines() or [type(error).__name__])[0]
    return re.sub(r"\[\S+:\d+\] ", "", first).partition(". ")[0]


class Group:
    """One process: every collective returns what it was given.

    Collectives must be called by all processes, in the same order. They raise TsaeError if a process has ended.
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

    def sums(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Sums over processes of several small tensors, in one collective."""
        return tensors

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

    def start_sum_at_owners(self, pieces: Sequence[Tensor]) -> Wait:
        """Begin to replace the piece of each process by its sum over processes, in that process; the others' are lost."""
        del pieces
        return lambda: None

    def start_spread(self, pieces: Sequence[Tensor]) -> Wait:
        """Begin to give every process the piece of each, as that process has it."""
        del pieces
        return lambda: None

    def collect_rows(self, own: Tensor, lengths: Sequence[int]) -> Tensor | None:
        """The rows [n, D] of all processes, in order of rank, in the first one's host memory; elsewhere none."""
        del lengths
        return own

    def start_any(self, flags: Sequence[bool]) -> Callable[[], list[bool]]:
        """Begin to ask whether each flag is set in some process; no GPU is waited for. Returns what waits for the answer."""
        return lambda: list(flags)

    def collect(self, value: Result) -> list[Result]:
        """Every process's value in order of rank, in the first process; elsewhere the list is empty."""
        return [value]

    def on_first(self, action: Callable[[], None]) -> None:
        """Call `action` in the first process alone; the others wait for it.

        Raises there TsaeError if it fails, and Preempted if it raises that.
        """
        action()

    def polled(self, items: Iterable[Result]) -> Iterator[Result]:
        """`items` until a process is asked to leave. Raises Preempted at the end in all of them if one was.

        At the end: whoever leaves earlier would keep the others waiting in what they do together next.
        """
        for item in items:
            if preemption.requested():
                break
            yield item
        if self.start_any([preemption.requested()])()[0]:
            raise preemption.Preempted

    def share(self, n: int) -> slice:
        """Where this process's rows lie among `n` rows a process, put together in order of rank."""
        return slice(self.rank * n, (self.rank + 1) * n)

    def turns(self, n: int, size: int) -> range:
        """Where this process's pieces begin if `n` things are dealt out in pieces of `size`, in turns."""
        return range(self.rank * size, n, self.world * size)

    def take_bytes(self) -> int:
        """Bytes handed over since the last call."""
        taken, self.bytes_handed = self.bytes_handed, 0
        return taken


ALONE = Group()


class Processes(Group):
    """The processes of torch.distributed's default group (gloo or nccl), each working on its own `device`.

    What needs no GPU goes through `control`, a group of its own on the host, where waiting may take long.
    """

    def __init__(self, device: torch.device | str = "cpu", control: dist.ProcessGroup | None = None) -> None:
        self.rank, self.world, self._device = dist.get_rank(), dist.get_world_size(), torch.device(device)
        self._control = control
        self.bytes_handed = 0

    def sum(self, tensor: Tensor) -> Tensor:
        return self._reduced(tensor, dist.ReduceOp.SUM)

    def mean(self, tensor: Tensor) -> Tensor:
        return self.sum(tensor) / self.world

    def max(self, tensor: Tensor) -> Tensor:
        return self._reduced(tensor, dist.ReduceOp.MAX)

    def any(self, flags: Tensor) -> Tensor:
        return self._reduced(flags.to(torch.uint8), dist.ReduceOp.MAX).bool()

    def sums(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        # In double: a count must come out exact, whatever it is summed with.
        packed = torch.cat([tensor.detach().to(self._device, torch.float64).flatten() for tensor in tensors])
        totals = self._reduced(packed, dist.ReduceOp.SUM).split([tensor.numel() for tensor in tensors])
        return tuple(total.to(one.dtype).view_as(one) for total, one in zip(totals, tensors, strict=True))

    def gather(self, tensor: Tensor) -> Tensor:
        own = tensor.detach().contiguous()
        parts = [torch.empty_like(own) for _ in range(self.world)]
        self._count(own)
        with self._reaching():
            dist.all_gather(parts, own)
        return torch.cat(parts)

    def gather_ragged(self, tensor: Tensor, lengths: Sequence[int]) -> Tensor:
        padded = tensor.new_zeros(max(1, *lengths))
        padded[: len(tensor)] = tensor
        parts = self.gather(padded).view(self.world, -1)
        return torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)])

    def start_sum(self, *tensors: Tensor) -> Wait:
        assert all(tensor.is_contiguous() for tensor in tensors)
        self._count(*tensors)
        with self._reaching():
            return self._wait_for([dist.all_reduce(tensor, async_op=True) for tensor in tensors])

    def start_sum_at_owners(self, pieces: Sequence[Tensor]) -> Wait:
        self._count(*pieces)
        with self._reaching():
            return self._wait_for([dist.reduce(piece, owner, async_op=True) for owner, piece in enumerate(pieces)])

    def start_spread(self, pieces: Sequence[Tensor]) -> Wait:
        self._count(pieces[self.rank])
        with self._reaching():
            return self._wait_for([dist.broadcast(piece, owner, async_op=True) for owner, piece in enumerate(pieces)])

    def collect_rows(self, own: Tensor, lengths: Sequence[int]) -> Tensor | None:
        with self._reaching():
            if self.rank > 0:
                for piece in _pieces(own):
                    dist.send(piece, 0)
                return None
            parts = [own.cpu()]
            for owner in range(1, self.world):
                whole = own.new_empty(lengths[owner], *own.shape[1:], device="cpu")
                for piece in _pieces(whole):
                    received = torch.empty_like(piece, device=own.device)
                    dist.recv(received, owner)
                    piece.copy_(received)
                parts.append(whole)
        return torch.cat(parts)

    def start_any(self, flags: Sequence[bool]) -> Callable[[], list[bool]]:
        told = torch.tensor(flags, dtype=torch.uint8)
        with self._reaching():
            done = self._wait_for([dist.all_reduce(told, dist.ReduceOp.MAX, group=self._control, async_op=True)])

        def answer() -> list[bool]:
            done()
            return [bool(flag) for flag in told]

        return answer

    def collect(self, value: Result) -> list[Result]:
        found: list[Any] = [None] * self.world if self.rank == 0 else []
        with self._reaching():
            dist.gather_object(value, found or None, group=self._control)
        return found

    def on_first(self, action: Callable[[], None]) -> None:
        done = preempted = False
        try:
            if self.rank == 0:
                action()
            done = True
        except preemption.Preempted:
            preempted = True
            raise
        finally:
            # Told even on the way out, lest the others wait for ever.
            failed, leaves = self.start_any([not done, preempted])()
        if leaves:
            raise preemption.Preempted
        if failed:
            raise TsaeError(f"process {self.rank} of {self.world}: ends, because the first one could not go on")

    def part(self) -> None:
        """Let go of `control`; nothing can be asked of the others after that."""
        self._control = None

    def _reduced(self, tensor: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
        total = tensor.detach().to(self._device, copy=True).contiguous()
        self._count(total)
        with self._reaching():
            dist.all_reduce(total, operation)
        return total

    def _wait_for(self, works: Sequence[dist.Work | None]) -> Wait:
        def wait() -> None:
            with self._reaching():
                for work in works:
                    assert work is not None
                    work.wait()

        return wait

    @contextmanager
    def _reaching(self) -> Iterator[None]:
        """Turn the error of a connection into the line that a user can read."""
        try:
            yield
        except RuntimeError as error:
            raise lost(self.rank, self.world, error) from error

    def _count(self, *tensors: Tensor) -> None:
        self.bytes_handed += sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _pieces(rows: Tensor) -> tuple[Tensor, ...]:
    """A matrix in pieces that a GPU has room for beside its work."""
    return rows.split(max(1, PIECE_BYTES // (rows[:1].numel() * rows.element_size() or 1)))


def in_turns(shares: Sequence[Sequence[Result]]) -> list[Result]:
    """What processes made of pieces that they took in turns (see `Group.turns`), in the order of the pieces."""
    most = max(map(len, shares), default=0)
    return [share[turn] for turn in range(most) for share in shares if turn < len(share)]


def starts(lengths: Sequence[int]) -> list[int]:
    """Where each of some runs, put together, begins; and the end."""
    return [0, *accumulate(lengths)]
