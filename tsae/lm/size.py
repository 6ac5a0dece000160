"""How large a language model is, as far as its files tell without loading it."""

from __future__ import annotations

import json
from math import prod
from pathlib import Path
from typing import NamedTuple

from tsae.config.sections import ModelConfig
from tsae.lm.source import DEPTH_KEYS, in_cache, known_config, local_path, number_in, weights_in

WIDTH_KEYS = ("hidden_size", "n_embd", "d_model", "dim")
INNER_KEYS = ("intermediate_size", "n_inner", "ffn_dim", "d_ff")
ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}


class ModelSize(NamedTuple):
    """Of a language model, what decides bytes."""

    width: int
    """D, the size of the residual stream."""
    parameters: int
    vocabulary: int


KNOWN = {
    "google/gemma-2-2b": ModelSize(2304, 2_614_341_888, 256_000),
    "EleutherAI/pythia-160m": ModelSize(768, 162_322_944, 50_304),
    "HuggingFaceTB/SmolLM2-135M": ModelSize(576, 134_515_008, 49_152),
}
"""The models of the shipped bases, for a plan on a machine that has not fetched them."""


def size_of(model: ModelConfig) -> ModelSize | None:
    """The size of a model that is here, or that a shipped base has; None for any other.

    Parameters are counted in its safetensors, or else follow from its configuration, roughly.
    """
    config = known_config(model)
    if config is None:
        return KNOWN.get(model.name)
    width, blocks = number_in(config, WIDTH_KEYS), number_in(config, DEPTH_KEYS)
    if width is None or blocks is None:
        return None
    vocabulary = number_in(config, ("vocab_size",)) or 0
    inner = number_in(config, INNER_KEYS) or 4 * width
    # Attention and a gated MLP; embeddings once.
    roughly = blocks * (4 * width**2 + 3 * width * inner) + vocabulary * width
    place = local_path(model)
    cached = in_cache(model) if place is None else None
    folder = cached.parent if cached is not None else place
    counted = _counted(weights_in(folder)) if folder is not None and folder.is_dir() else 0
    return ModelSize(width, counted or roughly, vocabulary)


def _counted(files: list[Path]) -> int:
    """Numbers in safetensors files, by their headers; 0 for others."""
    total = 0
    for file in files:
        if file.suffix != ".safetensors":
            return 0
        with open(file, "rb") as stream:
            try:
                header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
            except (ValueError, MemoryError):
                return 0  # damaged: loading will say so
        total += sum(prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")
    return total
