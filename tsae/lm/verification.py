"""What a hook point must give, found without nnsight: the model's own hidden states, or a plain forward hook."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tsae.lm.hook import hidden_of

if TYPE_CHECKING:
    from tsae.lm.model import LanguageModel


@torch.no_grad()
def expected_activations(lm: LanguageModel, inputs: dict[str, Any]) -> tuple[Tensor, str]:
    """[S, L, D] and its name: what reading must give for one batch."""
    if lm.layer is None:
        return _watch(lm, [lm.hook_path], inputs)[0][1], "the output of that module"
    if lm.layer + 1 < lm.n_layers:
        return _states(lm, inputs)[lm.layer + 1], f"hidden_states[{lm.layer + 1}]"
    # The model reports its last state after the final norm, which is one of the modules beside the list of blocks.
    last = _states(lm, inputs)[-1]
    holder = lm.hook_path.rpartition(".")[0].rpartition(".")[0]
    beside = [path for path, _ in lm.module.named_modules() if path and path.rpartition(".")[0] == holder]
    for taken, given in _watch(lm, beside, inputs):
        if isinstance(given, Tensor) and given.shape == last.shape and torch.equal(given, last):
            return taken, f"what becomes hidden_states[{lm.n_layers}] in the final norm"
    return last, f"hidden_states[{lm.n_layers}]"


def largest_difference(found: Tensor, expected: Tensor, lengths: Tensor) -> float:
    """The largest norm of the difference over the real positions, relative to the expected vector's; inf if shapes differ."""
    if found.shape != expected.shape:
        return float("inf")
    real = torch.arange(found.shape[1], device=found.device) < lengths.to(found.device)[:, None]
    difference = (found.float() - expected.float()).norm(dim=-1)[real]
    return float((difference / expected.float().norm(dim=-1)[real].clamp_min(1e-12)).max())


def _states(lm: LanguageModel, inputs: dict[str, Any]) -> tuple[Tensor, ...]:
    return lm.module(**inputs, output_hidden_states=True).hidden_states


def _watch(lm: LanguageModel, paths: list[str], inputs: dict[str, Any]) -> list[tuple[Any, Any]]:
    """(first input, output) of the modules at `paths`, in the order in which they run."""
    seen: list[tuple[Any, Any]] = []

    def hook(_module: Any, args: tuple[Any, ...], output: Any) -> None:
        seen.append((args[0] if args else None, hidden_of(output)))

    handles = [lm.module.get_submodule(path).register_forward_hook(hook) for path in paths]
    try:
        lm.module(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    return seen
