"""The update of the weights, a cache-full of latents at a time: projection and norm, then clipping, Adam, unit rows.

Each number is what the plain sequence of whole-matrix operations gives, up to rounding; but the tensors of a weight
matrix (weight, two moments, perhaps a gradient) are far larger than any cache, and going through them is what costs. So
a gradient is whole, or made a few rows at a time, when they are updated; and where there are kernels, one of them does
all of it to a row at once.

Every process updates all latents, or (`training.shard: optimizer`) each its own share. With shares, a process keeps
Adam's moments of its own latents alone; gradients are summed where they are needed, and after the update every process
gets everybody's rows: ZeRO, stage 1 (Rajbhandari et al. 2020, section 5.1). torch's ZeroRedundancyOptimizer deals out
whole parameters, of which a dictionary has only two that count.

Shapes: F dict_size, D activation_dim, N rows of inputs, n entries. Matrices are latent by latent: [F, D].
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from types import ModuleType
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding_bag
from torch.optim.adam import adam

from tsae.parallel.group import ALONE, Group, Wait
from tsae.runtime.phases import phase
from tsae.sae.dictionary import EPSILON, Dictionary, normalise_rows
from tsae.sae.sparse import ByLatent, kernels_for

DECODER, OTHERS = "W_dec", "all but W_dec"
"""Names of the sums over processes of gradients."""
MOMENTS = ("exp_avg", "exp_avg_sq")
TINY = 1e-6
"""What is added to the norm of a row of the decoder before anything is divided by it, as in the reference."""
CHUNK_BYTES, CUDA_CHUNK_BYTES = 4 * 2**20, 256 * 2**20
"""Bytes of a matrix that are worked on at a time."""


class Shard:
    """All latents: every process makes the same update, from the sums of all gradients.

    Matrices are kept latent by latent: contiguous [F, D], or [D, F] as the transpose of that.
    """

    def __init__(self, group: Group = ALONE) -> None:
        self._group = group
        self._waits: defaultdict[str, list[Wait]] = defaultdict(list)

    def start_sum(self, key: str, *gradients: Tensor) -> None:
        """Begin to sum gradients, matrices as [F, D], over processes; they may be used after `wait(key)`."""
        self._waits[key].append(self._group.start_sum(*gradients))

    def wait(self, key: str) -> None:
        """Return when the sums that were begun under this name, if any, are there."""
        for wait in self._waits.pop(key, []):
            wait()

    def part(self, tensor: Tensor) -> Tensor:
        """The part of a parameter, or of its like, that this process updates."""
        return tensor

    def whole(self, part: Tensor, parameter: Tensor) -> Tensor | None:
        """All processes' parts of the like of a parameter, in the first process; elsewhere they may be missing."""
        del parameter
        return part

    def start_spread(self, parameter: Tensor) -> Wait:
        """Begin to give every process the parameter as the owners of its parts updated it."""
        del parameter
        return _nothing

    def norm(self, matrices: Sequence[Tensor], vectors: Sequence[Tensor]) -> Tensor:
        """The norm of everything, from norms of this process's parts of the matrices and of the vectors."""
        return torch.linalg.vector_norm(torch.stack([*matrices, *vectors]))


