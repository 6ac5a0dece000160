"""Any Hugging Face causal language model, read and changed at one hook point through nnsight.

Rows are right-padded. Since attention is causal, what follows a real position cannot change it, so no attention mask is
given: the fast kernels need none, and numbers do not depend on the padding. That this is so, and that the right place
is read, every model proves when it is loaded.
"""

from __future__ import annotations

import atexit
import copy
import hashlib
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property, partial
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, NoReturn

# nnsight gives every object of the process a `.save`, after which beartype, which SAELens and SAEBench need, can no
# longer be imported ("unhashable type: 'instancemethod'"); before it, it can.
if "nnsight" not in sys.modules and find_spec("beartype"):
    import_module("beartype")
import nnsight
import torch
from torch import Tensor

from tsae.config.sections import ModelConfig
from tsae.lm.hook import (
    TOLERANCE,
    differences,
    expected_reading,
    find_hook,
    first_not_finite,
    hidden_of,
    hook_size,
    largest_difference,
    proof_rows,
    watch,
    with_hidden,
)
from tsae.lm.placement import place
from tsae.lm.pretrained import from_pretrained, require_complete
from tsae.lm.source import cached_commit, local_path, weights_fingerprint
from tsae.runtime.environment import own_device
from tsae.runtime.errors import TsaeError
from tsae.runtime.kept import kept
from tsae.runtime.late import Late

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

FEW = 0.03
"""Share of positions at which rounding alone may send a mixture of experts another way."""


