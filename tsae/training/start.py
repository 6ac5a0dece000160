"""Training that begins with the weights of another run (`training.init_from`), widened where it has more latents."""

from __future__ import annotations

from itertools import accumulate

import torch
from torch import Tensor

from tsae.checkpoint import load_dictionary
from tsae.config.run import RunConfig, initial_weights
from tsae.runtime.contents import sha256_of
from tsae.runtime.errors import TsaeError
from tsae.sae.dictionary import Dictionary
from tsae.sae.kinds import KINDS, from_state


def load_start(config: RunConfig, activation_dim: int) -> Dictionary | None:
    """The dictionary of `training.init_from`, for raw activations; None where training begins afresh.

    Raises TsaeError if it is not the one that the configuration was made with, or cannot become one of its latents.
    """
    name = config.training.init_from
    if name is None:
        return None
    weights = initial_weights(name, "training.init_from")
    if sha256_of(weights) != config.training.init_sha256:
        raise TsaeError(
            f"training.init_from: {weights} has other weights than training.init_sha256 says: it has changed since this run "
            "was begun; put those weights back, or begin a run of another name"
        )
    dictionary, _ = load_dictionary(weights.parent, calibrated=False)
    wanted = KINDS[config.sae.kind].dictionary
    if type(dictionary) is not wanted:
        raise TsaeError(
            f"training.init_from: {name} is a {type(dictionary).__name__}; sae.kind: {config.sae.kind} trains a {wanted.__name__}"
        )
    if dictionary.activation_dim != activation_dim:
        raise TsaeError(
            f"training.init_from: {name} reads activations of {dictionary.activation_dim} dimensions; the store's have {activation_dim}"
        )
    there, here = tuple(dictionary.group_sizes), config.sae.group_sizes
    if len(there) != len(here) or any(old > new for old, new in zip(there, here, strict=True)):
        raise TsaeError(
            f"training.init_from: {name} has groups of {list(there)} latents, this run of {list(here)}; each of as many groups "
            "must be at least as large"
        )
    return dictionary


def begin_with(fresh: Dictionary, start: Dictionary, scale: float, shift: Tensor | None) -> None:
    """Give `fresh`, for activations in units of `scale` about -`shift`, the latents of `start`, for raw ones, in place.

    Each group's come first in their group. The others stay as they are, about the decoder's bias that was given.
    """
    inverse = start.to_file(1 / scale, None if shift is None else -shift / scale)
    given = from_state(type(start).__name__, inverse, None, "training.init_from")
    firsts = [0, *accumulate(fresh.group_sizes)]
    place = torch.cat(
        [torch.arange(first, first + size) for first, size in zip(firsts, start.group_sizes, strict=False)]
    )
    new = torch.ones(fresh.dict_size, dtype=torch.bool)
    new[place] = False
    with torch.no_grad():
        for name, mine in fresh.named_parameters():
            theirs = given.get_parameter(name)
            if name == "b_dec":
                mine.copy_(theirs)
            else:
                mine.index_copy_(mine.ndim - 1 if name == "W_enc" else 0, place, theirs)
        if not fresh.centre_input:
            fresh.b_enc[new] = -fresh.b_dec @ fresh.W_enc[:, new]
