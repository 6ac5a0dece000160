"""Training steps of other libraries, through their public interfaces, each on its closest algorithm.

They know no temporal term: they get the current tokens of the pairs [B, D] and encode half as many activations. What
their own loops do in a step (projection, clipping, bookkeeping) is done here; their data loading and logging is not.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib import metadata
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from tsae.bench.shape import Shape
from tsae.config.sections import KIND_SETTINGS

STEPS = 1_000_000


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
        total_training_samples=STEPS * shape.batch_size,
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

    options: dict[str, Any] = {
        "steps": STEPS,
        "activation_dim": shape.activation_dim,
        "dict_size": shape.dict_size,
        "k": shape.k,
        "layer": 0,
        "lm_name": "none",
        "device": shape.device,
    }
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
