"""A dictionary at work inside a language model: read, replaced by, ablated and steered at the hook point, from Python.

The model stays the user's own: a forward hook is there as long as the `with` block runs, and whatever is called in it
(a forward pass, `generate`, a backward pass) goes through the dictionary. Where nothing is edited no bit changes.

Shapes: S sequences, L positions, D activation_dim, F dict_size.
"""

from __future__ import annotations

import dataclasses
import inspect
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from tsae.checkpoint import RunFolder, find_dictionary, load_dictionary
from tsae.config.run import STORED, SYNTHETIC
from tsae.config.sections import ModelConfig
from tsae.data.contexts import starts_with_bos
from tsae.interop.origin import origin_of
from tsae.interop.place import Place
from tsae.lm.hook import find_hook, hidden_of, hook_size, with_hidden
from tsae.lm.model import LanguageModel, load_tokenizer
from tsae.runtime.errors import TsaeError
from tsae.sae.dictionary import EPSILON, Dictionary
from tsae.store.binding import commit_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

log = logging.getLogger("tsae")
Latents = int | slice | Sequence[int] | Tensor
"""One latent, several, or a run of them such as `dictionary.group_slices[0]`."""


def load(path: str | Path, device: str | torch.device = "cpu", checkpoint: int | str | None = None) -> Dictionary:
    """The dictionary in a run folder or a hub repository, which knows in `reads` what it can be attached to.

    Arguments and errors are those of `load_dictionary`. `reads` is the language model and its place, as
    `load_language_model` takes it; None where the files do not tell, or the dictionary is one of a synthetic world.
    """
    folder = find_dictionary(path)
    dictionary, written = load_dictionary(folder, device, checkpoint)
    dictionary.reads = _reads(RunFolder(folder), written)
    return dictionary


def _reads(run: RunFolder, written: dict[str, Any]) -> ModelConfig | None:
    if run.resolved.is_file():
        config = run.load_config()
        revision = commit_of(run) or config.model.revision
        return None if config.without_text else dataclasses.replace(config.model, revision=revision)
    origin = origin_of(written, run.path)
    if origin.model in (SYNTHETIC, STORED) or (origin.layer is None and origin.module is None):
        return None
    if origin.layer is None:
        return ModelConfig(name=origin.model, hook_point=origin.module)
    return ModelConfig(name=origin.model, layer=origin.layer)


