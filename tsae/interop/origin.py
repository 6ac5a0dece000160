"""Which activations a dictionary was made for, in the words of the libraries that will feed it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from tsae.checkpoint import RunFolder
from tsae.config.run import RunConfig
from tsae.interop.place import Place, find_place, lens_hook, lens_name, module_path
from tsae.runtime.errors import TsaeError
from tsae.store.binding import written_of

UNKNOWN = "unknown"
"""The model of a file that names none."""


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
        return lens_name(self.model)

    @property
    def place(self) -> Place:
        """What the files tell of the place that is read."""
        model = None if self.model == UNKNOWN else self.model
        return Place(model, self.layer, self.module if self.layer is None else None)

    @property
    def lens_hook(self) -> str | None:
        """TransformerLens' name of the hook point, where it has one for certain."""
        return lens_hook(self.place)

    def require_block(self, where: str, reader: str) -> None:
        """Raise TsaeError unless the output of a block is read: `reader` knows nothing else."""
        if self.layer is None:
            raise TsaeError(
                f"{where}: reads {self.module or 'an unnamed place'} of {self.model}, and {reader} would feed it the "
                "output of a block; only dictionaries on a block's output can be exported to it"
            )


def origin_of(config: dict[str, Any], folder: Path) -> Origin:
    """The origin told by a config.json and, in our runs, by the provenance.json beside it.

    Raises TsaeError if it contradicts itself or names a place that is the output of no module.
    """
    trainer, buffer = config.get("trainer", {}), config.get("buffer") or {}
    record = written_of(RunFolder(folder))
    place = _place(trainer, buffer, str(RunFolder(folder).config_json))
    return Origin(
        model=place.model or UNKNOWN,
        layer=place.block,
        module=place.module or record.get("store", {}).get("model", {}).get("hook_path") or module_path(place),
        dataset=buffer.get("dataset"),
        context_length=buffer.get("ctx_len"),
        skip_positions=buffer.get("skip_positions"),
        prepends_bos=_prepends_bos(place.model or UNKNOWN, record),
        commit=record.get("tsae", {}).get("commit"),
    )


def require_same_place(config: RunConfig, written: dict[str, Any], folder: Path) -> None:
    """Raise TsaeError if `config` reads another place than the dictionary in `folder` was trained on.

    `written` is its config.json; what that does not tell is not compared.
    """
    trained, asked = origin_of(written, folder).place, Place.of(config)
    part = trained.difference(asked)
    if part is not None:
        raise TsaeError(
            f"{folder}: was trained on {trained.said(part)}, the configuration reads {asked.said(part)}; "
            "give the model and layer it was trained on"
        )


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises TsaeError if it is missing, malformed or no object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise TsaeError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or 'not UTF-8 text'}") from None
    except json.JSONDecodeError as error:
        raise TsaeError(f"{path}: line {error.lineno}: not valid JSON: {error.msg}") from None
    except (ValueError, RecursionError):
        raise TsaeError(f"{path}: not valid JSON: numbers or brackets without end") from None
    if not isinstance(value, dict):
        raise TsaeError(f"{path}: a JSON object is expected")
    return value


def _place(trainer: dict[str, Any], buffer: dict[str, Any], where: str) -> Place:
    """The place that a config.json names; a layer beside which it names no module is the output of that block."""
    model, layer, name = (trainer.get(key) for key in ("lm_name", "layer", "submodule_name"))
    if not (layer is None or (isinstance(layer, int) and layer >= 0)):
        raise TsaeError(f"{where}: layer is {layer!r}; the number of a block, counted from 0, is expected")
    if buffer.get("io", "out") != "out":
        raise TsaeError(
            f"{where}: buffer.io is {buffer['io']!r}; only dictionaries on a module's output can be used here"
        )
    if not name:
        return Place(model or None, layer)
    place = find_place(str(name), str(model or UNKNOWN), where)
    if str(name).startswith("resid_post_layer_") and layer not in (None, place.block):
        raise TsaeError(f"{where}: layer is {layer} and submodule_name {name}; correct the one that is wrong")
    return place._replace(model=model or None)


def _prepends_bos(model: str, record: dict[str, Any]) -> bool | None:
    setting = record.get("store", {}).get("settings", {}).get("data", {}).get("bos", "auto")
    if setting != "auto":
        return bool(setting == "always")
    name = model.lower().rpartition("/")[2]
    if name.startswith(("gemma", "llama", "mistral")):
        return True
    return False if name.startswith(("pythia", "gpt2", "qwen")) else None
