"""Any Hugging Face causal language model, read and changed at one hook point through nnsight.

Rows are right-padded. Since attention is causal, what follows a real position cannot change it, so no attention mask is
given: the fast kernels need none, and numbers do not depend on the padding.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tsae.config.sections import ModelConfig
from tsae.lm.source import local_folder, weights_fingerprint
from tsae.runtime.environment import own_device
from tsae.runtime.errors import TsaeError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

TOLERANCE = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 3e-2}
"""Largest relative difference of two readings of one activation vector that still counts as the same."""


class LanguageModel:
    """A causal LM with one hook point; it never computes gradients.

    `tokens` are [S, L] integers and `lengths` [S] counts of real tokens, on any device; results are on `device`, in the
    model's precision, and meaningless at pad positions.
    """

    def __init__(self, module: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, model: ModelConfig) -> None:
        from nnsight import NNsight

        self.module = module.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        text_config = module.config.get_text_config()
        self.n_layers: int = text_config.num_hidden_layers
        self.max_length: int | None = getattr(text_config, "max_position_embeddings", None)
        self.vocabulary = int(module.get_input_embeddings().get_parameter("weight").shape[0])
        self.layer: int | None = model.layer if model.hook_point is None else None
        self.hook_path = find_hook(module, model, self.n_layers)
        with torch.no_grad():
            self.activation_dim = probe(module, self.hook_path, torch.zeros(2, 3, dtype=torch.long, device=self.device))
        self._traced = NNsight(module)
        target = module.get_submodule(self.hook_path)
        # Looked up by identity: nnsight renames modules whose name is one of its own attributes.
        self._hook = next(envoy for envoy in self._traced.modules() if envoy._module is target)
        self.identity = _identity(self, model)

    @property
    def device(self) -> torch.device:
        """Where the model runs."""
        return self.module.device

    def read(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """[S, L, D] activations at the hook point; nothing after it is computed."""
        inputs = self._inputs(tokens, lengths)
        with torch.no_grad(), self._traced.trace(**inputs) as tracer:
            output = self._hook.output.save()
            tracer.stop()
        return hidden_of(output)

    def logits(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """[S, L, V] next-token scores."""
        with torch.no_grad():
            return self.module(**self._inputs(tokens, lengths)).logits

    def splice(self, tokens: Tensor, lengths: Tensor, replace: Callable[[Tensor], Tensor]) -> Tensor:
        """[S, L, V] next-token scores when the activations [S, L, D] at the hook point are exchanged by `replace`."""

        def exchanged(output: Any) -> Any:
            hidden = hidden_of(output)
            new = replace(hidden)
            if new.shape != hidden.shape:
                raise ValueError(f"replace gave shape {list(new.shape)} for activations of shape {list(hidden.shape)}")
            return with_hidden(output, new.to(hidden))

        inputs = self._inputs(tokens, lengths)
        with torch.no_grad(), self._traced.trace(**inputs):
            self._hook.output = exchanged(self._hook.output)
            logits = self._traced.output.logits.save()
        return logits  # noqa: RET504 - only names that were saved inside a trace outlive it

    def generate(self, tokens: Tensor, length: int, replace: Callable[[Tensor], Tensor], **options: Any) -> Tensor:
        """[S, L + length] tokens: rows without padding, continued while `replace` exchanges the activations of every step.

        The first step gives `replace` the prompt's activations [S, L, D], each later one those of the newest token
        [S, 1, D]. No row ends early. `options` go to `PreTrainedModel.generate`, such as `do_sample`.
        """
        room = self.max_length
        if room is not None and tokens.shape[1] + length > room:
            raise TsaeError(
                f"model: a prompt of {tokens.shape[1]} tokens and {length} more are impossible; "
                f"{self.identity['name']} has {room} positions"
            )

        def exchanged(output: Any) -> Any:
            hidden = hidden_of(output)
            return with_hidden(output, replace(hidden).to(hidden))

        inputs: dict[str, Any] = {"input_ids": tokens.long().to(self.device), "use_cache": True}
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        # Rows of one length are never padded, but generation asks for a token to do it with.
        ids = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0)
        pad = next(int(token) for token in ids if token is not None)
        limits = {"max_new_tokens": length, "min_new_tokens": length, "pad_token_id": pad}
        generate = self.module.generate
        with torch.no_grad(), self._traced.trace(fn=generate, **inputs, **limits, **options) as tracer:
            for _ in tracer.iter[:length]:
                self._hook.output = exchanged(self._hook.output)
            continued = tracer.result.save()
        return continued  # noqa: RET504 - only names that were saved inside a trace outlive it

    def verify_hook(self, tokens: Tensor, lengths: Tensor) -> None:
        """Prove on a batch that `read` gives the model's own `hidden_states[layer + 1]`, or what the named module gives.

        The last block's entry of that tuple is final-normed, so there the raw output is traced through the norm.
        Raises TsaeError with the largest relative difference.
        """
        found = self.read(tokens, lengths)
        with torch.no_grad():
            expected, what = _expected_activations(self, self._inputs(tokens, lengths))
        difference = _largest_difference(found, expected, lengths)
        if not difference <= TOLERANCE[str(self.module.dtype).removeprefix("torch.")]:
            raise TsaeError(
                f"model: what is read at {self.hook_path} is not {what} (relative difference {difference:.2g}); "
                "name the module to read in model.hook_point"
            )

    def _inputs(self, tokens: Tensor, lengths: Tensor) -> dict[str, Any]:
        """Keyword arguments of the forward pass; pad positions get token 0, whatever stands there."""
        if self.max_length is not None and tokens.shape[1] > self.max_length:
            raise TsaeError(
                f"data.context_length: {tokens.shape[1]} is impossible; {self.identity['name']} has {self.max_length} positions"
            )
        position = torch.arange(tokens.shape[1], device=tokens.device)
        ids = tokens.long().masked_fill(position >= lengths.to(tokens.device)[:, None], 0)
        if ids.numel() and int(ids.max()) >= self.vocabulary:
            raise TsaeError(
                f"model: token {int(ids.max())} is not in the vocabulary of {self.vocabulary}; "
                "the tokens come from another model's tokenizer"
            )
        return {"input_ids": ids.to(self.device), "use_cache": False}


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


def _expected_activations(lm: LanguageModel, inputs: dict[str, Any]) -> tuple[Tensor, str]:
    """[S, L, D] and its name: what reading must give for one batch, found without nnsight: the model's own hidden
    states, or a plain forward hook.
    """
    if lm.layer is None:
        return _watch(lm, [lm.hook_path], inputs)[0][1], "the output of that module"
    states = lm.module(**inputs, output_hidden_states=True).hidden_states
    if lm.layer + 1 < lm.n_layers:
        return states[lm.layer + 1], f"hidden_states[{lm.layer + 1}]"
    # The model reports its last state after the final norm, which is one of the modules beside the list of blocks.
    last = states[-1]
    holder = lm.hook_path.rpartition(".")[0].rpartition(".")[0]
    beside = [path for path, _ in lm.module.named_modules() if path and path.rpartition(".")[0] == holder]
    for taken, given in _watch(lm, beside, inputs):
        if isinstance(given, torch.Tensor) and given.shape == last.shape and torch.equal(given, last):
            return taken, f"what becomes hidden_states[{lm.n_layers}] in the final norm"
    return last, f"hidden_states[{lm.n_layers}]"


def _largest_difference(found: Tensor, expected: Tensor, lengths: Tensor) -> float:
    """The largest norm of the difference over the real positions, relative to the expected vector's; inf if shapes differ."""
    if found.shape != expected.shape:
        return float("inf")
    real = torch.arange(found.shape[1], device=found.device) < lengths.to(found.device)[:, None]
    difference = (found.float() - expected.float()).norm(dim=-1)[real]
    return float((difference / expected.float().norm(dim=-1)[real].clamp_min(1e-12)).max())


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


