"""Where in a language model a dictionary reads, in the words of Hugging Face, TransformerLens and the reference."""

from __future__ import annotations

import re
from typing import Literal, NamedTuple

from tsae.config.run import RunConfig
from tsae.config.sections import ModelConfig
from tsae.lm.families import FAMILIES, LENS_HOOK, Family
from tsae.lm.source import known_config
from tsae.runtime.environment import expanded
from tsae.runtime.errors import TsaeError

LENS_PREFIXES = {"google/gemma-": "google/", "EleutherAI/pythia-": "EleutherAI/"}
"""Hub ids that TransformerLens calls by their second half."""
LENS_NAMES = {"gpt2-small": "gpt2", "mistral-7b": "mistralai/Mistral-7B-v0.1"}
"""Other names of TransformerLens, with the hub id of each. It knows further models by their hub id."""
NAMES = {
    "pythia": "gpt_neox",
    "gpt2": "gpt2",
    "gemma-2-": "gemma2",
    "gemma-3-1b": "gemma3_text",
    "gemma-3-270m": "gemma3_text",
    "gemma-3-": "gemma3",
    "gemma-2b": "gemma",
    "gemma-7b": "gemma",
    "gemma-1.1-": "gemma",
    "llama": "llama",
    "meta-llama": "llama",
    "mistral": "mistral",
    "qwen3": "qwen3",
    "qwen": "qwen2",
}
"""How names of models begin whose files are not here, and their `model_type`."""

BLOCK = re.compile(
    r"resid_post_layer_(\d+)|(?:gpt_neox\.layers|transformer\.h|model\.(?:decoder\.|language_model\.)?layers)\.(\d+)"
)


class Place(NamedTuple):
    """A model, and in it a block's output or another module's; None for what is not known."""

    model: str | None
    block: int | None
    module: str | None = None
    """Path in the Hugging Face model of what is no block."""

    @classmethod
    def of(cls, config: RunConfig) -> Place:
        """The place that a configuration reads."""
        if config.without_text:
            return cls(config.data.source, None)
        return cls.of_model(config.model)

    @classmethod
    def of_model(cls, model: ModelConfig) -> Place:
        """The place that the section `model` names."""
        if model.hook_point is None:
            return cls(model.name, model.layer)
        if LENS_HOOK.fullmatch(model.hook_point):
            return find_place(model.hook_point, model.name, "model.hook_point")
        block = _block(model.hook_point)
        return cls(model.name, block, model.hook_point if block is None else None)

    def difference(self, other: Place) -> Literal["model", "layer"] | None:
        """What of two places contradicts each other, as far as both are known."""
        if self.model and other.model and not _same_model(self.model, other.model):
            return "model"
        both_known = (None, None) not in (self[1:], other[1:])
        return "layer" if both_known and self[1:] != other[1:] else None

    def said(self, part: Literal["model", "layer"]) -> str:
        """One part of the place, in words."""
        if part == "model":
            return f"model {self.model}"
        return f"module {self.module}" if self.block is None else f"layer {self.block}"


def find_place(name: str, model: str, where: str) -> Place:
    """The place in `model` that a file calls `name`, a name of TransformerLens or the reference or a module's path.

    Raises TsaeError, naming `where`, if it is the output of no module.
    """
    path = name.removesuffix(".output")
    hook = LENS_HOOK.fullmatch(name)
    if hook is None:
        if "hook_" in name or name.endswith(".input"):
            raise TsaeError(
                f"{where}: {name}: no module's output is that; readable: hook_resid_post, hook_resid_pre, hook_attn_out "
                "and hook_mlp_out of a block, and modules by their path"
            )
        block = _block(path)
        return Place(model, block, path if block is None else None)
    block = int(hook[1]) - (hook[2] == "resid_pre")
    if hook[2].startswith("resid") and block >= 0:
        return Place(model, block)
    family = _family(model)
    if family is None:
        raise TsaeError(
            f"{where}: {name}: which module of {model} gives it is not known; write the module's path in its place"
        )
    return Place(model, None, family.resid_pre if block < 0 else f"{family.blocks}.{block}.{getattr(family, hook[2])}")


def lens_hook(place: Place) -> str | None:
    """TransformerLens' name of a place, where it has one for certain."""
    if place.block is not None:
        return f"blocks.{place.block}.hook_resid_post"
    family, module = _family(place.model), place.module
    if family is None or module is None:
        return None
    if module == family.resid_pre:
        return "blocks.0.hook_resid_pre"
    block = re.match(rf"{re.escape(family.blocks)}\.(\d+)\.", module)
    kinds = {family.attn_out: "attn_out", family.mlp_out: "mlp_out"}
    kind = kinds.get(module[block.end() :]) if block else None
    return f"blocks.{block[1]}.hook_{kind}" if block and kind else None


def module_path(place: Place) -> str | None:
    """The path of a place in the Hugging Face model, where it is known."""
    family = _family(place.model)
    return place.module if place.block is None or family is None else f"{family.blocks}.{place.block}"


def hub_name(lens_name: str) -> str:
    """The hub id of a model that TransformerLens calls `lens_name`."""
    for prefix, owner in LENS_PREFIXES.items():
        if lens_name.startswith(prefix.removeprefix(owner)):
            return owner + lens_name
    return LENS_NAMES.get(lens_name, lens_name)


def lens_name(hub_id: str) -> str:
    """TransformerLens' name of a model."""
    for prefix, owner in LENS_PREFIXES.items():
        if hub_id.startswith(prefix):
            return hub_id.removeprefix(owner)
    return hub_id


def _block(path: str) -> int | None:
    found = BLOCK.fullmatch(path)
    return int(found[1] or found[2]) if found else None


def _family(model: str | None) -> Family | None:
    """By the model's config.json where that is here, else by its name."""
    if model is None:
        return None
    try:
        config = known_config(ModelConfig(name=model))
    except (TsaeError, ValueError):  # a folder of another machine, or no name of a model at all
        config = None
    if config is not None:
        return FAMILIES.get(str(config.get("model_type")))
    name = model.lower().rpartition("/")[2]
    return next((FAMILIES[family] for prefix, family in NAMES.items() if name.startswith(prefix)), None)


def _same_model(one: str, other: str) -> bool:
    """Whether two names stand for one model: equal as hub ids or paths, or a folder named like the hub's model."""
    names = [hub_name(name.rstrip("/")).removeprefix("openai-community/") for name in (one, other)]
    folders = [path for path in (expanded(name) for name in names) if path.is_absolute() or path.exists()]
    if len(folders) == 1:
        return names[0].rpartition("/")[2] == names[1].rpartition("/")[2]
    return names[0] == names[1] or (len(folders) == 2 and folders[0].resolve() == folders[1].resolve())
