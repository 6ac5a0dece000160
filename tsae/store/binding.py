"""What a run was made from, and what its results are about: the identities that tie a number to what was measured.

    data       hash of settings, text and language model: the store that the run was trained on     (provenance.json)
    weights    content of the weights file, and the rule by which config.json has it encode
    model      content of the language model's files; of a hub model, its commit

Text and models may be edited after a training. The run stays what it was, so whoever would go on with it or measure it
compares, and refuses by name; `--accept-new-data` records in the run that it is measured on what is there now.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from tsae.checkpoint import CONFIG, RunFolder
from tsae.config import schema
from tsae.config.run import RunConfig
from tsae.config.sections import ModelConfig
from tsae.lm.source import cached_commit, fingerprint_before, weights_fingerprint
from tsae.runtime import contents, metadata
from tsae.runtime.errors import TsaeError
from tsae.store.layout import (
    StoreLayout,
    changed,
    content_hash,
    hash_before,
    sources,
    store_path,
    untouched_since,
)

_KNOWN = {"identity": str, "sources": (None, {str: str}), "contexts?": object, "commit?": (None, str)}
PROVENANCE = {
    "data?": {**_KNOWN, "accepted?": _KNOWN},
    "store?": {"model?": dict, "contexts?": object, "config_hash?": str, "settings?": (None, dict)},
    "norm_limit?": (None, float),
    "tsae?": {str: str},
}
"""What is relied on of a provenance.json."""

DECIDING = ("dict_class", "k", "activation_dim", "dict_size", "group_sizes", "group_fractions")
"""Of config.json's trainer, what decides how the weights encode."""


def record(config: RunConfig) -> dict[str, Any]:
    """What is written down of the data that a run is trained or, from now on, measured on."""
    return {"identity": content_hash(config), "sources": sources(config), **_of_store(config)}


def _of_store(config: RunConfig) -> dict[str, Any]:
    """Of the store that is there, what no look at files can tell: its text, and the commit of a hub model."""
    layout = StoreLayout(store_path(config))
    if not layout.exists():
        return {}
    attributes = layout.attributes
    return {"contexts": attributes.get("contexts"), "commit": (attributes.get("model") or {}).get("revision")}


def data_identity(run: RunFolder, config: RunConfig) -> str:
    """The data that results of `run` are about: what it was trained on, or was accepted since; of a run from elsewhere,
    what `config` names."""
    made = _recorded(run)
    if not made:
        return content_hash(config)
    return schema.stable_hash([made["identity"], made.get("contexts"), made.get("commit")])


def measured_data(run: RunFolder, config: RunConfig) -> str:
    """The same, alike for runs of ours and from elsewhere, whichever version recorded it; what has changed since is another."""
    with suppress(TsaeError):  # a text or a model that is gone: the run says what it was
        if not difference(run, config):
            return schema.stable_hash([content_hash(config), _of_store(config)])
    return data_identity(run, config)


def is_measured_elsewhere(run: RunFolder) -> bool:
    """Whether the run is measured on other data than it was trained on, as somebody accepted."""
    return "accepted" in _trained_on(run)


def difference(run: RunFolder, config: RunConfig) -> str:
    """In words, what is not as it was when `run` was trained, begun or last accepted; nothing if all is, or nothing is known."""
    made = _recorded(run) if run.weights.exists() or run.resume.exists() else {}
    if not made:
        return ""
    known_by_size = made["sources"] is None and made["identity"] == hash_before(config)
    untouched = known_by_size and untouched_since(config, run.provenance.stat().st_mtime)
    if made["identity"] != content_hash(config) and not untouched:
        return changed(made["sources"], config)
    # A hub's branches move, and older versions held out by another rule: a store may be there that is not the run's.
    now = _of_store(config)
    if any(made.get(key, value) != value for key, value in now.items()):
        words = (
            "other text or other held-out documents" if made.get("contexts") != now["contexts"] else "another commit"
        )
        return f"{store_path(config)}: was harvested anew, with {words}"
    return ""


