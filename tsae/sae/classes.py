"""The dictionary classes of the field that this package trains, under the names their files carry."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from tsae.errors import TsaeError, suggestion
from tsae.sae.dictionary import Dictionary, ThresholdDictionary


class BatchTopKSAE(ThresholdDictionary):
    """BatchTopK SAE (Bussmann et al. 2024, arXiv 2412.06410)."""

    file_tensors: ClassVar[dict[str, str]] = {
        "b_dec": "b_dec",
        "k": "k",
        "threshold": "threshold",
        "decoder.weight": "W_dec.T",
        "encoder.weight": "W_enc.T",
        "encoder.bias": "b_enc",
    }


class MatryoshkaBatchTopKSAE(ThresholdDictionary):
    """BatchTopK SAE with nested groups of latents (Bussmann et al. 2025, arXiv 2503.17547)."""

    file_tensors: ClassVar[dict[str, str]] = {
        "W_enc": "W_enc",
        "b_enc": "b_enc",
        "W_dec": "W_dec",
        "b_dec": "b_dec",
        "k": "k",
        "threshold": "threshold",
        "group_sizes": "group_size_tensor",
    }

    def __init__(self, activation_dim: int, dict_size: int, k: int, group_sizes: Sequence[int]) -> None:
        super().__init__(activation_dim, dict_size, k)
        if sum(group_sizes) != dict_size or min(group_sizes) <= 0:
            raise TsaeError(f"group sizes {tuple(group_sizes)} are not positive numbers that sum to {dict_size}")
        self.register_buffer("group_size_tensor", torch.tensor(list(group_sizes), dtype=torch.int64))

    @property
    def group_sizes(self) -> tuple[int, ...]:
        """Latents per group."""
        return tuple(int(size) for size in self.group_size_tensor)


class TemporalMatryoshkaBatchTopKSAE(MatryoshkaBatchTopKSAE):
    """Temporal SAE (Bhalla & Oesterling et al. 2025, arXiv 2511.05541): a Matryoshka SAE in every file and at inference,
    whose first group was trained to agree between neighbouring tokens."""


CLASSES: dict[str, type[Dictionary]] = {
    cls.__name__: cls for cls in (BatchTopKSAE, MatryoshkaBatchTopKSAE, TemporalMatryoshkaBatchTopKSAE)
}


def dictionary_class(name: object, where: str) -> type[Dictionary]:
    """The class a file's `dict_class` names. Raises TsaeError for an unknown one."""
    if name not in CLASSES:
        raise TsaeError(
            f"{where}: dict_class {name!r} is unknown; {suggestion(name, CLASSES)}known: {', '.join(CLASSES)}"
        )
    return CLASSES[str(name)]


def from_state(name: object, state: dict[str, Tensor], k: int | None, where: str) -> Dictionary:
    """A dictionary of class `name` around the tensors of a reference state dict.

    Raises TsaeError if the tensors are not those of the class, or if `k` (of the config) disagrees with the file.
    """
    cls = dictionary_class(name, where)
    shaped = state.get("W_dec", state.get("decoder.weight"))
    if shaped is None or shaped.ndim != 2:
        raise TsaeError(f"{where}: holds no decoder matrix; it is not the weights of a {cls.__name__}")
    dict_size, activation_dim = shaped.shape if "W_dec" in state else shaped.shape[::-1]
    arguments: list[object] = [activation_dim, dict_size]
    if issubclass(cls, ThresholdDictionary):
        stored = state.get("k")
        if stored is not None and k is not None and int(stored) != k:
            raise TsaeError(f"{where}: k is {int(stored)} in the weights and {k} in config.json; one of them is wrong")
        arguments.append(int(stored) if stored is not None else k or 0)
    if issubclass(cls, MatryoshkaBatchTopKSAE):
        sizes = state.get("group_sizes")
        arguments.append(sizes.tolist() if sizes is not None and sizes.ndim == 1 else [dict_size])
    with torch.device("meta"):
        dictionary = cls(*arguments)  # type: ignore[arg-type]
    dictionary.from_file(state, where)
    return dictionary
