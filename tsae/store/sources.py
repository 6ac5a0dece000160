"""Where a harvest's activations come from: a language model that reads text, or a synthetic world."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from tsae.config.run import RunConfig
from tsae.data.contexts import Contexts
from tsae.store.layout import StoreLayout


class Source(Protocol):
    """What a harvest asks of its source."""

    activation_dim: int
    identity: dict[str, Any]
    """What tells it from any other source; a store that another one began is refused."""
    packages: tuple[str, ...]
    """Packages whose versions decide the numbers."""
    batch_size: int
    """Sequences read at a time."""

    def contexts(self) -> Contexts:
        """All sequences."""

    def extras(self) -> dict[str, np.ndarray]:
        """Arrays kept beside the activations, by the names of `layout.EXTRAS`."""

    def read(self, layout: StoreLayout, sequences: range) -> Tensor:
        """Activations [S, L, D] of consecutive sequences of the store."""


def open_source(config: RunConfig) -> Source:
    """The source of a run's activations; loads the language model unless the run is synthetic."""
    return SyntheticSource(config) if config.is_synthetic else LanguageModelSource(config)


class LanguageModelSource:
    """Text through a language model."""

    packages: tuple[str, ...] = ("torch", "transformers", "tokenizers", "nnsight")

    def __init__(self, config: RunConfig) -> None:
        from tsae.lm.model import load_language_model

        self._lm, self._data, self._checked = load_language_model(config.model), config.data, False
        self.activation_dim, self.identity = self._lm.activation_dim, self._lm.identity
        self.batch_size = config.model.batch_size

    def contexts(self) -> Contexts:
        """The text, cut into contexts."""
        from tsae.data.contexts import make_contexts
        from tsae.data.documents import read_documents

        return make_contexts(read_documents(self._data), self._lm.tokenizer, self._data)

    def extras(self) -> dict[str, np.ndarray]:
        """Nothing more is known of a language model."""
        return {}

    def read(self, layout: StoreLayout, sequences: range) -> Tensor:
        """Activations [S, L, D]. Raises TsaeError if the first ones are not what the hook point promises."""
        rows = slice(sequences.start, sequences.stop)
        tokens = torch.from_numpy(layout.tokens[rows]).long()
        lengths = torch.from_numpy(layout.lengths[rows]).long()
        if not self._checked:
            self._lm.verify_hook(tokens, lengths)
            self._checked = True
        return self._lm.read(tokens, lengths)


class SyntheticSource:
    """A synthetic world, whose truth about the held-out sequences is kept beside them."""

    packages: tuple[str, ...] = ("numpy",)

    def __init__(self, config: RunConfig) -> None:
        from tsae.data import synthetic

        self._world = synthetic.World.of(config)
        self.activation_dim = config.synthetic.activation_dim
        kinds = list(config.synthetic.group_names)
        self.identity = {"name": "synthetic", "version": synthetic.VERSION, "feature_kinds": kinds}
        self.batch_size = synthetic.BLOCK

    def contexts(self) -> Contexts:
        """Sequences without text."""
        return self._world.contexts()

    def extras(self) -> dict[str, np.ndarray]:
        """Directions, kinds and held-out activations of the true features."""
        truth = self._world.truth()
        return {
            "truth_directions": truth.directions,
            "truth_group": truth.group,
            "truth_features": truth.features,
        }

    def read(self, layout: StoreLayout, sequences: range) -> Tensor:
        """Activations [S, L, D]."""
        del layout  # the world needs no tokens
        return torch.from_numpy(self._world.read(sequences)[1])