def require_unchanged(run: RunFolder, config: RunConfig) -> None:
    """Refuse a run whose text or language model is not what it was trained on. Raises TsaeError that names it."""
    what = difference(run, config)
    if what:
        raise TsaeError(
            f"{run.path}: was trained on other data: {what}; "
            + (
                "train under another name, or measure it on what is there now with --accept-new-data"
                if run.weights.exists()
                else "train under another name, or remove the folder"
            )
        )


def require_same_model(run: RunFolder, config: RunConfig) -> None:
    """Refuse a run whose language model is not the one it was trained on, whatever became of its text. Raises TsaeError."""
    made = _recorded(run)
    if config.without_text or not made:
        return
    if made["sources"] is None:
        before = written_of(run)["store"]["model"].get("weights")
        same = before == fingerprint_before(config.model)
    else:
        same = made["sources"].get("weights") == weights_fingerprint(config.model)
    if not same:
        raise TsaeError(
            f"{run.path}: was trained on another language model: model.name: {config.model.name} has another content now; "
            "restore it, or measure the run with what is there now with --accept-new-data"
        )


def require_sound(run: RunFolder) -> None:
    """Refuse a run whose config.json or provenance.json is not what was written. Raises TsaeError that names the file."""
    written_of(run)
    if run.config_json.exists():
        run.read_config()


def inexact(run: RunFolder) -> dict[str, Any]:
    """What results of `run` say if its training went on with other versions of what computes it (`--inexact`)."""
    said = written_of(run).get("inexact")
    return {"trained_inexactly": said} if said else {}


def accept(run: RunFolder, config: RunConfig) -> None:
    """Have `run` measured on the data that `config` names now; its provenance.json says so. Raises TsaeError without weights."""
    if not difference(run, config):
        return
    if not run.weights.exists():
        require_unchanged(run, config)
    written = written_of(run)
    trained = {key: value for key, value in _trained_on(run).items() if key != "accepted"}
    now = record(config)
    same = all(trained.get(key) == value for key, value in now.items() if key != "sources")
    written["data"] = trained if same else {**trained, "accepted": now}
    metadata.write(run.provenance, written)


def weights_identity(run: RunFolder, checkpoint: str | None = None) -> str:
    """Of the final weights or an intermediate checkpoint: content, threshold and encode rule; empty where there are none."""
    weights = run.weights_at(checkpoint)
    if not weights.exists():
        return ""
    written = metadata.present(run.config_json, CONFIG)
    trainer, calibration = written.get("trainer"), written.get("calibration") if checkpoint is None else None
    deciding = None if trainer is None else {name: trainer.get(name) for name in DECIDING}
    rule = {name: calibration.get(name) for name in ("encode_rule", "threshold")} if calibration else None
    return schema.stable_hash([contents.sha256_of(weights), deciding, rule])


def model_identity(model: ModelConfig, run: RunFolder) -> str:
    """The language model that `run` is measured with: the content of its files, or the commit of a hub model."""
    fingerprint = weights_fingerprint(model)
    commit = commit_of(run) or cached_commit(model)
    return f"{fingerprint} {commit}" if commit else fingerprint


def commit_of(run: RunFolder) -> str | None:
    """The commit of the hub model that `run` is measured with; None for other models and where it is not known."""
    commit = _recorded(run).get("commit")
    return None if commit is None else str(commit)


def _recorded(run: RunFolder) -> dict[str, Any]:
    """What the run is measured on by its provenance; empty for a run from elsewhere."""
    trained = _trained_on(run)
    return dict(trained.get("accepted", trained))


def written_of(run: RunFolder) -> dict[str, Any]:
    """The content of a run's provenance.json; empty for a run from elsewhere. Raises TsaeError if it is damaged."""
    return metadata.present(run.provenance, PROVENANCE)


def _trained_on(run: RunFolder) -> dict[str, Any]:
    """The entry `data` of a run's provenance.json; of one from before there was one, made from its store."""
    written = written_of(run)
    if "data" in written:
        return dict(written["data"])
    store = written.get("store")
    if not store:
        return {}
    told = {"contexts": store.get("contexts"), "commit": store.get("model", {}).get("revision")}
    return {"identity": store["config_hash"], "sources": None, **told}
