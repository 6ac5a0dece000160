"""Which module of a language model is read, and what its reading is held against."""

from __future__ import annotations

import difflib
from typing import Any

import torch
from torch import Tensor, nn

from tsae.config.sections import ModelConfig
from tsae.lm.families import module_of_lens
from tsae.runtime.errors import TsaeError

TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 3e-2}
"""Largest relative difference of two readings of one activation vector that still counts as the same."""
PROOF_LENGTH = 16


def find_hook(module: nn.Module, model: ModelConfig, depth: int) -> str:
    """The path of the module to read: `model.hook_point`, or block `model.layer`. Raises TsaeError."""
    if model.hook_point is None:
        if model.layer not in range(depth):
            raise TsaeError(f"model.layer: {model.layer} is impossible; {model.name} has blocks 0 to {depth - 1}")
        return f"{find_blocks(module, depth)}.{model.layer}"
    paths = [path for path, _ in module.named_modules() if path]
    architecture = str(getattr(getattr(module, "config", None), "model_type", ""))
    path = module_of_lens(model.hook_point, architecture) or model.hook_point
    if path not in paths:
        near = difflib.get_close_matches(path, paths, n=3, cutoff=0.0)
        raise TsaeError(f"model.hook_point: {model.name} has no module {path!r}; the nearest are {', '.join(near)}")
    return path


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


def hook_size(module: nn.Module, path: str, tokens: Tensor, name: str) -> int:
    """Run tokens [S, L] through the model called `name` and return the size D of what the module at `path` gives.

    Raises TsaeError unless the model runs, and the module once, giving a float tensor [S, L, D].
    """
    try:
        seen, _ = watch(module, [path], {"input_ids": tokens, "use_cache": False})
    except Exception as error:  # whatever the model's own code makes of a configuration that contradicts itself
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise TsaeError(
            f"model.name: {name} is loaded but cannot run: {reason[:300]}; mostly its config.json contradicts itself"
        ) from error
    if len(seen) != 1:
        raise TsaeError(
            f"model.hook_point: {path} runs {len(seen)} times in a forward pass; name a module that runs once, "
            "such as a block, its mlp or its attention"
        )
    hidden = seen[0][2]
    if not isinstance(hidden, Tensor) or hidden.shape[:-1] != tokens.shape or not hidden.is_floating_point():
        given = f"shape {list(hidden.shape)}" if isinstance(hidden, Tensor) else type(hidden).__name__
        raise TsaeError(
            f"model.hook_point: {path} gives {given} for {list(tokens.shape)} tokens; name a module that gives one "
            "vector for each token"
        )
    return hidden.shape[-1]


def proof_rows(vocabulary: int, positions: int | None) -> Tensor:
    """[L + 1, L] tokens: a row twice, and the same row with every token changed from each position on but the first."""
    length = min(PROOF_LENGTH, positions or PROOF_LENGTH)
    row = torch.randint(vocabulary, (length,), generator=torch.Generator().manual_seed(0))
    changed = torch.arange(length) >= torch.tensor([length, length, *range(1, length)])[:, None]
    return torch.where(changed, (row + vocabulary // 2) % vocabulary, row)


def first_not_finite(module: nn.Module, inputs: dict[str, Any], real: Tensor) -> str | None:
    """The path of the module whose output is the first, in the order of running, to be NaN or infinite at a `real`
    [S, L] position.
    """
    paths = [path for path, _ in module.named_modules() if path]
    for path, _, output in watch(module, paths, inputs)[0]:
        is_stream = isinstance(output, Tensor) and output.ndim == 3 and output.shape[:2] == real.shape
        if is_stream and not output[real].isfinite().all():
            return path
    return None


def expected_reading(
    module: nn.Module, path: str, layer: int | None, inputs: dict[str, Any]
) -> tuple[Tensor, str, Tensor]:
    """[S, L, D] and its name: what reading `path` must give, found without nnsight: the model's own hidden states after
    block `layer`, or what a plain forward hook sees; and the scores [S, L, V].

    The last entry of `hidden_states` is final-normed, so there the last block's output is traced through the norm.
    """
    if layer is None:
        seen, output = watch(module, [path], inputs)
        return seen[0][2], "the output of that module", output.logits
    blocks = path.rpartition(".")[0]
    holder = blocks.rpartition(".")[0]
    beside = [name for name, _ in module.named_modules() if name and name.rpartition(".")[0] == holder]
    seen, output = watch(module, [f"{blocks}.0", *beside], {**inputs, "output_hidden_states": True})
    states = output.hidden_states
    first = next(given for name, _, given in seen if name == f"{blocks}.0")
    # Most models begin with the embedding, some (mamba, rwkv) with what their first block gives.
    place = layer if _same(first, states[0]) else layer + 1
    if place < len(states) - 1:
        return states[place], f"hidden_states[{place}]", output.logits
    # The final norm is one of the modules beside the list of blocks.
    for _, taken, given in seen:
        if _same(given, states[-1]):
            return taken, f"what becomes hidden_states[{place}] in the final norm", output.logits
    return states[-1], f"hidden_states[{place}]", output.logits


def largest_difference(found: Tensor, expected: Tensor) -> float:
    """The largest of `differences`; infinite if the shapes differ."""
    return float(differences(found, expected).max()) if found.shape == expected.shape else float("inf")


def differences(found: Tensor, expected: Tensor) -> Tensor:
    """[S, L] norms of the differences of [S, L, D], relative to those of the expected vectors."""
    expected = expected.to(found.device)
    difference = (found.float() - expected.float()).norm(dim=-1)
    return difference / expected.float().norm(dim=-1).clamp_min(1e-12)


def _same(one: Any, two: Tensor) -> bool:
    return isinstance(one, Tensor) and one.shape == two.shape and torch.equal(one, two)


def watch(module: nn.Module, paths: list[str], inputs: dict[str, Any]) -> tuple[list[tuple[str, Any, Any]], Any]:
    """(path, first input, output) of the modules at `paths`, in the order in which they are done; and the model's output."""
    seen: list[tuple[str, Any, Any]] = []

    def watch(path: str) -> Any:
        def hook(_module: Any, args: tuple[Any, ...], output: Any) -> None:
            seen.append((path, args[0] if args else None, hidden_of(output)))

        return module.get_submodule(path).register_forward_hook(hook)

    handles = [watch(path) for path in paths]
    try:
        output = module(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    return seen, output
