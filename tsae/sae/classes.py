"""From names and tensors of a file to a dictionary: the class is looked up, and every tensor is accounted for."""

from __future__ import annotations

import torch
from torch import Tensor

from tsae.runtime.errors import TsaeError, suggestion
from tsae.sae.architectures import (
    AutoEncoder,
    AutoEncoderNew,
    AutoEncoderTopK,
    BatchTopKSAE,
    GatedAutoEncoder,
    JumpReluAutoEncoder,
    MatryoshkaBatchTopKSAE,
    TemporalMatryoshkaBatchTopKSAE,
)
from tsae.sae.dictionary import Dictionary, ThresholdDictionary

CLASSES: dict[str, type[Dictionary]] = {
    cls.__name__: cls
    for cls in (
        AutoEncoder,
        AutoEncoderNew,
        GatedAutoEncoder,
        JumpReluAutoEncoder,
        AutoEncoderTopK,
        BatchTopKSAE,
        MatryoshkaBatchTopKSAE,
        TemporalMatryoshkaBatchTopKSAE,
    )
}


def dictionary_class(name: object, where: str) -> type[Dictionary]:
    """The class a file's `dict_class` names. Raises TsaeError for an unknown one."""
    if not isinstance(name, str) or name not in CLASSES:
        raise TsaeError(
            f"{where}: dict_class {name!r} is unknown; {suggestion(name, CLASSES)}known: {', '.join(CLASSES)}"
        )
    return CLASSES[name]


def from_state(name: object, state: dict[str, Tensor], k: int | None, where: str) -> Dictionary:
    """A dictionary of class `name` around the tensors of a reference state dict (shared, not copied).

    Raises TsaeError if the tensors are not those of the class, or if `k` (of the config) disagrees with the file.
    """
    cls = dictionary_class(name, where)
    cls.check_names(state, where)
    key = "W_dec" if "W_dec" in state else "decoder.weight"
    if state[key].ndim != 2:
        raise TsaeError(f"{where}: {key} has shape {tuple(state[key].shape)}; a matrix is expected")
    dict_size, activation_dim = state[key].shape if key == "W_dec" else state[key].T.shape
    arguments: list[object] = [activation_dim, dict_size]
    if issubclass(cls, ThresholdDictionary):
        arguments.append(_agreed_k(state["k"], k, dict_size, where))
    if issubclass(cls, MatryoshkaBatchTopKSAE):
        arguments.append(_group_sizes(state["group_sizes"], dict_size, where))
    with torch.device("meta"):
        dictionary = cls(*arguments)  # type: ignore[arg-type]
    dictionary.from_file(state, where)
    return dictionary


def _agreed_k(stored: Tensor, k: int | None, dict_size: int, where: str) -> int:
    if stored.numel() != 1 or not 0 < int(stored) <= dict_size:
        raise TsaeError(f"{where}: k is {stored.tolist()}; one number from 1 to {dict_size} (the latents) is expected")
    if k is not None and int(stored) != k:
        raise TsaeError(f"{where}: k is {int(stored)} in the weights and {k} in config.json; one of them is wrong")
    return int(stored)


def _group_sizes(stored: Tensor, dict_size: int, where: str) -> list[int]:
    sizes: list[int] = stored.flatten().tolist()
    if stored.ndim != 1 or not sizes or min(sizes) <= 0 or sum(sizes) != dict_size:
        raise TsaeError(
            f"{where}: group_sizes are {stored.tolist()}; positive numbers that sum to the {dict_size} latents are expected"
        )
    return sizes


def random_dictionary(name: str, activation_dim: int, dict_size: int, seed: int = 0) -> Dictionary:
    """A dictionary of class `name` with random weights, biases and thresholds; for tests of files and formats."""
    cls = dictionary_class(name, "random_dictionary")
    arguments: list[object] = [activation_dim, dict_size]
    if issubclass(cls, ThresholdDictionary):
        arguments.append(max(1, dict_size // 16))
    if issubclass(cls, MatryoshkaBatchTopKSAE):
        high = max(1, dict_size // 5)
        arguments.append([high, dict_size - high])
    dictionary = cls(*arguments)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(dict_size, activation_dim, generator=generator)
    rows /= rows.norm(dim=1, keepdim=True)
    dictionary.W_dec.data = rows
    mixed = rows + 0.1 * torch.randn(dict_size, activation_dim, generator=generator) / activation_dim**0.5
    dictionary.W_enc.data = mixed.T
    for parameter in dictionary.parameters():
        if parameter.ndim == 1:
            parameter.data = 0.1 * torch.randn(len(parameter), generator=generator)
    threshold = getattr(dictionary, "threshold", None)
    if threshold is not None:
        threshold.data = 0.2 + 0.3 * torch.rand(threshold.shape, generator=generator)
    return dictionary.eval().requires_grad_(False)
