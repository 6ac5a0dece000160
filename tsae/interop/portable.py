"""A dictionary as plain numbers: four architectures cover every class, whatever a library calls them.

    standard  relu(z)      jumprelu  z where z > threshold      topk  the k largest of relu(z) for each token
    gated     relu(exp(r_mag) z' + b_mag) where z' + b_gate > 0

with z = z' + b_enc and z' = (x - b_dec) W_enc if `centred`, else x W_enc. Tensor names are SAELens'.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tsae.runtime.errors import TsaeError
from tsae.sae.dictionary import UNCALIBRATED, Dictionary, top_k

NORM_TOLERANCE = 1e-5
"""Largest distance of a decoder row's norm from 1 that SAEBench still calls normalised."""

BIASES = {"standard": ("b_enc",), "topk": ("b_enc",), "jumprelu": ("b_enc",), "gated": ("b_gate", "b_mag")}


class Portable(NamedTuple):
    """An architecture and its tensors: `W_enc` [D, F], `W_dec` [F, D], `b_dec` [D], the others [F]."""

    architecture: str
    centred: bool
    k: int | None
    tensors: dict[str, Tensor]


def portable(dictionary: Dictionary, where: str) -> Portable:
    """The numbers of a dictionary under its inference rule. Raises TsaeError while it is not calibrated."""
    dictionary.require_calibrated(where)

    def tensors(*names: str) -> dict[str, Tensor]:
        return {name: getattr(dictionary, name).detach().cpu() for name in ("W_enc", "b_enc", "W_dec", "b_dec", *names)}

    centred = dictionary.centre_input
    match dictionary.encode_rule:
        case "relu":
            return Portable("standard", centred, None, tensors())
        case "latent thresholds":
            return Portable("jumprelu", centred, None, tensors("threshold"))
        case "threshold":
            named = tensors("threshold")
            named["threshold"] = named["threshold"].expand(dictionary.dict_size).clone()
            return Portable("jumprelu", centred, None, named)
        case "top_k":
            return Portable("topk", centred, int(dictionary.get_buffer("k")), tensors())
        case "gate":
            named = tensors("r_mag", "mag_bias")
            named |= {"b_gate": named.pop("b_enc"), "b_mag": named.pop("mag_bias")}
            return Portable("gated", centred, None, named)
        case other:
            raise TsaeError(f"{where}: {type(dictionary).__name__} encodes by '{other}', for which no format is known")


def has_unit_rows(form: Portable) -> bool:
    """Whether every decoder row has norm 1."""
    return float((form.tensors["W_dec"].norm(dim=1) - 1).abs().max()) <= NORM_TOLERANCE


def with_unit_rows(form: Portable, where: str) -> Portable:
    """The same reconstructions from decoder rows of norm 1: each latent takes its row's norm as a factor.

    Rows that are already unit are left untouched. Raises TsaeError for top-k, where factors change which latents are
    kept, and for empty rows.
    """
    if has_unit_rows(form):
        return form
    norms = form.tensors["W_dec"].norm(dim=1)
    if form.architecture == "topk":
        raise TsaeError(
            f"{where}: decoder rows have norms from {float(norms.min()):.3g} to {float(norms.max()):.3g}; "
            "scaling them to 1 would change which latents a top-k keeps"
        )
    if not bool((norms > 0).all()):
        empty = torch.nonzero(norms == 0).flatten().tolist()
        raise TsaeError(f"{where}: the decoder rows of latents {empty[:5]} are zero and cannot be given norm 1")
    tensors = dict(form.tensors)
    tensors["W_dec"] = tensors["W_dec"] / norms[:, None]
    # A gate opens at the sign of its pre-activation, which a positive factor leaves alone.
    for name in ("W_enc", *BIASES[form.architecture], *(("threshold",) if "threshold" in tensors else ())):
        tensors[name] = tensors[name] * norms
    return form._replace(tensors=tensors)


def recentred(form: Portable, centred: bool) -> Portable:
    """The same dictionary with the input centred, or not: the difference moves into the encoder's biases."""
    if form.centred == centred:
        return form
    # In double precision, so that only the result is rounded.
    shift = form.tensors["b_dec"].double() @ form.tensors["W_enc"].double() * (1 if centred else -1)
    tensors = dict(form.tensors)
    for name in BIASES[form.architecture]:
        factor = tensors["r_mag"].double().exp() if name == "b_mag" else 1.0
        tensors[name] = (tensors[name].double() + shift * factor).float()
    return form._replace(centred=centred, tensors=tensors)


def state_dict(
    cls: type[Dictionary], form: Portable, k: int | None, group_sizes: Sequence[int] | None
) -> dict[str, Tensor]:
    """The state dict of the reference's class `cls`, for a form that encodes as `cls` does."""
    attributes = dict(form.tensors)
    if form.architecture == "gated":
        attributes |= {"b_enc": attributes.pop("b_gate"), "mag_bias": attributes.pop("b_mag")}
    attributes.setdefault("threshold", torch.tensor(UNCALIBRATED))
    attributes["k"] = torch.tensor(k or 0, dtype=torch.int32)
    attributes["group_size_tensor"] = torch.tensor(list(group_sizes or ()), dtype=torch.int64)
    state = {}
    for key, attribute in cls.file_tensors.items():
        name, _, transposed = attribute.partition(".")
        state[key] = attributes[name].T if transposed else attributes[name]
    return state


def encode(form: Portable, x: Tensor) -> Tensor:
    """The definition at the head of this file, on activations x [..., D]; codes are [..., F]."""
    tensors = form.tensors
    shared = (x - tensors["b_dec"] if form.centred else x) @ tensors["W_enc"]
    if form.architecture == "gated":
        return torch.relu(tensors["r_mag"].exp() * shared + tensors["b_mag"]) * (shared + tensors["b_gate"] > 0)
    pre = shared + tensors["b_enc"]
    if form.architecture == "jumprelu":
        return torch.relu(pre) * (pre > tensors["threshold"])
    return torch.relu(pre) if form.k is None else top_k(torch.relu(pre), form.k)
