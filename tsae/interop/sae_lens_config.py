"""The cfg.json of SAELens: its older form brought to that of version 6, and our config.json derived from it."""

from __future__ import annotations

import re
from typing import Any

from tsae.interop.origin import TRANSFORMER_LENS_PREFIXES
from tsae.runtime.errors import TsaeError
from tsae.sae.dictionary import Dictionary, ThresholdDictionary
from tsae.sae.kinds import TemporalMatryoshkaBatchTopKSAE, classes


def is_modern(config: dict[str, Any]) -> bool:
    """Whether a cfg.json has the form of version 6."""
    version = config.get("sae_lens_version") or (config.get("metadata") or {}).get("sae_lens_version") or "0"
    return bool(re.match(r"0*(\d+)", str(version))) and int(str(version).partition(".")[0]) >= 6


def modernised(config: dict[str, Any], where: str) -> dict[str, Any]:
    """A cfg.json from before version 6 in the form of version 6. Raises TsaeError for activation functions it lost."""
    config = dict(config)
    activation = config.get("activation_fn_str") or config.get("activation_fn") or "relu"
    architecture = config.get("architecture") or "standard"
    if activation == "topk":
        architecture = "topk"
        config["k"] = (config.get("activation_fn_kwargs") or {}).get("k")
    elif activation != "relu":
        raise TsaeError(f"{where}: activation_fn {activation!r} cannot be read; readable: relu, topk")
    if config.get("finetuning_scaling_factor"):
        raise TsaeError(
            f"{where}: finetuning_scaling_factor has no counterpart here; fold it in SAELens and save again"
        )
    normalisation = config.get("normalize_activations") or "none"
    hook = config.get("hook_name") or config.get("hook_point")
    names = ("model_name", "dataset_path", "context_size", "prepend_bos", "neuronpedia_id")
    return {
        **config,
        "architecture": architecture,
        "normalize_activations": "expected_average_only_in" if normalisation is True else normalisation,
        "reshape_activations": config.get("reshape_activations") or ("hook_z" if "hook_z" in str(hook) else "none"),
        "metadata": {"hook_name": hook, **{name: config.get(name) for name in names}},
    }


def imported_config(name: str, dictionary: Dictionary, config: dict[str, Any]) -> dict[str, Any]:
    """The config.json of an imported dictionary of class `name`: what other loaders need, and the metadata as found."""
    metadata = config.get("metadata") or {}
    layer, submodule = _block(str(metadata.get("hook_name") or ""))
    trainer: dict[str, Any] = {
        "trainer_class": classes()[name].trainer_class,
        "dict_class": name,
        "activation_dim": dictionary.activation_dim,
        "dict_size": dictionary.dict_size,
        "layer": layer,
        "lm_name": _hub_name(str(metadata.get("model_name") or "unknown")),
        "submodule_name": submodule or metadata.get("hf_hook_name") or metadata.get("hook_name"),
        "device": "cpu",
    }
    if isinstance(dictionary, ThresholdDictionary):
        trainer["k"] = int(dictionary.k)
    if "group_sizes" in dictionary.file_tensors:
        trainer["group_sizes"] = list(dictionary.group_sizes)
    if isinstance(dictionary, TemporalMatryoshkaBatchTopKSAE):
        trainer["temporal"] = metadata.get("tsae_temporal", "p")
    buffer = {"ctx_len": metadata.get("context_size"), "dataset": metadata.get("dataset_path")}
    return {"trainer": trainer, "buffer": buffer, "sae_lens": metadata}


def _block(hook: str) -> tuple[int | None, str | None]:
    """Block whose output a TransformerLens hook reads, and the reference's name of that place."""
    found = re.fullmatch(r"blocks\.(\d+)\.hook_resid_(pre|post)", hook)
    layer = int(found[1]) - (found[2] == "pre") if found else -1
    return (layer, f"resid_post_layer_{layer}") if layer >= 0 else (None, None)


def _hub_name(lens_name: str) -> str:
    """The hub id of a model that TransformerLens calls `lens_name`."""
    for prefix, owner in TRANSFORMER_LENS_PREFIXES.items():
        if lens_name.startswith(prefix.removeprefix(owner)):
            return owner + lens_name
    return lens_name
