"""The settings of a run, whoever trained it: what every command that measures one goes by.

A run of ours has them in its resolved.yaml. Of an imported or another program's run, its config.json tells the language
model, the place that is read and the contexts; text is what the command line names, or what the store that it names was
harvested from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tsae.checkpoint import RunFolder, find_dictionary
from tsae.config import run as configuration
from tsae.config import schema
from tsae.config.paths import restored
from tsae.config.run import RunConfig
from tsae.interop.origin import origin_of
from tsae.interop.place import Place
from tsae.runtime.environment import home
from tsae.runtime.errors import TsaeError, suggestion
from tsae.store.layout import StoreLayout

FREE = ("model.device", "model.batch_size", "training.device")
"""Settings of a trained run that a command may change: where things run."""
MEASURES = ("evaluation.", "experiments.")
FREE_ELSEWHERE = (
    "data.",
    "store.",
    "model.name",
    "model.layer",
    "model.revision",
    "model.dtype",
    "model.attn_implementation",
)
"""Of a run from elsewhere, what its files do not tell."""
UNSAID = Place(None, None)
TEXT = {"max_tokens": 500_000, "holdout": 0.5}
"""How much of a text is read for a run that was trained on another one, all of which counts as held out for it."""


def find_run(name: str | Path, checkpoints: Path, out: Path | None = None) -> RunFolder:
    """The run of that name below `checkpoints`, or in the folder of that path; what is measured on it goes to `out`.

    Raises TsaeError, with the names there are, for what is neither.
    """
    for place in (checkpoints / name, Path(name)):
        if place.is_dir():
            return RunFolder(find_dictionary(place), out)
    runs = sorted(folder.parent.name for folder in checkpoints.glob("*/trainer_0"))
    raise TsaeError(
        f"{name}: neither a folder nor a run in {checkpoints}; {suggestion(name, runs)}runs found: "
        f"{', '.join(runs) or 'none'}"
    )


def find_beside(run: RunFolder, name: str) -> RunFolder:
    """The run that is called `name` beside `run`, or anywhere, or the one in that folder. Raises TsaeError."""
    places = (run.path.parents[1], home() / "checkpoints")
    return find_run(name, next((place for place in places if (place / name).is_dir()), places[-1]))


def settings_of(
    run: RunFolder,
    extra: Mapping[str, Any] | None = None,
    used: Sequence[str] = (),
    asked: Place = UNSAID,
) -> RunConfig:
    """The configuration by which `run` is measured, with `extra` settings by key path.

    `used` names the sections that must be wholly known, `asked` the model and layer that the command line names.
    Raises TsaeError for settings that the run itself decides, and for a place that contradicts it or is not known.
    """
    extra = extra or {}
    asked = Place(
        asked.model or extra.get("model.name"), extra.get("model.layer") if asked.block is None else asked.block
    )
    ours = run.resolved.exists()
    config = configuration.load_resolved(run.resolved, used) if ours else None
    trained = Place.of(config) if config else origin_of(run.read_config(), run.path).place
    part = trained.difference(asked)
    if part is not None:
        given = asked.model if part == "model" else asked.block
        raise TsaeError(f"--{part} {given}: {run.path} was trained on {trained.said(part)}; leave --{part} out")
    tree = schema.to_plain(config) if config else _told(run, trained, asked, extra)
    free = FREE if ours else (*FREE, *FREE_ELSEWHERE)
    for key in extra:
        if not key.startswith(MEASURES + tuple(name for name in free if name.endswith("."))) and key not in free:
            allowed = ", ".join(f"{name}…" if name.endswith(".") else name for name in (*MEASURES, *free))
            raise TsaeError(f"command line: {key}: was decided when the run was trained; allowed: {allowed}")
    return configuration.from_mapping(configuration.lay_over(tree, extra), "command line")


def _told(run: RunFolder, trained: Place, asked: Place, extra: Mapping[str, Any]) -> dict[str, Any]:
    """What a run from elsewhere tells, as a tree of settings; flags fill in what it leaves out."""
    model, layer = asked.model or trained.model, asked.block if trained.block is None else trained.block
    if model is None or (layer is None and trained.module is None):
        missing, key = ("model", "name") if model is None else ("layer", "layer")
        raise TsaeError(f"{run.config_json}: does not tell the {missing}; give --{missing} or model.{key}=…")
    place = {"hook_point": trained.module} if layer is None else {"layer": layer}
    if "store.path" in extra and StoreLayout(extra["store.path"]).exists():
        return _of_store(
            StoreLayout(extra["store.path"]), run, Place(model, layer, None if layer is not None else trained.module)
        )
    written = run.read_config()
    origin = origin_of(written, run.path)
    prepended = (written.get("sae_lens") or {}).get("prepend_bos")
    data = {
        **TEXT,
        "context_length": origin.context_length,
        "skip_positions": origin.skip_positions,
        "bos": None if prepended is None else "always" if prepended else "never",
    }
    told = {key: value for key, value in data.items() if value is not None}
    return {"model": {"name": model, **place}, "data": told}


def _of_store(layout: StoreLayout, run: RunFolder, trained: Place) -> dict[str, Any]:
    """The settings that a store was harvested with, as a tree. Raises TsaeError for one of another place."""
    tree = {name: dict(section) for name, section in layout.attributes["settings"].items()}
    for key, path in layout.attributes.get("paths", {}).items():
        section, _, name = key.partition(".")
        tree[section][name] = restored(path, tree[section][name])
    found = Place.of(configuration.from_mapping(tree, str(layout.path)))
    part = trained.difference(found)
    if part is not None:
        raise TsaeError(
            f"{layout.path}: holds {found.said(part)}, {run.path} was trained on {trained.said(part)}; name another "
            "store.path, or a new one"
        )
    return tree