class LatentShares(Shard):
    """This process's share of `dict_size` latents; vectors, which are small, are everybody's."""

    def __init__(self, group: Group, dict_size: int) -> None:
        super().__init__(group)
        bounds = [dict_size * rank // group.world for rank in range(group.world + 1)]
        self._dict_size = dict_size
        self._lengths = [stop - start for start, stop in pairwise(bounds)]
        self._latents = slice(bounds[group.rank], bounds[group.rank + 1])

    def start_sum(self, key: str, *gradients: Tensor) -> None:
        waits = self._waits[key]
        waits.append(self._group.start_sum(*(gradient for gradient in gradients if gradient.ndim < 2)))
        for matrix in gradients:
            if matrix.ndim > 1:
                waits.append(self._group.start_sum_at_owners(matrix.split(self._lengths)))

    def part(self, tensor: Tensor) -> Tensor:
        if tensor.ndim < 2:
            return tensor
        return tensor[self._latents] if self._rows_first(tensor) else tensor[:, self._latents]

    def whole(self, part: Tensor, parameter: Tensor) -> Tensor | None:
        if part.ndim < 2:
            return part
        first = self._rows_first(parameter)
        rows = self._group.collect_rows(part if first else part.T, self._lengths)
        return rows if first or rows is None else rows.T

    def start_spread(self, parameter: Tensor) -> Wait:
        if parameter.ndim < 2:
            return _nothing
        rows = parameter if self._rows_first(parameter) else parameter.T
        return self._group.start_spread(rows.split(self._lengths))

    def norm(self, matrices: Sequence[Tensor], vectors: Sequence[Tensor]) -> Tensor:
        of_parts, shared = (torch.stack(list(norms)).double().square().sum() for norms in (matrices, vectors))
        return (self._group.sum(of_parts) + shared).sqrt().to(matrices[0].dtype)

    def _rows_first(self, matrix: Tensor) -> bool:
        return len(matrix) == self._dict_size and matrix.is_contiguous()


EVERYTHING = Shard()
"""What one process updates."""


def _nothing() -> None:
    """There is nothing to wait for."""


class Gradient(Protocol):
    """The gradient of a vector, or of a matrix latent by latent."""

    def measure(self, weights: Tensor | None) -> list[Tensor]:
        """Norms of its pieces. With the matrix `weights` [F, D], whose gradient this is, first takes out of each row what
        would only change the norm of the matrix's row.
        """

    def chunk(self, first: int, weights: Tensor, factor: Tensor) -> Tensor:
        """`factor` times its rows from `first` on, as many as in this piece of the parameter; new ones.

        The piece must be as it was in `measure`.
        """


Gradients = Mapping[Tensor, Gradient]
"""The gradient of each parameter that has one."""


class WholeGradient:
    """A gradient in memory; on a CPU `measure` does its work there."""

    def __init__(self, gradient: Tensor) -> None:
        self._gradient = by_latent(gradient)
        self._along: Tensor | None = None
        """How much of the weights' rows is still in it [F]."""

    def measure(self, weights: Tensor | None) -> list[Tensor]:
        if weights is None:
            return [torch.linalg.vector_norm(self._gradient)]
        kernels = kernels_for(weights)
        if kernels is not None:
            self._along, of_rows = kernels.along_and_norm(self._gradient, weights, TINY)
            return [torch.linalg.vector_norm(of_rows)]
        norms = []
        for gradient, rows in zip(chunks(self._gradient), chunks(weights), strict=True):
            gradient.addcmul_(rows, _along(gradient, rows)[:, None], value=-1)
            norms.append(torch.linalg.vector_norm(gradient))
        return norms

    def chunk(self, first: int, weights: Tensor, factor: Tensor) -> Tensor:
        rows = slice(first, first + len(weights))
        gradient = self._gradient[rows] * factor
        if self._along is not None:
            gradient.addcmul_(weights, (self._along[rows] * factor)[:, None], value=-1)
        return gradient

    def update(self, kernels: ModuleType, weights: Tensor, **settings: Any) -> None:
        """Adam's step on weights like this, by `kernels.adam`."""
        kernels.adam(weights, self._gradient, self._along, **settings)


class DenseRows(NamedTuple):
    """Some rows of a matrix."""

    latents: Tensor
    """Which ones [m], ascending."""
    rows: Tensor
    """[m, D]"""


class RowSums:
    """The gradient of a matrix as what it is: each latent's sum over its entries of value · x[row].

    The sums are made twice, for the norm and for the update, and never stored: they take less time than a matrix of
    their size takes to be written and read, and few latents have entries at all.
    """

    def __init__(self, entries: ByLatent, values: Tensor, x: Tensor, added: DenseRows | None) -> None:
        """Of `values` [n], in the order in which they were before they were sorted by latent, and x [N, D].

        `added` is a part of the gradient that is no such sum.
        """
        self._entries, self._values, self._x, self._added = entries, values[entries.order], x, added
        self._along: Tensor | None = None

    def measure(self, weights: Tensor | None) -> list[Tensor]:
        live = self._entries.offsets.diff() > 0
        if self._added is not None:
            live.index_fill_(0, self._added.latents, True)
        if weights is not None:
            self._along = self._x.new_zeros(len(live))
        places = live.nonzero()[:, 0]
        norms = []
        for start in range(0, len(places), chunk_rows(self._x)):
            latents = places[start : start + chunk_rows(self._x)]
            gradient = self._rows(latents)
            if weights is not None and self._along is not None:
                rows = weights[latents]
                self._along[latents] = _along(gradient, rows)
                gradient.addcmul_(rows, self._along[latents, None], value=-1)
            norms.append(torch.linalg.vector_norm(gradient))
        return norms

    def chunk(self, first: int, weights: Tensor, factor: Tensor) -> Tensor:
        stop = first + len(weights)
        gradient = self._rows(torch.arange(first, stop), factor)
        if self._along is not None:
            gradient.addcmul_(weights, (self._along[first:stop] * factor)[:, None], value=-1)
        return gradient

    @phase("weight gradients")
    def _rows(self, latents: Tensor, factor: Tensor | float = 1.0) -> Tensor:
        """`factor` times the rows of some latents [m], which ascend and leave out none between them that has entries."""
        first, last = int(latents[0]), int(latents[-1])
        entries = slice(int(self._entries.offsets[first]), int(self._entries.offsets[last + 1]))
        rows = embedding_bag(
            self._entries.rows[entries],
            self._x,
            self._entries.offsets[latents] - entries.start,
            mode="sum",
            per_sample_weights=self._values[entries] * factor,
        )
        if self._added is not None:
            start, stop = torch.searchsorted(self._added.latents, latents.new_tensor([first, last + 1])).tolist()
            places = torch.searchsorted(latents, self._added.latents[start:stop])
            rows.index_add_(0, places, self._added.rows[start:stop] * factor)
        return rows


def whole_gradients(module: nn.Module, part: Callable[[Tensor], Tensor]) -> Gradients:
    """What autograd left in the parameters' `.grad`; of each what `part` takes of it."""
    return {
        parameter: WholeGradient(part(parameter.grad))
        for parameter in module.parameters()
        if parameter.grad is not None
    }


def _along(gradient: Tensor, weights: Tensor) -> Tensor:
    """How much of the row of the weights [n, D] there is in each row of the gradient [n, D] → [n]."""
    return (gradient * weights).sum(dim=1) / (weights.norm(dim=1) + TINY).square()


def by_latent(parameter: Tensor) -> Tensor:
    """A vector as it is; a matrix, or its like, that is laid out by latent as [F, D]."""
    if parameter.ndim < 2:
        return parameter
    rows = parameter if parameter.is_contiguous() else parameter.T
    assert rows.is_contiguous()
    return rows


def chunks(tensor: Tensor) -> tuple[Tensor, ...]:
    """Views of a vector, whole, or of a matrix, a few latents each."""
    return (tensor,) if tensor.ndim < 2 else by_latent(tensor).split(chunk_rows(by_latent(tensor)))


def chunk_rows(matrix: Tensor) -> int:
    """Rows of a matrix to work on at a time: what a core's cache holds; on CUDA so many that launches are few."""
    limit = CUDA_CHUNK_BYTES if matrix.is_cuda else CHUNK_BYTES
    return max(1, limit // (matrix.shape[1] * matrix.element_size()))


def lay_out_by_latent(dictionary: Dictionary) -> None:
    """Make each latent's weights one run of memory in both matrices, as in a fresh dictionary; files know other orders."""
    dictionary.W_enc.data = dictionary.W_enc.data.T.contiguous().T
    dictionary.W_dec.data = dictionary.W_dec.data.contiguous()


@phase("projection and norm")
@torch.no_grad()
def project_and_measure(
    dictionary: Dictionary, gradients: Gradients, unit_rows: bool, shard: Shard = EVERYTHING
) -> Tensor:
    """The gradient's norm over all parameters.

    With `unit_rows`, first takes out of each decoder row's gradient what would only change the row's norm. That is
    done while the encoder's gradient is still being summed over processes.
    """
    decoder = dictionary.W_dec
    shard.wait(DECODER)
    matrices = list(gradients[decoder].measure(by_latent(shard.part(decoder.data)) if unit_rows else None))
    vectors: list[Tensor] = []
    shard.wait(OTHERS)
    for parameter, gradient in gradients.items():
        if parameter is not decoder:
            norms = matrices if parameter.ndim > 1 else vectors
            norms += gradient.measure(None)
    return shard.norm(matrices, vectors)


def _undecorated(method: Any) -> Any:
    """Without what hides a method from torch's compiler: that imports the compiler, which takes as long as torch."""
    return getattr(method, "__wrapped__", method)


class Adam(torch.optim.Adam):
    """torch's Adam, its state included, with the clipping before it and the normalisation after it.

    Moments and updates are of the process's own part of each parameter, as `shard` says.
    """

    add_param_group = _undecorated(torch.optim.Adam.add_param_group)
    state_dict = _undecorated(torch.optim.Adam.state_dict)
    load_state_dict = _undecorated(torch.optim.Adam.load_state_dict)

    def __init__(self, *parameters: Any, shard: Shard = EVERYTHING, **options: Any) -> None:
        super().__init__(*parameters, **options)
        self._shard = shard

    @phase("optimizer")
    @torch.no_grad()
    def update(self, gradients: Gradients, norm: Tensor, clip_norm: float, normalised: Tensor | None) -> None:
        """One step on gradients of the given norm, clipped to `clip_norm`; scales the rows of `normalised` to norm 1."""
        waits, steps = [], []
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter in gradients:
                    self._update(parameter, gradients[parameter], group, norm, clip_norm, parameter is normalised)
                    waits.append(self._shard.start_spread(parameter.data))
                    steps.append(self.state[parameter]["step"])
        torch._foreach_add_(steps, 1)
        for wait in waits:
            wait()

    def _update(
        self,
        parameter: Tensor,
        gradient: Gradient,
        group: dict[str, Any],
        norm: Tensor,
        clip_norm: float,
        unit_rows: bool,
    ) -> None:
        part, state = self._shard.part(parameter.data), self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), device=parameter.device)
            for name in MOMENTS:
                state[name] = torch.zeros_like(part, memory_format=torch.preserve_format)
        tensors = (part, *(state[name] for name in MOMENTS))
        beta1, beta2 = group["betas"]
        kernels = kernels_for(part)
        if kernels is not None and isinstance(gradient, WholeGradient):
            rows, *moments = map(by_latent, tensors)
            gradient.update(
                kernels, rows, moments=moments, norm=norm, clip_norm=clip_norm, steps=state["step"],
                lr=group["lr"], betas=group["betas"], epsilon=group["eps"],
                unit=EPSILON if unit_rows else None,
            )  # fmt: skip
            return
        done, factor = 0, (clip_norm / (norm + 1e-6)).clamp_max(1.0)
        for rows, first, second in zip(*map(chunks, tensors), strict=True):
            clipped = gradient.chunk(done, rows, factor)
            done += len(rows)
            # The function counts the step itself, once for every call.
            adam(
                [rows], [clipped], [first], [second], [], [state["step"].clone()],
                fused=True, amsgrad=False, beta1=beta1, beta2=beta2, lr=group["lr"],
                weight_decay=group["weight_decay"], eps=group["eps"], maximize=False,
            )  # fmt: skip
            if unit_rows:
                normalise_rows(rows)

    def whole_state(self) -> dict[str, Any]:
        """The state of all processes, in the first one, whoever updates what; all of them call this."""
        state = self.state_dict()
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        whole = {
            index: {**kept, **{name: self._shard.whole(kept[name], parameters[index]) for name in MOMENTS}}
            for index, kept in state["state"].items()
        }
        return {**state, "state": whole}

    def load_whole_state(self, state: dict[str, Any]) -> None:
        """Continue from this process's part of what `whole_state()` returned."""
        parts = {
            index: {name: self._shard.part(value).clone() for name, value in kept.items()}
            for index, kept in state["state"].items()
        }
        self.load_state_dict({**state, "state": parts})
