"""Hook points: where in any Hugging Face causal LM activations are read, and the shapes that modules give back."""

from __future__ import annotations

import difflib
from typing import Any

from torch import Tensor, nn

from tsae.config.sections import ModelConfig
from tsae.runtime.errors import TsaeError


def find_hook(module: nn.Module, model: ModelConfig, depth: int) -> str:
    """The path of the module to read: `model.hook_point`, or block `model.layer`. Raises TsaeError."""
    if model.hook_point is None:
        if model.layer >= depth:
            raise TsaeError(f"model.layer: {model.layer} is impossible; {model.name} has blocks 0 to {depth - 1}")
        return f"{find_blocks(module, depth)}.{model.layer}"
    paths = [path for path, _ in module.named_modules() if path]
    if model.hook_point not in paths:
        near = difflib.get_close_matches(model.hook_point, paths, n=3, cutoff=0.0)
        raise TsaeError(
            f"model.hook_point: {model.name} has no module {model.hook_point!r}; the nearest are {', '.join(near)}"
        )
    return model.hook_point


def find_blocks(module: nn.Module, depth: int) -> str:
    """The path of the list of blocks: of the module lists with `depth` members, the one with the most parameters."""
    lists = {
        path: sum(parameter.numel() for parameter in part.parameters())
        for path, part in module.named_modules()
        if isinstance(part, nn.ModuleList) and len(part) == depth
    }
    if not lists:
        raise TsaeError(
            f"model: no list of {depth} blocks in {type(module).__name__}; name a module in model.hook_point"
        )
    return max(lists, key=lambda path: lists[path])


def hidden_of(output: Any) -> Any:
    """The activations in what a module returns: a tensor, or the first member of a tuple (attention, older blocks)."""
    return output[0] if type(output) in (tuple, list) and output else output


def with_hidden(output: Any, hidden: Tensor) -> Any:
    """What a module returned, with its activations exchanged."""
    return type(output)([hidden, *output[1:]]) if type(output) in (tuple, list) else hidden


def probe(module: nn.Module, path: str, tokens: Tensor) -> int:
    """Run a few tokens [S, L] through the model and return the size D of what the module at `path` gives.

    Raises TsaeError unless the module runs exactly once and gives a float tensor [S, L, D].
    """
    seen: list[Any] = []
    handle = module.get_submodule(path).register_forward_hook(lambda *call: seen.append(hidden_of(call[-1])))
    try:
        module(input_ids=tokens, use_cache=False)
    finally:
        handle.remove()
    if len(seen) != 1:
        raise TsaeError(
            f"model.hook_point: {path} runs {len(seen)} times in a forward pass; name a module that runs once, "
            "such as a block, its mlp or its attention"
        )
    hidden = seen[0]
    if not isinstance(hidden, Tensor) or hidden.shape[:-1] != tokens.shape or not hidden.is_floating_point():
        given = f"shape {list(hidden.shape)}" if isinstance(hidden, Tensor) else type(hidden).__name__
        raise TsaeError(
            f"model.hook_point: {path} gives {given} for {list(tokens.shape)} tokens; name a module that gives one "
            "vector for each token"
        )
    return hidden.shape[-1]
