"""What can be timed: this package's two engines, the floor under both, and other libraries."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch
from einops import rearrange
from torch import Tensor

from tsae.bench import peers
from tsae.bench.shape import Shape, halves_of
from tsae.runtime.errors import TsaeError, suggestion

FLOOR_BYTES = 256 * 2**20
OWN = {
    "sparse": "gradients at the selected entries only; float32 numbers, by way of a bfloat16 screen where that is fast",
    "sparse-float32": "the same with a float32 encoder product everywhere",
    "dense": "autograd through dense codes, the reference's algorithm",
}
PRECISION = {"sparse": "exact", "sparse-float32": "float32", "dense": "float32"}
IN_BFLOAT16 = "gradients at the selected entries only; the encoder product is rounded to bfloat16: other numbers"


class Contestant(Protocol):
    """One way to do a step; made in a process of its own."""

    library: str
    algorithm: str
    """What one step computes, in words."""
    encoded: int
    """Activations that a step encodes."""
    state_bytes: int
    """Weights, gradients and both Adam moments; of the floor the weights alone."""

    def step(self, batch: Tensor) -> None:
        """Train on a batch of pairs [B, 2, D], or on what it needs of them."""


def build(name: str, shape: Shape) -> Contestant:
    """Contestant `name`: `sparse`, `sparse-float32` or `dense` (another kind after a colon), `sparse+state`, `floor`, or
    a library.

    Raises TsaeError for an unknown name, ImportError if the library is not installed.
    """
    if name == "sparse+state":
        return Saving(shape)
    engine, _, kind = name.partition(":")
    if engine in OWN:
        return Own(shape, engine, kind or shape.kind)
    known: dict[str, Callable[[Shape], Contestant]] = {"floor": Floor, **peers.PEERS}
    if name not in known:
        raise TsaeError(f"--against: {name!r} is not known; {suggestion(name, known)}known: {', '.join(peers.PEERS)}")
    return known[name](shape)


class Own:
    """A step of this package's trainer."""

    def __init__(self, shape: Shape, engine: str, kind: str) -> None:
        from tsae.training.trainer import Trainer

        self.library, self._halves = "tsae", halves_of(kind)
        rounded = engine == "sparse" and shape.dtype == "bfloat16"
        precision = "bf16" if rounded else PRECISION[engine]
        config = shape.run_config("dense" if engine == "dense" else "sparse", kind, precision)
        self.trainer = Trainer(config, shape.activation_dim, device=shape.device)
        self.trainer.dictionary.to(getattr(torch, shape.weights))
        self.algorithm = f"{kind} SAE, {IN_BFLOAT16 if rounded else OWN[engine]}"
        self.encoded = shape.batch_size * self._halves
        self.state_bytes = peers.state_bytes(self.trainer.dictionary)
        self._dead = torch.zeros(0, dtype=torch.long, device=shape.device)
        if shape.dead:
            self._dead = torch.randperm(shape.dict_size)[: int(shape.dead * shape.dict_size)].to(shape.device)

    def step(self, batch: Tensor) -> None:
        """One update; latents that should be dead have been silent for long."""
        trainer = self.trainer
        if len(self._dead):
            if trainer.steps_done == 1:
                trainer.dictionary.b_enc.data[self._dead] -= self._strong_activation(batch)
            trainer.tokens_since_fired[self._dead] = trainer.settings.dead_after
        trainer.step(batch if self._halves == 2 else batch[:, 0])

    @torch.no_grad()
    def _strong_activation(self, batch: Tensor) -> Tensor:
        """What few pre-activations exceed: a bias lower by that keeps a latent silent."""
        return self.trainer.dictionary.pre_activations(batch[:32, 0]).amax(dim=1).median()


class Saving(Own):
    """A step after which a resumable state is written and waited for; a training goes on meanwhile."""

    def __init__(self, shape: Shape) -> None:
        # Needs more than torch, which is all that another library's environment has.
        from tsae.training.resume import ResumeStates

        super().__init__(shape, "sparse", shape.kind)
        self.algorithm += ", and after every step a resumable state is written and waited for"
        self._folder = tempfile.TemporaryDirectory(prefix="tsae-bench-")
        self._states = ResumeStates(Path(self._folder.name), {}, keep=2)

    def step(self, batch: Tensor) -> None:
        super().step(batch)
        self._states.save(self.trainer.steps_done, self.trainer.state(), first=lambda: None)
        self._states.wait()


class Floor:
    """The one product that exact training cannot avoid."""

    def __init__(self, shape: Shape) -> None:
        dtype = getattr(torch, shape.dtype)
        self.library = "torch"
        self.state_bytes = shape.dict_size * shape.activation_dim * dtype.itemsize
        self.algorithm = f"the encoder product alone, in {shape.dtype}" + (
            ", of both halves of the pairs" if shape.halves == 2 else ""
        )
        self.encoded = shape.batch_size * shape.halves
        # Laid out latent by latent, as in a dictionary.
        self._weight = torch.randn(shape.dict_size, shape.activation_dim, device=shape.device, dtype=dtype).T
        rows = max(512, FLOOR_BYTES // (shape.dict_size * dtype.itemsize))
        self._out = torch.empty(min(rows, self.encoded), shape.dict_size, device=shape.device, dtype=dtype)
        self._halves = shape.halves

    def step(self, batch: Tensor) -> None:
        """x @ W_enc in blocks of rows, large ones: the speed of a single product, without its memory."""
        for x in rearrange(batch[:, : self._halves], "b half d -> (half b) d").split(len(self._out)):
            torch.mm(x.to(self._weight.dtype), self._weight, out=self._out[: len(x)])
