"""tsae: Temporal Sparse Autoencoders on a cluster or a laptop."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tsae.checkpoint import load_dictionary
    from tsae.config.run import RunConfig
    from tsae.evaluation.driver import evaluate
    from tsae.interop.attach import attach, load
    from tsae.lm.model import load_language_model
    from tsae.runtime.errors import TsaeError
    from tsae.store.harvest import harvest
    from tsae.store.importing import import_arrays
    from tsae.store.pairs import PairStream
    from tsae.store.reader import Store
    from tsae.training.run import train
    from tsae.training.trainer import Trainer

__version__ = "0.1.0"

# Public names load on first use: `import tsae` and the command's --help must not wait for torch.
_HOMES = {
    "PairStream": "tsae.store.pairs",
    "RunConfig": "tsae.config.run",
    "Store": "tsae.store.reader",
    "Trainer": "tsae.training.trainer",
    "TsaeError": "tsae.runtime.errors",
    "attach": "tsae.interop.attach",
    "evaluate": "tsae.evaluation.driver",
    "harvest": "tsae.store.harvest",
    "import_arrays": "tsae.store.importing",
    "load": "tsae.interop.attach",
    "load_dictionary": "tsae.checkpoint",
    "load_language_model": "tsae.lm.model",
    "train": "tsae.training.run",
}

__all__ = [
    "PairStream",
    "RunConfig",
    "Store",
    "Trainer",
    "TsaeError",
    "attach",
    "evaluate",
    "harvest",
    "import_arrays",
    "load",
    "load_dictionary",
    "load_language_model",
    "train",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'tsae' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