def load_language_model(model: ModelConfig, commit: str | None = None) -> LanguageModel:
    """The language model of a configuration, in its precision, on its device.

    Of a hub model, `commit` is the one that a store or a run was made with, whatever the branch means by now. Raises
    TsaeError.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as hf_logging

    hf_logging.disable_progress_bar()  # a bar for weights that load in a second would stand before every error
    device = own_device(model.device, "model.device")
    options = {"attn_implementation": model.attn_implementation} if model.attn_implementation else {}
    module, info = _load(
        AutoModelForCausalLM, model, commit, dtype=getattr(torch, model.dtype), output_loading_info=True, **options
    )
    missing = sorted(info["missing_keys"])
    if missing:
        raise TsaeError(
            f"model.name: the weights of {model.name} lack {len(missing)} tensors ({missing[0]}, …), which would be "
            "random; name a complete causal language model"
        )
    return LanguageModel(module.to(device), load_tokenizer(model, commit), model)


def load_tokenizer(model: ModelConfig, commit: str | None = None) -> PreTrainedTokenizerFast:
    """The fast tokenizer of a language model, of a hub model at `commit` if given. Raises TsaeError."""
    from transformers import AutoTokenizer

    tokenizer = _load(AutoTokenizer, model, commit)
    if not tokenizer.is_fast:
        raise TsaeError(f"model.name: {model.name} has no fast tokenizer; add its tokenizer.json")
    return tokenizer


def _load(auto: Any, model: ModelConfig, commit: str | None, **options: Any) -> Any:
    from huggingface_hub import constants

    folder = local_folder(model)
    place: dict[str, Any] = {"local_files_only": True} if folder else {"revision": commit or model.revision}
    try:
        return auto.from_pretrained(str(folder or model.name), **place, **options)
    except (OSError, ValueError, ImportError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        remedy = "check the id, the revision and HF_TOKEN"
        if folder is not None:
            remedy = "the folder needs config.json, tokenizer.json and model.safetensors"
        elif constants.HF_HUB_OFFLINE:
            at = f" --revision {commit}" if commit else ""
            remedy = f"offline: run `hf download {model.name}{at}` on a machine with network and the same HF_HOME"
        made_with = f" at commit {commit}, with which this was made," if folder is None and commit else ""
        raise TsaeError(f"model.name: {model.name}{made_with} cannot be loaded: {reason} ({remedy})") from error


def _identity(lm: LanguageModel, model: ModelConfig) -> dict[str, Any]:
    config = lm.module.config
    tokenizer = lm.tokenizer.backend_tokenizer.to_str()
    return {
        "name": model.name,
        "architecture": type(lm.module).__name__,
        "revision": getattr(config, "_commit_hash", None) or model.revision,
        "weights": weights_fingerprint(model),
        "dtype": model.dtype,
        "attn_implementation": config._attn_implementation,
        "layer": model.layer,
        "hook_path": lm.hook_path,
        "activation_dim": lm.activation_dim,
        "vocabulary": lm.vocabulary,
        "tokenizer_sha256": hashlib.sha256(tokenizer.encode()).hexdigest(),
    }
