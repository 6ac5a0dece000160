"""What can be timed: this package's two engines, the floor under both, and other libraries.

Other libraries step through their public interfaces, each on its closest algorithm. They know no temporal term: they get
the current tokens of the pairs [B, D] and encode half as many activations. What their own loops do in a step (projection,
clipping, bookkeeping) is done here; their data loading and logging is not.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from importlib import metadata
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

import torch
from einops import rearrange
from torch import Tensor

from tsae.bench.shape import Shape, is_paired, moments
from tsae.config.sections import KIND_SETTINGS
from tsae.runtime.errors import TsaeError, suggestion

PEER_STEPS = 1_000_000
FLOOR_BYTES = 256 * 2**20
OWN = {
    "sparse": "gradients at the selected entries only; float32 numbers, by way of a bfloat16 screen where that is fast",
    "sparse-float32": "the same with a float32 encoder product everywhere",
    "dense": "autograd through dense codes, the reference's algorithm",
}
PRECISION = {"sparse": "exact", "sparse-float32": "float32", "dense": "float32"}
TF32 = "+tf32"
"""After a contestant's name: with float32 products that a GPU may round to TF32, as some trainers ask for."""
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
    a library; any of them with `+tf32`.

    Raises TsaeError for an unknown name, ImportError if the library is not installed.
    """
    if name.endswith(TF32):
        torch.backends.cuda.matmul.allow_tf32 = True
        contestant = build(name.removesuffix(TF32), shape)
        contestant.algorithm += ", products in TF32"
        return contestant
    if name == "sparse+state":
        return Saving(shape)
    engine, _, kind = name.partition(":")
    if engine in OWN:
        return Own(shape, engine, kind or shape.kind)
    known: dict[str, Callable[[Shape], Contestant]] = {"floor": Floor, **PEERS}
    if name not in known:
        raise TsaeError(f"--against: {name!r} is not known; {suggestion(name, known)}known: {', '.join(PEERS)}")
    return known[name](shape)


class Own:
    """A step of this package's trainer."""

    def __init__(self, shape: Shape, engine: str, kind: str) -> None:
        from tsae.training.trainer import Trainer

        self.library, self._paired = "tsae", is_paired(kind)
        rounded = engine == "sparse" and shape.dtype == "bfloat16"
        precision = "bf16" if rounded else PRECISION[engine]
        config = shape.run_config("dense" if engine == "dense" else "sparse", kind, precision)
        self.trainer = Trainer(config, shape.activation_dim, device=shape.device, moments=moments(shape))
        self.trainer.dictionary.to(getattr(torch, shape.weights))
        self.algorithm = f"{kind} SAE, {IN_BFLOAT16 if rounded else OWN[engine]}"
        self.encoded = shape.batch_size * shape.halves_of(kind)
        self.state_bytes = state_bytes(self.trainer.dictionary)
        self._dead = torch.zeros(0, dtype=torch.long, device=shape.device)
        if shape.dead:
            self._dead = torch.randperm(shape.dict_size)[: int(shape.dead * shape.dict_size)].to(shape.device)

    def step(self, batch: Tensor) -> None:
        """One update; latents that should be dead have been silent for long."""
        trainer = self.trainer
        if len(self._dead):
            if trainer.steps_done == 1:
                # Few pre-activations exceed this one: a bias lower by that keeps a latent silent.
                with torch.no_grad():
                    strong = trainer.dictionary.pre_activations(batch[:32, 0]).amax(dim=1).median()
                trainer.dictionary.b_enc.data[self._dead] -= strong
            trainer.set_silent(self._dead, trainer.settings.dead_after)
        trainer.step(batch if self._paired else batch[:, 0])


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
    """The one product that exact training cannot avoid: on a GPU that is the screen's."""

    def __init__(self, shape: Shape) -> None:
        screened = shape.dtype == "float32" and shape.device != "cpu"
        dtype = torch.bfloat16 if screened else getattr(torch, shape.dtype)
        self.library = "torch"
        self.state_bytes = shape.dict_size * shape.activation_dim * dtype.itemsize
        self.algorithm = f"the encoder product alone, in {str(dtype).removeprefix('torch.')}" + (
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


class Peer:
    """A library's step on single tokens."""

    def __init__(
        self, shape: Shape, package: str, algorithm: str, update: Callable[[Tensor], Any], module: Any
    ) -> None:
        self.library = f"{package} {metadata.version(package)}"
        self.algorithm, self.encoded, self._update = algorithm, shape.batch_size, update
        self.state_bytes = state_bytes(module)

    def step(self, batch: Tensor) -> None:
        self._update(batch[:, 0])


def sae_lens(shape: Shape) -> Peer:
    """SAELens: `SAETrainer.step` of its Matryoshka batch-top-k SAE, or of its batch-top-k SAE."""
    from sae_lens import (
        BatchTopKTrainingSAE,
        BatchTopKTrainingSAEConfig,
        MatryoshkaBatchTopKTrainingSAE,
        MatryoshkaBatchTopKTrainingSAEConfig,
    )
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    sizes = {"d_in": shape.activation_dim, "d_sae": shape.dict_size, "k": shape.k}
    place = {"device": shape.device, "dtype": shape.weights}
    if nested(shape):
        widths = list(accumulate(shape.run_config("sparse").sae.group_sizes))
        sae = MatryoshkaBatchTopKTrainingSAE(
            MatryoshkaBatchTopKTrainingSAEConfig(**sizes, **place, matryoshka_widths=widths)
        )
    else:
        sae = BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(**sizes, **place))
    settings = SAETrainerConfig(
        total_training_samples=PEER_STEPS * shape.batch_size,
        train_batch_size_samples=shape.batch_size,
        lr_end=3e-5,
        device=shape.device,
    )
    trainer = SAETrainer(settings, sae, iter(()))

    def update(x: Tensor) -> None:
        trainer.step(x)
        trainer.n_training_steps += 1

    return Peer(shape, "sae-lens", f"{_kind(shape)} SAE, dense, single tokens", update, sae)