class Attached:
    """A dictionary in a model. Edits hold from one forward pass to the next until `clear`, or the end of the block."""

    positions: Tensor | None = None
    """[S, L] bool: where edits apply; None: at every real token but the first of its sequence, as in `tsae steer`."""

    def __init__(
        self, module: PreTrainedModel, dictionary: Dictionary, tokenizer: PreTrainedTokenizerFast | None
    ) -> None:
        self.module, self.dictionary, self._tokenizer = module, dictionary, tokenizer
        self._edits: list[tuple[list[int], Tensor, bool]] = []
        self._error_kept = True
        self._mask: Any = None
        self._before = 0
        self._written: Tensor | None = None

    def codes(self, text: str | None = None) -> Tensor:
        """Feature activations [S, L, F] of the last forward pass, those of `dictionary.encode` with the edits made to them.

        Of a `text`, [L, F] (which the model is run on, without gradients); `tokens` says what its L tokens are. What
        the model gives can be differentiated by the codes of a pass, with the error term constant, and the codes by
        what the model was given. Raises TsaeError before the first pass.
        """
        if text is not None:
            with torch.no_grad():
                self.module(input_ids=self.tokens(text), use_cache=False)
        if self._written is None:
            raise TsaeError("attach: no codes yet; run the model inside the block first, or ask for those of a text")
        return self._written if text is None else self._written[0]

    def tokens(self, text: str) -> Tensor:
        """[1, L] the tokens of a text on the model's device, after BOS where the tokenizer puts one.

        Raises TsaeError if there is no tokenizer, no token, or none of the model's positions left.
        """
        bos = [self.tokenizer.bos_token_id] if starts_with_bos(self.tokenizer) else []
        found = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
        room = getattr(self.module.config.get_text_config(), "max_position_embeddings", None)
        if not found or 0 < (room or 0) < len(bos + found):
            raise TsaeError(
                f"attach: a text of {len(found)} tokens is impossible; at least 1 is expected, and the model has "
                f"{room or 'unlimited'} positions"
            )
        return torch.tensor([bos + found], device=self.module.device)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The one that was given, or else the one that lies where the model came from. Raises TsaeError without any."""
        if self._tokenizer is not None:
            return self._tokenizer
        if not self.module.config._name_or_path:
            raise TsaeError("attach: the model says of no tokenizer; give it one: attach(…, tokenizer=…)")
        model = ModelConfig(name=self.module.config._name_or_path)
        return load_tokenizer(model, getattr(self.module.config, "_commit_hash", None))

    def replace(self) -> None:
        """Let the model go on with reconstructions alone, as loss recovered does: without the error term."""
        self._error_kept = False

    def ablate(self, latents: Latents) -> None:
        """Let latents write nothing."""
        self.steer(latents, 0.0)

    def steer(self, latents: Latents, strength: float, mode: Literal["set", "add"] = "set") -> None:
        """Set what latents write, active or not, or add to it.

        `strength` is in the units of `tsae steer` and of all results: the norm of what is written, which is the feature
        activation times the latent's `row_norms`. Raises TsaeError for a latent or mode that there is not.
        """
        if mode not in ("set", "add"):
            raise TsaeError(f"attach: mode {mode!r} is not allowed; allowed: set, add")
        size = self.dictionary.dict_size
        chosen = range(size)[latents] if isinstance(latents, slice) else torch.as_tensor(latents).reshape(-1).tolist()
        for latent in chosen:
            if latent not in range(size):
                raise TsaeError(f"attach: latent {latent} is impossible; the dictionary has latents 0 to {size - 1}")
        values = float(strength) / self.dictionary.row_norms[list(chosen)].clamp_min(EPSILON)
        self._edits.append((list(chosen), values, mode == "set"))

    def clear(self) -> None:
        """Take all edits back, and `replace`."""
        self._edits, self._error_kept = [], True

    def note(self, names: Sequence[str], args: tuple[Any, ...], given: dict[str, Any]) -> None:
        """Keep of the model's arguments which tokens are real, and how many came before; `names` are the positional ones'."""
        given = {**dict(zip(names, args, strict=False)), **given}
        self._mask = given.get("attention_mask")
        # Asked before the pass, which adds its own tokens to the cache.
        self._before = int(getattr(given.get("past_key_values"), "get_seq_length", int)())

    def exchanged(self, output: Any) -> Any:
        """What the module at the hook point returned, with its activations as the edits leave them."""
        hidden = hidden_of(output)
        x = hidden.to(self.dictionary.W_dec.device, torch.float32)
        where = self._where(hidden).to(x.device)[..., None]
        read = self.dictionary.encode(x)
        # A tensor of its own beside `read`, so that there are gradients by what is written, edited or not.
        written = torch.where(where, self._edited(read), read)
        if torch.is_grad_enabled() and not written.requires_grad:
            written.requires_grad_()
        self._written = written
        new = self.dictionary.decode(written)
        new = x + (new - self.dictionary.decode(read)) if self._error_kept else torch.where(where, new, x)
        return with_hidden(output, new.to(hidden))

    def _edited(self, read: Tensor) -> Tensor:
        """[S, L, F]"""
        edited = read.clone()
        for latents, values, is_set in self._edits:
            edited[..., latents] = values if is_set else edited[..., latents] + values
        return edited

    def _where(self, hidden: Tensor) -> Tensor:
        """[S, L] bool, of a pass that may go on where an earlier one, whose keys are cached, ended."""
        shape = hidden.shape[:2]
        if self.positions is not None:
            if self.positions.shape != shape:
                raise TsaeError(
                    f"attach: positions of shape {list(self.positions.shape)} do not fit {list(shape)} tokens"
                )
            return self.positions.bool()
        real = self._mask
        if not isinstance(real, Tensor) or real.ndim != 2:
            real = torch.ones(shape[0], self._before + shape[1], device=hidden.device)
        real = real.bool()
        return (real & (real.cumsum(1) > 1))[:, -shape[1] :]


@contextmanager
def attach(
    model: PreTrainedModel | LanguageModel,
    dictionary: Dictionary,
    layer: int | None = None,
    hook_point: str | None = None,
    tokenizer: PreTrainedTokenizerFast | None = None,
) -> Iterator[Attached]:
    """Put `dictionary` into a causal language model of transformers, or one of `load_language_model`, for a `with` block.

    It reads the output of block `layer`, or of the module whose path is `hook_point`; with neither, where a dictionary of
    `load` was trained. `tokenizer` is needed for texts only, and only if it does not lie where the model came from. On
    leaving the block, also by an exception, the model is as it was. Raises TsaeError for a layer or module that the
    model does not have, one of another width than the dictionary's, and a dictionary that was not calibrated.
    """
    module: Any = model.module if isinstance(model, LanguageModel) else model
    usable = isinstance(module, nn.Module) and hasattr(module, "config") and isinstance(dictionary, Dictionary)
    if not usable:
        found = f"{type(model).__name__} and {type(dictionary).__name__}"
        raise TsaeError(f"attach: a model of transformers (or tsae) and a dictionary are expected, found {found}")
    dictionary.require_calibrated("attach")
    name = model.identity["name"] if isinstance(model, LanguageModel) else module.config._name_or_path
    place = _place(dictionary, layer, hook_point, name)
    path = find_hook(module, place, module.config.get_text_config().num_hidden_layers)
    with torch.no_grad():
        width = hook_size(module, path, torch.zeros((1, 2), dtype=torch.long, device=module.device), place.name)
    if width != dictionary.activation_dim:
        raise TsaeError(
            f"attach: the dictionary reads activations of {dictionary.activation_dim} dimensions, {path} gives {width}"
        )
    attached = Attached(module, dictionary, tokenizer or getattr(model, "tokenizer", None))
    names = list(inspect.signature(module.forward).parameters)
    handles = [
        module.register_forward_pre_hook(lambda _, args, given: attached.note(names, args, given), with_kwargs=True),
        module.get_submodule(path).register_forward_hook(lambda _, __, output: attached.exchanged(output)),
    ]
    try:
        yield attached
    finally:
        for handle in handles:
            handle.remove()


def _place(dictionary: Dictionary, layer: int | None, hook_point: str | None, name: str) -> ModelConfig:
    """What to read in the model called `name`, with a warning where the dictionary was trained on something else."""
    trained = dictionary.reads
    if layer is None and hook_point is None:
        if trained is None:
            raise TsaeError("attach: the dictionary does not say where it reads; give layer=… or hook_point=…")
        layer, hook_point = trained.layer, trained.hook_point
    place = ModelConfig(name=name or "the model", layer=layer or 0, hook_point=hook_point)
    if trained is not None:
        made, here = Place.of_model(trained), Place.of_model(place)._replace(model=name or None)
        part = made.difference(here)
        if part is not None:
            log.warning("attach: the dictionary was trained on %s and is put into %s", made.said(part), here.said(part))
    return place
