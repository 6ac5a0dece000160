"""What can be known of a language model without loading it: where its files are, its depth, its weights' fingerprint."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tsae.config.sections import ModelConfig
from tsae.lm.gguf_file import SUFFIX, config_of, head_of
from tsae.runtime import contents
from tsae.runtime.environment import expanded
from tsae.runtime.errors import TsaeError, suggestion

EMBEDDED = "embedded"
FOLDER = Path(__file__).parent / "embedded"
"""The embedded language model, in the hub's format."""
DEPTH_KEYS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
DECIDING = (
    "config.json",
    "adapter_*",
    "tokenizer*",
    "chat_template*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges*",
)
"""Files of a model folder that decide what it computes, beside its weights."""
SHOWN = 6  # names in a message
SAMPLE = 1 << 20  # bytes that were read at either end of a weights file


def local_path(model: ModelConfig) -> Path | None:
    """The folder or the GGUF file that holds the model, or None for a hub id.

    Raises TsaeError for a path that is neither, and a GGUF file that cannot be read.
    """
    if model.name == EMBEDDED:
        return FOLDER
    path = expanded(model.name)
    if path.is_dir():
        # Folders that a GGUF was downloaded into may hold a config.json beside it, and nothing that it configures.
        whole = (path / "config.json").is_file() and (weights_in(path) or not any(path.glob(f"*{SUFFIX}")))
        return path if whole else _only_gguf(path)
    if path.exists():
        if not path.is_file():
            raise TsaeError(f"model.name: {path} is neither a folder nor a file; name a model folder or a GGUF file")
        head_of(path)
        return path
    if model.name.startswith(("/", ".", "~")) or model.name.count("/") > 1 or model.name.endswith(SUFFIX):
        kind = "file" if model.name.endswith(SUFFIX) else "folder"
        near = suggestion(path.name, (found.name for found in path.parent.glob("*")))
        raise TsaeError(
            f"model.name: there is no {kind} {path}; {near}name a model folder, a GGUF file, a Hugging Face id or "
            f"'{EMBEDDED}'"
        )
    return None


def _only_gguf(folder: Path) -> Path:
    files = sorted(folder.glob(f"*{SUFFIX}"))
    if not files:
        raise TsaeError(f"model.name: {folder} holds no config.json; name a folder in the hub's format, or a GGUF file")
    if len(files) > 1:
        names = ", ".join(path.name for path in files[:SHOWN]) + (", …" if len(files) > SHOWN else "")
        raise TsaeError(f"model.name: {folder} holds {len(files)} GGUF files; name one of them: {names}")
    head_of(files[0])
    return files[0]


def check_model(model: ModelConfig, where: str, exclude_tokens: Sequence[int] = ()) -> None:
    """Refuse a layer or tokens that the model does not have; a hub model that is not in the local cache is not looked at.

    With a hook point, `model.layer` is only a label and anything goes. Raises TsaeError naming `where`.
    """
    try:
        config = known_config(model)
        if config is None:
            return
        check_tokens(model, exclude_tokens, number_in(config, ("vocab_size",)))
    except TsaeError as error:
        raise TsaeError(f"{where}: {error}") from None
    depth = number_in(config, DEPTH_KEYS)
    if model.hook_point is None and depth is not None and model.layer >= depth:
        raise TsaeError(f"{where}: model.layer: {model.layer} is impossible; {model.name} has blocks 0 to {depth - 1}")


def check_tokens(model: ModelConfig, exclude_tokens: Sequence[int], vocabulary: int | None) -> None:
    """Refuse to leave out a token that is not among the model's `vocabulary`; none: not known. Raises TsaeError."""
    unknown = [token for token in exclude_tokens if vocabulary is not None and token >= vocabulary]
    if unknown and vocabulary is not None:
        raise TsaeError(
            f"data.exclude_tokens: {unknown[0]} is no token of {model.name}; ids from 0 to {vocabulary - 1} are possible"
        )


def known_config(model: ModelConfig) -> dict[str, Any] | None:
    """The model's config.json, from its folder or the hub's cache, or what a GGUF file says in its place; None where the
    hub alone has it.

    Raises TsaeError for a path that is no model, and a file that is no JSON object.
    """
    place = local_path(model)
    if place is not None and place.is_file():
        return config_of(place)
    path = place / "config.json" if place is not None else in_cache(model)
    if path is None:
        return None
    try:
        return {**json.loads(path.read_text())}
    except (ValueError, TypeError) as error:
        raise TsaeError(f"model.name: {path} is not the configuration of a model: {error}") from None


def in_cache(model: ModelConfig) -> Path | None:
    """config.json of a hub model in the local cache, below the folder of its commit."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(model.name, "config.json", revision=model.revision)
    return Path(found) if isinstance(found, str) else None


def number_in(config: dict[str, Any], keys: Sequence[str]) -> int | None:
    """The first of `keys` that tells a number, of the language model in a model of several parts before the whole's."""
    part = config.get("text_config")
    for tree in (part if isinstance(part, dict) else {}, config):
        for key in keys:
            if isinstance(tree.get(key), int):
                return int(tree[key])
    return None


def weights_fingerprint(model: ModelConfig) -> str:
    """What tells two models of the same name apart.

    Embedded: the recorded hash of the weights. Folder: the content of its weights, configuration and tokenizer. GGUF file:
    its content. Hub: the revision that was asked for; which commit that is, a store says, and what belongs to it is read
    with the same one.
    """
    place = local_path(model)
    if place is None:
        return model.revision or ""
    if model.name == EMBEDDED:
        return str(read_recipe(place)["weights_sha256"])
    return contents.sha256_of(place) if place.is_file() else contents.sha256_of_all(model_files(model), place)


def fingerprint_before(model: ModelConfig) -> str:
    """What told folders of models apart before their content did, and names older stores: sizes and both ends of the weights."""
    place = local_path(model)
    if place is None or place.is_file() or model.name == EMBEDDED:
        return weights_fingerprint(model)
    digest = hashlib.sha256()
    for path in weights_in(place):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with open(path, "rb") as stream:
            digest.update(stream.read(SAMPLE))
            stream.seek(max(size - SAMPLE, 0))
            digest.update(stream.read(SAMPLE))
    return digest.hexdigest()


def model_files(model: ModelConfig) -> list[Path]:
    """The files that decide what a local model computes; none for the embedded model and the hub."""
    place = local_path(model)
    if place is None or model.name == EMBEDDED:
        return []
    if place.is_file():
        return [place]
    return [*weights_in(place), *(path for pattern in DECIDING for path in sorted(place.glob(pattern)))]


def weights_in(folder: Path) -> list[Path]:
    """The files that hold the weights of a model folder."""
    return sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))


def cached_commit(model: ModelConfig) -> str | None:
    """The commit of a hub model that the local cache has for its revision; None for others, and where there is none."""
    found = in_cache(model) if local_path(model) is None else None
    return found.parent.name if found else None


def read_recipe(folder: Path = FOLDER) -> dict[str, Any]:
    """The recipe of an embedded language model. Raises TsaeError when the installation lacks it."""
    path = folder / "recipe.json"
    if not path.is_file():
        raise TsaeError(f"{path}: not found; make the model with `tsae embedded-lm --out {folder}`")
    return dict(json.loads(path.read_text()))