def dictionary_learning(shape: Shape) -> Peer:
    """dictionary_learning: `update` of its Matryoshka batch-top-k trainer, or of its batch-top-k trainer."""
    from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
    from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer

    options: dict[str, Any] = {"activation_dim": shape.activation_dim, "dict_size": shape.dict_size, "k": shape.k}
    options |= {"steps": PEER_STEPS, "layer": 0, "lm_name": "none", "device": shape.device}
    if nested(shape):
        fractions = shape.run_config("sparse").sae.fractions
        trainer = MatryoshkaBatchTopKTrainer(**options, group_fractions=list(fractions))
    else:
        trainer = BatchTopKTrainer(**options)
    trainer.ae.to(getattr(torch, shape.weights))
    # From step 1 on: step 0 also computes the geometric median.
    algorithm = f"{_kind(shape)} SAE, dense, single tokens"
    return Peer(shape, "dictionary-learning", algorithm, lambda x: trainer.update(1, x), trainer.ae)


def sparsify(shape: Shape) -> Peer:
    """sparsify: its `SparseCoder`, and around it what its trainer does in a step, with Adam.

    Its trainer itself runs a language model, and has no batch-top-k and no nested groups.
    """
    if not shape.device.startswith("cuda"):
        # Where Triton is installed it takes its kernels, which need a GPU; this is its own switch.
        os.environ["SPARSIFY_DISABLE_TRITON"] = "1"
    from sparsify import SparseCoder, SparseCoderConfig

    config = SparseCoderConfig(num_latents=shape.dict_size, k=shape.k)
    coder = SparseCoder(shape.activation_dim, config, device=shape.device, dtype=getattr(torch, shape.weights))
    optimizer = torch.optim.Adam(coder.parameters(), lr=2e-4, fused=True)
    silent = torch.zeros(shape.dict_size, dtype=torch.long, device=shape.device)

    def update(x: Tensor) -> None:
        coder.set_decoder_norm_to_unit_norm()
        output = coder(x, dead_mask=None)
        output.fvu.backward()
        coder.remove_gradient_parallel_to_decoder_directions()
        torch.nn.utils.clip_grad_norm_(coder.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        silent.add_(len(x))
        silent[output.latent_indices.flatten()] = 0

    return Peer(shape, "eai-sparsify", "top-k SAE (k of each token), sparse gradients, single tokens", update, coder)


PEERS: dict[str, Callable[[Shape], Peer]] = {
    "sae_lens": sae_lens,
    "sparsify": sparsify,
    "dictionary_learning": dictionary_learning,
}

INSTALL = {"sae_lens": "sae-lens", "sparsify": "eai-sparsify", "dictionary_learning": "dictionary-learning"}
"""What the libraries are called in the package index."""


def own_equivalent(name: str, shape: Shape) -> str:
    """This package's contestant that does what library `name` does."""
    if name == "sparsify":
        return "sparse:topk"
    return "sparse:matryoshka" if nested(shape) else "sparse:batch_topk"


def nested(shape: Shape) -> bool:
    """Whether the kind reconstructs from nested groups."""
    return shape.kind in KIND_SETTINGS and KIND_SETTINGS[shape.kind].grouped


def _kind(shape: Shape) -> str:
    return "Matryoshka batch-top-k" if nested(shape) else "batch-top-k"


def state_bytes(module: torch.nn.Module) -> int:
    """Bytes of the parameters, four times: weight, gradient and the two moments of Adam."""
    return 4 * sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())
