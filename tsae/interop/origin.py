"""Which activations a dictionary was made for, in the words of the libraries that will feed it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

from tsae.checkpoint import RunFolder
from tsae.runtime.errors import TsaeError

TRANSFORMER_LENS_PREFIXES = {"google/gemma-": "google/", "EleutherAI/pythia-": "EleutherAI/"}
"""Hub ids that TransformerLens calls by their second half. It knows other models by their hub id."""

BLOCK_LISTS = {"pythia": "gpt_neox.layers", "gpt2": "transformer.h"}
"""Where blocks lie in the families whose paths are known; `model.layers` in the others named in LLAMA_LIKE."""
LLAMA_LIKE = ("gemma", "llama", "mistral", "qwen")
BLOCK_PATH = re.compile(r"(?:gpt_neox\.layers|transformer\.h|model\.(?:decoder\.|language_model\.)?layers)\.(\d+)")


class Origin(NamedTuple):
    """What a dictionary reads; None where the files do not tell."""

    model: str
    """Hub id or folder of the language model."""
    layer: int | None
    """Block whose output is read; None if it is something else."""
    module: str | None
    """Path of the module in the Hugging Face model."""
    dataset: str | None
    context_length: int | None
    skip_positions: int | None
    """Leading positions never trained on."""
    prepends_bos: bool | None
    commit: str | None
    """Commit of this package that trained it."""

    @property
    def lens_model(self) -> str:
        """TransformerLens' name of the model."""
        for prefix, owner in TRANSFORMER_LENS_PREFIXES.items():
            if self.model.startswith(prefix):
                return self.model.removeprefix(owner)
        return self.model

    @property
    def lens_hook(self) -> str | None:
        """TransformerLens' name of the hook point, where it has one for certain."""
        return None if self.layer is None else f"blocks.{self.layer}.hook_resid_post"

    def require_block(self, where: str, reader: str) -> None:
        """Raise TsaeError unless the output of a block is read: `reader` knows nothing else."""
        if self.layer is None:
            raise TsaeError(
                f"{where}: reads {self.module or 'an unnamed place'} of {self.model}, and {reader} would feed it the "
                "output of a block; only dictionaries on a block's output can be exported to it"
            )


def origin_of(config: dict[str, Any], folder: Path) -> Origin:
    """The origin told by a config.json and, in our runs, by the provenance.json beside it."""
    trainer, buffer = config.get("trainer", {}), config.get("buffer") or {}
    record = read_json(RunFolder(folder).provenance) if RunFolder(folder).provenance.is_file() else {}
    model = str(trainer.get("lm_name") or "unknown")
    layer, module = _hook(trainer, record.get("store", {}).get("model", {}).get("hook_path"))
    if module is None and layer is not None:
        module = _block_path(model, layer)
    return Origin(
        model=model,
        layer=layer,
        module=module,
        dataset=buffer.get("dataset"),
        context_length=buffer.get("ctx_len"),
        skip_positions=buffer.get("skip_positions"),
        prepends_bos=_prepends_bos(model, record),
        commit=record.get("tsae", {}).get("commit"),
    )


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises TsaeError if it is missing, malformed or no object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise TsaeError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or 'not UTF-8 text'}") from None
    except json.JSONDecodeError as error:
        raise TsaeError(f"{path}: line {error.lineno}: not valid JSON: {error.msg}") from None
    if not isinstance(value, dict):
        raise TsaeError(f"{path}: a JSON object is expected")
    return value


def _hook(trainer: dict[str, Any], recorded: str | None) -> tuple[int | None, str | None]:
    """Block and module path from `submodule_name`: resid_post_layer_8, a block's path, or another module's."""
    name = str(trainer.get("submodule_name") or "")
    if re.fullmatch(r"resid_post_layer_\d+", name):
        return int(name.rpartition("_")[2]), recorded
    block = BLOCK_PATH.fullmatch(name)
    return (int(block[1]) if block else None), name or recorded


def _block_path(model: str, layer: int) -> str | None:
    name = model.lower().rpartition("/")[2]
    for family, blocks in BLOCK_LISTS.items():
        if name.startswith(family):
            return f"{blocks}.{layer}"
    return f"model.layers.{layer}" if name.startswith(LLAMA_LIKE) else None


def _prepends_bos(model: str, record: dict[str, Any]) -> bool | None:
    setting = record.get("store", {}).get("settings", {}).get("data", {}).get("bos", "auto")
    if setting != "auto":
        return bool(setting == "always")
    name = model.lower().rpartition("/")[2]
    if name.startswith(("gemma", "llama", "mistral")):
        return True
    return False if name.startswith(("pythia", "gpt2", "qwen")) else None