class LanguageModel:
    """A causal LM with one hook point; it never computes gradients.

    `tokens` are [S, L] integers and `lengths` [S] counts of real tokens, on any device; results are on `device`, in the
    model's precision, and meaningless at pad positions.
    """

    def __init__(
        self, module: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, model: ModelConfig, commit: str | None = None
    ) -> None:
        self.module = module.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        text_config = module.config.get_text_config()
        self.n_layers: int = text_config.num_hidden_layers
        positions = getattr(text_config, "max_position_embeddings", None)
        # Minus one is how some say that there is no limit.
        self.max_length: int | None = positions if positions is None or positions > 0 else None
        self.vocabulary = int(module.get_input_embeddings().get_parameter("weight").shape[0])
        self._traced = nnsight.NNsight(module)
        self._read_at(model, commit)

    def _read_at(self, model: ModelConfig, commit: str | None) -> None:
        self.layer: int | None = model.layer if model.hook_point is None else None
        self.hook_path = find_hook(self.module, model, self.n_layers)
        with torch.no_grad():
            tokens = proof_rows(self.vocabulary, self.max_length).to(self.device)
            self.activation_dim = hook_size(self.module, self.hook_path, tokens, model.name)
        target = self.module.get_submodule(self.hook_path)
        # Looked up by identity: nnsight renames modules whose name is one of its own attributes.
        self._hook = next(envoy for envoy in self._traced.modules() if envoy._module is target)
        self.identity = _identity(self, model, commit)
        self.verify_hook()

    def at(self, model: ModelConfig, commit: str | None = None) -> LanguageModel:
        """The same language model with another hook point, that of `model`; both share the weights."""
        other = copy.copy(self)
        other._read_at(model, commit)
        return other

    @property
    def device(self) -> torch.device:
        """Where the model takes its tokens: of one that is spread over several devices, the first that computes."""
        spread = getattr(self.module, "hf_device_map", None) or {}
        computing = [where for where in spread.values() if where != "disk"]
        return torch.device(computing[0]) if computing else self.module.device

    @cached_property
    def _running(self) -> dict[str, int]:
        """Path of a module → its turn in the order in which a forward pass is done with them."""
        tokens = proof_rows(self.vocabulary, self.max_length)
        paths = [path for path, _ in self.module.named_modules() if path]
        with torch.no_grad():
            inputs = self._inputs(tokens, torch.full((len(tokens),), tokens.shape[1]))
            seen, _ = watch(self.module, paths, inputs)
        return {path: turn for turn, (path, _, _) in enumerate(seen)}

    def read(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """[S, L, D] activations at the hook point; nothing after it is computed.

        Raises TsaeError if any of a real token is not finite.
        """
        return begin_reading([self], tokens, lengths)()[0]

    def logits(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """[S, L, V] next-token scores. Raises TsaeError if those of a real token are not finite."""
        inputs = self._inputs(tokens, lengths)
        with torch.no_grad():
            logits = self.module(**inputs).logits
        # Some models give minus infinity to tokens that cannot be.
        if not self._all_finite(logits.amax(-1).isfinite(), lengths):
            self._refuse(inputs, lengths)
        return logits

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

    def verify_hook(self) -> None:
        """Prove that `read` gives the model's own hidden state after block `layer`, or what the named module gives, and
        that no later token has a part in it, or in the scores. Raises TsaeError with the largest relative difference.
        """
        tokens = proof_rows(self.vocabulary, self.max_length)
        lengths = torch.full((len(tokens),), tokens.shape[1])
        found = self.read(tokens, lengths)
        with torch.no_grad():
            inputs = self._inputs(tokens, lengths)
            expected, what, logits = expected_reading(self.module, self.hook_path, self.layer, inputs)
        tolerance = TOLERANCE[self.module.dtype]
        earlier = tokens == tokens[0]
        for given, values in ((f"read at {self.hook_path}", found), ("predicted", logits)):
            change = differences(values, values[:1])[earlier.to(values.device)]
            if float((change > tolerance).float().mean()) > FEW:
                raise TsaeError(
                    f"model.name: {self.identity['name']} looks ahead: a later token changes what is {given} before it "
                    f"(relative difference {float(change.max()):.2g}); a causal language model is expected"
                )
        difference = largest_difference(found, expected)
        if not difference <= tolerance:
            raise TsaeError(
                f"model: what is read at {self.hook_path} is not {what} (relative difference {difference:.2g}); name the "
                f"module to read in model.hook_point; {self.hook_path} itself is model.hook_point={self.hook_path}"
            )

    def _all_finite(self, finite: Tensor, lengths: Tensor) -> Tensor:
        """Whether [S, L], one for each token, holds for all real ones, on the device."""
        real = torch.arange(finite.shape[1], device=finite.device) < _sent(lengths, finite.device)[:, None]
        return (finite | ~real).all()

    def _refuse(self, inputs: dict[str, Any], lengths: Tensor) -> NoReturn:
        """Raise a TsaeError that says where values first overflow."""
        ids = inputs["input_ids"]
        real = torch.arange(ids.shape[1], device=ids.device) < lengths.to(ids.device)[:, None]
        with torch.no_grad():
            place = first_not_finite(self.module, inputs, real) or self.hook_path
        dtype = str(self.module.dtype).removeprefix("torch.")
        wider = {"float16": "set model.dtype to bfloat16 or float32", "bfloat16": "set model.dtype to float32"}
        remedy = wider.get(dtype, "float32 is the widest precision there is, so look for damage")
        loaded = ((name, values) for name, values in self.module.named_parameters() if not values.is_meta)
        bad = next((name for name, values in loaded if not values.isfinite().all()), None)
        if bad is not None:
            remedy += f"; the weights {bad} are not finite"
        raise TsaeError(f"model: the values at {place} are not finite in {dtype}; {remedy}")

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
        return {"input_ids": _sent(ids, self.device), "use_cache": False}


def readings(places: Sequence[LanguageModel], batches: Iterable[tuple[Tensor, Tensor]]) -> Iterator[list[Tensor]]:
    """[S, L, D] activations at each of several places of one language model (see `LanguageModel.at`), by one forward pass.

    For each batch of tokens [S, L] and lengths [S] in turn, which is waited for once a GPU has the next one to do. Nothing
    after the last place is computed. Raises TsaeError if any of a real token is not finite.
    """
    before: Callable[[], list[Tensor]] | None = None
    for batch in batches:
        begun = begin_reading(places, *batch)
        if before is not None:
            yield before()
        before = begun
    if before is not None:
        yield before()


def begin_reading(places: Sequence[LanguageModel], tokens: Tensor, lengths: Tensor) -> Callable[[], list[Tensor]]:
    """Have a GPU begin with a batch; what waits for it, and gives what `readings` does, or raises."""
    lm = places[0]
    inputs = lm._inputs(tokens, lengths)
    turns = list(range(len(places)))
    if len(places) > 1:  # nnsight takes them in the order in which the model comes to them
        turns.sort(key=lambda place: lm._running[places[place].hook_path])
    hooks = [places[turn]._hook for turn in turns]
    with torch.no_grad(), lm._traced.trace(**inputs) as tracer:
        outputs = [hook.output for hook in hooks]
        nnsight.save(outputs)
        tracer.stop()
    found = [hidden_of(outputs[turns.index(place)]) for place in range(len(places))]
    finite = [Late(lm._all_finite(hidden.isfinite().all(-1), lengths)) for hidden in found]

    def end() -> list[Tensor]:
        if not all(each.read() for each in finite):
            lm._refuse(inputs, lengths)
        return found

    return end


def _sent(values: Tensor, device: torch.device) -> Tensor:
    """`values` on their way to a device; a copy of memory that is not pinned would wait for all that is under way there."""
    if device.type != "cuda" or values.is_cuda:
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)


def load_language_model(
    model: ModelConfig, commit: str | None = None, read_at: Sequence[ModelConfig] = ()
) -> LanguageModel:
    """The language model of a configuration, in its precision, on its device or spread over several.

    Of a hub model, `commit` is the one that a store or a run was made with, whatever the branch means by now. `read_at`
    says that it is only read, and at which places. Raises TsaeError.
    """
    asked = repr((model, commit, tuple(read_at)))
    return kept("language model", asked, partial(_load, model, commit, read_at))


def _load(model: ModelConfig, commit: str | None, read_at: Sequence[ModelConfig]) -> LanguageModel:
    from transformers import AutoModelForCausalLM, GgufConfig
    from transformers.utils import logging as hf_logging

    hf_logging.disable_progress_bar()  # a bar for weights that load in a second would stand before every error
    device = own_device(model.device, "model.device")
    options: dict[str, Any] = {"dtype": getattr(torch, model.dtype)}
    if model.attn_implementation:
        options["attn_implementation"] = model.attn_implementation
    # What does not fit is told, not raised.
    told = {"output_loading_info": True, "ignore_mismatched_sizes": True}
    needed = "a config.json and a model.safetensors that fit together"
    local = local_path(model)
    if local is not None and local.is_file():
        if model.device_map:
            raise TsaeError(
                f"model.device_map: {model.name} is a GGUF file, which is read as a whole; name a model's folder"
            )
        # Whether weights stay packed would else depend on what is installed.
        options["quantization_config"] = GgufConfig(dequantize=True)
    elif model.device_map:
        # What lies in safetensors in the same precision is read from there; only the rest takes room.
        atexit.register(shutil.rmtree, folder := tempfile.mkdtemp(prefix="tsae-offload-"), ignore_errors=True)
        options |= {"device_map": place(model, options["dtype"], commit, read_at), "offload_folder": folder}
    module, info = from_pretrained(AutoModelForCausalLM, model, needed, commit, **told, **options)
    require_complete(model, info)
    module = module if "device_map" in options else module.to(device)
    return LanguageModel(module, load_tokenizer(model, commit), model, commit)


def load_tokenizer(model: ModelConfig, commit: str | None = None) -> PreTrainedTokenizerFast:
    """The fast tokenizer of a language model, of a hub model at `commit` if given. Raises TsaeError."""
    from transformers import AutoTokenizer

    needed = f"a tokenizer.json that tokenizers {version('tokenizers')} can read"
    tokenizer = from_pretrained(AutoTokenizer, model, needed, commit)
    if not tokenizer.is_fast:
        raise TsaeError(f"model.name: {model.name} has no fast tokenizer; add its tokenizer.json")
    return tokenizer


def _identity(lm: LanguageModel, model: ModelConfig, commit: str | None) -> dict[str, Any]:
    config = lm.module.config
    tokenizer = lm.tokenizer.backend_tokenizer.to_str()
    return {
        "name": model.name,
        "architecture": type(lm.module).__name__,
        # The hub's cache knows which commit a branch is; transformers does not always tell.
        "revision": commit or getattr(config, "_commit_hash", None) or cached_commit(model) or model.revision,
        "weights": weights_fingerprint(model),
        "dtype": model.dtype,
        "attn_implementation": config._attn_implementation,
        "layer": model.layer,
        "hook_path": lm.hook_path,
        "activation_dim": lm.activation_dim,
        "vocabulary": lm.vocabulary,
        "tokenizer_sha256": hashlib.sha256(tokenizer.encode()).hexdigest(),
    }
