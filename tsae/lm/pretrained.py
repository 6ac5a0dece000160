"""Loading through transformers, and in one line what is wrong with files that do not load."""

from __future__ import annotations

import dataclasses
import json
import logging
import tempfile
import zipfile
from contextlib import redirect_stderr
from importlib.metadata import version
from io import StringIO
from pathlib import Path
from typing import Any

from tsae.config.sections import ModelConfig
from tsae.lm.source import cached_commit, local_path
from tsae.runtime.errors import TsaeError

LONGEST_REASON = 200  # characters
log = logging.getLogger("tsae")
RUNS_CODE = {
    "trust_remote_code": "it has code of its own, which is never run here; a model that transformers itself knows is expected",
    "Weights only load failed": "its pickle holds more than tensors, and none of it was run; weights as safetensors are expected",
}
"""What a library says where loading would run a stranger's code → what is said instead."""
POINTER = b"version https://git-lfs"
"""How the small text begins that git-lfs leaves in the place of a large file."""


def from_pretrained(auto: Any, model: ModelConfig, needed: str, commit: str | None, **options: Any) -> Any:
    """What `auto.from_pretrained` makes of a model's folder, GGUF file or hub id; `needed` says what a folder must hold.

    A hub model is read at `commit` if that is given, with a warning where its branch is another one by now.

    Raises TsaeError with the damaged file, where there is one, or else with the library's own reason.
    """
    options["trust_remote_code"] = False  # by default transformers asks at a terminal, and runs it on a y
    local = local_path(model)
    at = dataclasses.replace(model, revision=commit or model.revision)
    now = cached_commit(model)
    if commit and now not in (None, commit):
        log.warning(
            "%s is read at commit %s, with which this was made; %s is %s by now, and model.revision=%s reads that",
            model.name, commit, model.revision or "its main branch", now, now,
        )  # fmt: skip
    try:
        if local is None:
            return auto.from_pretrained(model.name, revision=at.revision, **options)
        if local.is_file():
            return _from_gguf(auto, local, options)
        return auto.from_pretrained(str(local), local_files_only=True, **options)
    except Exception as error:  # whatever a library makes of files that are wrong
        said = " ".join(str(error).split())
        if not said or not isinstance(error, (OSError, ValueError, ImportError)):
            said = f"{type(error).__name__}: {said}"
        said = next((why for words, why in RUNS_CODE.items() if words in said), said)
        reason = said if len(said) <= LONGEST_REASON else f"{said[:LONGEST_REASON]}…"
        made_with = f" at commit {commit}, with which this was made," if local is None and commit else ""
        raise TsaeError(
            f"model.name: {model.name}{made_with} cannot be loaded: {reason} ({_remedy(at, local, needed)})"
        ) from error


def _from_gguf(auto: Any, file: Path, options: dict[str, Any]) -> Any:
    """By way of a folder that holds nothing else, for transformers also reads what lies beside the file."""
    # It shows a bar of its own, which no setting turns off.
    with tempfile.TemporaryDirectory(prefix="tsae-gguf-") as folder, redirect_stderr(StringIO()):
        (Path(folder) / file.name).symlink_to(file.absolute())
        return auto.from_pretrained(folder, gguf_file=file.name, local_files_only=True, **options)


def require_complete(model: ModelConfig, info: dict[str, Any]) -> None:
    """Refuse weights of which the loading said that some would be random. Raises TsaeError with the first of them."""
    missing = sorted(info["missing_keys"])
    if missing:
        raise TsaeError(
            f"model.name: the weights of {model.name} lack {len(missing)} tensors ({missing[0]}, …), which would be "
            "random; name a complete causal language model"
        )
    mismatched = sorted(info["mismatched_keys"])
    if mismatched:
        name, found, expected = mismatched[0]
        raise TsaeError(
            f"model.name: {len(mismatched)} tensors of {model.name} have another shape than its config.json asks for: "
            f"{name} is {list(found)}, not {list(expected)}"
        )


def _remedy(model: ModelConfig, local: Path | None, needed: str) -> str:
    from huggingface_hub import constants, try_to_load_from_cache

    if local and local.is_file():
        return f"transformers {version('transformers')} cannot read this GGUF file; try the model's folder in the hub's format"
    cached = None if local else try_to_load_from_cache(model.name, "config.json", revision=model.revision)
    if local or isinstance(cached, str):
        damage = next(filter(None, map(_damage, sorted((local or Path(str(cached)).parent).iterdir()))), None)
        if damage:
            return damage
    if local:
        return f"the folder needs {needed}"
    if constants.HF_HUB_OFFLINE:
        at = f" --revision {model.revision}" if model.revision else ""
        return f"offline: run `hf download {model.name}{at}` on a machine with network and the same HF_HOME"
    return "check the id, the revision and HF_TOKEN"


def _damage(path: Path) -> str | None:
    """What is wrong with a file of a model folder, and what to do; None for one that can be read, or of another kind."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        return None
    with open(path, "rb") as stream:
        if stream.read(len(POINTER)) == POINTER:
            return f"{path.name} is a git-lfs pointer, not the file itself: run `git lfs pull` where it came from"
    try:
        if path.suffix == ".json":
            json.loads(path.read_bytes())
        elif path.suffix == ".safetensors":
            with safe_open(path, "pt"):
                pass
        elif path.suffix == ".bin" and not zipfile.is_zipfile(path):
            raise ValueError
    except (ValueError, SafetensorError):
        return f"{path.name} is damaged or was cut off: copy it again"
    return None
