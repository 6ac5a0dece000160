"""The checkpoint layout: where every file of a run is.

    <checkpoints_path>/<run_name>/trainer_0/
        config.json  ae.pt  checkpoints/ae_<step>.pt        what the reference's scripts read
        resolved.yaml  provenance.json  metrics.jsonl  calibration.json  eval_results.json  resume/  kept/  ...

Nothing else in the package builds a path into a run folder.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import yaml

from tsae.config import run as configuration
from tsae.config import schema
from tsae.config.run import RunConfig
from tsae.runtime import files, metadata
from tsae.runtime.environment import process_rank
from tsae.runtime.errors import TsaeError
from tsae.runtime.metadata import COUNT, NATURAL

if TYPE_CHECKING:
    import torch

    from tsae.sae.dictionary import Dictionary

CALIBRATION = {
    **{
        "encode_rule": {"threshold", "top_k"},
        "threshold": float,
        "tracked_threshold?": float,
        "target_l0?": (None, float),
    },
    **{"before?": (None, dict), "after": {"l0": float, "fve?": float}},
}
SIZES = {f"{name}?": (None, COUNT) for name in ("k", "activation_dim", "dict_size")}
CONFIG = {
    "trainer": {"dict_class": object, **SIZES, "group_sizes?": (None, [COUNT]), "lm_name?": (None, str)},
    "buffer?": (None, {"ctx_len?": (None, COUNT), "dataset?": (None, str)}),
    "calibration?": CALIBRATION,
    "weights?": {str: [NATURAL]},
}
"""What is relied on of a config.json, whoever wrote it."""
RESULTS = {"made_from?": {str: str}, "half_width_95?": {str: (None, float)}}

BASELINE = "baseline_model"
"""The run name that stands for the language model's dense residual stream."""


class RunFolder:
    """Paths and small files of one run. Creating the object touches nothing on disk.

    What is measured on the run, and the locks on that, may lie in a folder of their own, `out`.
    """

    def __init__(self, path: str | Path, out: str | Path | None = None) -> None:
        self.path = Path(path)
        self.measured = self.path if out is None else Path(out)
        self.config_json = self.path / "config.json"
        self.weights = self.path / "ae.pt"
        self.resolved = self.path / "resolved.yaml"
        self.provenance = self.path / "provenance.json"
        self.metrics = self.path / "metrics.jsonl"
        self.progress = self.measured / "progress.json"
        self.eval_results = self.measured / "eval_results.json"
        self.calibration = self.path / "calibration.json"
        self.resume = self.path / "resume"
        self.kept = self.path / "kept"

    @classmethod
    def of(cls, checkpoints_path: str | Path, run_name: str) -> RunFolder:
        """The folder of run `run_name` below `checkpoints_path`."""
        return cls(Path(checkpoints_path) / run_name / "trainer_0")

    def checkpoint(self, step: int) -> Path:
        """Weights as they were before update `step`."""
        return self.path / "checkpoints" / f"ae_{step}.pt"

    def weights_at(self, checkpoint: int | str | None) -> Path:
        """The final weights, those of a step, or a weights file named relative to the folder."""
        if checkpoint is None:
            return self.weights
        by_step = isinstance(checkpoint, int) or checkpoint.isdecimal()
        return self.checkpoint(int(checkpoint)) if by_step else self.path / str(checkpoint)

    def result(self, name: str, suffix: str) -> Path:
        """`<name>.json` or `<name>.png` of an experiment on this run."""
        return self.measured / f"{name}.{suffix}"

    @property
    def takes_results(self) -> bool:
        """Whether anything may be written beside the results."""
        there = next(place for place in (self.measured, *self.measured.absolute().parents) if place.exists())
        return os.access(there, os.W_OK)

    def require_place(self) -> None:
        """Refuse to measure what could not be written down. Raises TsaeError."""
        if not self.takes_results:
            raise TsaeError(f"{self.measured}: nothing may be written there; name a folder for the results: --out DIR")

    def training_hash(self) -> str | None:
        """Hash of the settings that this folder belongs to; None while it belongs to none."""
        # A launcher asks thousands of folders, so the one line is found without reading the rest as YAML.
        try:
            text = self.resolved.read_text(encoding="utf-8")
        except FileNotFoundError:
            return None
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not UTF-8 text"
            raise TsaeError(f"{self.resolved}: cannot be read: {reason}") from None
        if wrong := metadata.yaml_fault(text):
            raise TsaeError(f"{self.resolved}: {wrong}")
        line = re.search(r"^training_hash:(.*)$", text, re.MULTILINE)
        if line is None:  # as in what was pushed to the hub
            schema.read_yaml(self.resolved)
        found = re.fullmatch(r"(['\"]?)(\w+)\1", line[1].strip()) if line else None
        if line and not found:
            raise TsaeError(f"{self.resolved}: training_hash: {line[1].strip()}: damaged; restore the file from a copy")
        return found[2] if found else ""

    def as_begun(self, config: RunConfig) -> RunConfig:
        """`config`, with what it leaves open as it was when this folder's run was begun, perhaps by an earlier version."""
        begun = self.training_hash()
        if begun in (None, config.training_hash):
            return config
        return next((old for old in configuration.earlier_meanings(config) if old.training_hash == begun), config)

    def differences(self, config: RunConfig) -> str | None:
        """In which settings this folder's training differs from that of `config`, in words.

        None if it is the same, or if the folder states none, as files that came from elsewhere.
        """
        if self.training_hash() in (None, config.training_hash):
            return None
        there, here = (configuration.training_settings(each) for each in (self.load_config(), config))
        return schema.differences(there, here) or "another version of tsae made it"

    def onward(self, different: str) -> str:
        """How to train on from this folder's weights, where the steps are all that is `different`; else nothing."""
        if not self.weights.exists() or ";" in different or not different.startswith("training.steps is "):
            return ""
        return (
            f"; another name with training.init_from={self.path.parent} trains on from its weights, and with "
            "training.keep_state=true from the start a run goes on when its steps are raised"
        )

    def shorter(self, config: RunConfig) -> RunConfig | None:
        """The same configuration with as many steps as those after which this folder keeps a state, if it has more."""
        steps = [
            int(found[1]) for found in (re.fullmatch(r"step_(\d+)", path.name) for path in self.kept.glob("*")) if found
        ]
        if not steps or steps[0] >= config.training.steps:
            return None
        shorter = configuration.replace(config, training={"steps": steps[0]})
        return shorter if self.training_hash() in (shorter.training_hash, config.training_hash) else None

    def require_same_training(self, config: RunConfig) -> None:
        """Refuse a run that was trained with other settings; files that came from elsewhere state none."""
        different = self.differences(config)
        if different is not None:
            raise TsaeError(
                f"{self.path}: was trained with another configuration ({different}); "
                f"give the settings it was trained with: they are in {self.resolved}"
            )

    def require_free(self, config: RunConfig) -> None:
        """Refuse a folder that belongs to another training configuration, unless it is to go on with more steps."""
        different = self.differences(config)
        if different is not None and self.shorter(config) is None:
            raise TsaeError(
                f"{self.path}: holds a run of another configuration ({different}); "
                f"choose another run name or remove the folder{self.onward(different)}"
            )
        if self.training_hash() is None and self.weights.exists():
            raise TsaeError(f"{self.path}: holds weights but no resolved.yaml; choose another run name")

    def claim(self, config: RunConfig) -> None:
        """Write resolved.yaml, or refuse a folder that belongs to another training configuration."""
        self.require_free(config)
        if self.training_hash() != config.training_hash:
            tree = {"training_hash": config.training_hash, **configuration.to_yaml(config)}
            files.write_text(self.resolved, metadata.sealed_yaml(yaml.safe_dump(tree, sort_keys=False)))

    def remove_leftovers(self, *names: str) -> None:
        """Remove half-written files of killed processes, of all files or of those whose names begin so.

        For the process that alone may write them: it holds the lock.
        """
        for folder in {self.path, self.measured, self.checkpoint(0).parent}:
            for name in names or ("",):
                for leftover in folder.glob(f".{name}*.tmp"):
                    leftover.unlink(missing_ok=True)

    def end(self, config: RunConfig) -> None:
        """Remove what only an unfinished run needs; the state after its last step stays, if it is to be kept.

        Of several processes that call this, the first one does it.
        """
        if process_rank() > 0:
            return
        name = f"step_{config.training.steps}"
        if config.training.keep_state and (self.resume / name).exists():
            for other in self.resume.glob("step_*"):
                if other.name != name:
                    shutil.rmtree(other)
            shutil.rmtree(self.kept, ignore_errors=True)
            os.replace(self.resume, self.kept)
        elif not (self.kept / name).exists():  # what is kept is of fewer steps
            shutil.rmtree(self.kept, ignore_errors=True)
        shutil.rmtree(self.resume, ignore_errors=True)

    def load_config(self) -> RunConfig:
        """The resolved configuration this folder was made with."""
        return configuration.load_resolved(self.resolved)

    def is_trained(self, config: RunConfig) -> bool:
        """Whether final weights of exactly this training configuration are here."""
        found = self.training_hash() if self.weights.exists() else None
        return found is not None and found == config.training_hash

    def read_config(self) -> dict[str, Any]:
        """The content of config.json. Raises TsaeError if it is missing, damaged or edited."""
        return metadata.read(self.config_json, CONFIG)

    def read_results(self) -> dict[str, Any]:
        """The content of eval_results.json; an empty mapping if there is none, or a damaged one."""
        return metadata.whole(self.eval_results, RESULTS)


def save_run(
    run: RunFolder,
    config: dict[str, Any],
    dictionary: Dictionary,
    step: int | None = None,
    scale: float = 1.0,
    shift: torch.Tensor | None = None,
) -> None:
    """Write the final weights, or those of a `step`, and before them `config` as config.json.

    That gets the CRC-32C of each weights file under "weights"; of weights that are replaced it keeps the old one, too,
    should this process die in between.
    """
    path = run.weights_at(step)
    name = path.relative_to(run.path).as_posix()
    before = config.get("weights", {}).get(name, [])[:1]

    def announce(checksum: int) -> None:
        config["weights"] = {
            **config.get("weights", {}),
            name: [checksum, *(other for other in before if other != checksum)],
        }
        metadata.write(run.config_json, config)

    save_dictionary(path, dictionary, scale, shift, announce)


def of_new_weights(config: dict[str, Any]) -> dict[str, Any]:
    """The content of a config.json for weights that are written anew elsewhere: nothing of the old files stays in it."""
    return {key: entry for key, entry in config.items() if key != "weights"}


def save_dictionary(
    path: Path,
    dictionary: Dictionary,
    scale: float = 1.0,
    shift: torch.Tensor | None = None,
    announce: Callable[[int], object] | None = None,
) -> None:
    """Write the reference's plain state dict, atomically; for activations `scale` · x + `shift` where it knows x.

    `announce` is told its CRC-32C before it is there.
    """
    from tsae.runtime.checksums import Checksum

    state, checksum = dictionary.to_file(scale, shift), Checksum()

    def write(stream: BinaryIO) -> None:
        checksum.save(state, stream)
        if announce is not None:
            announce(checksum.value)

    files.write_atomically(path, write)


def load_dictionary(
    path: str | Path,
    device: str | torch.device = "cpu",
    checkpoint: int | str | None = None,
    *,
    calibrated: bool = True,
) -> tuple[Dictionary, dict[str, Any]]:
    """The dictionary in a run folder (or hub repository) and the content of its config.json.

    `path` is a folder that holds config.json and ae.pt, one whose trainer_0/ does, or a hub id `owner/name`;
    `checkpoint` a step number, or a weights file relative to the folder. Raises TsaeError for an unknown class,
    wrong tensors, non-finite weights, a config.json that contradicts the weights, files that are not plain tensors,
    and (unless not `calibrated`) a threshold that was never set or not recorded to its end.
    """
    folder = find_dictionary(path)
    config = RunFolder(folder).read_config()
    trainer = config["trainer"]
    weights = RunFolder(folder).weights_at(checkpoint)
    state = _read_weights(weights, config.get("weights", {}).get(os.path.relpath(weights, folder), []))
    from tsae.sae.kinds import AutoEncoderTopK, from_state

    dictionary = from_state(trainer.get("dict_class"), state, trainer.get("k"), str(weights))
    _require_agreement(dictionary, trainer, str(weights))
    # A calibration is one of the final weights.
    calibration = config.get("calibration") if checkpoint is None else None
    if calibration and isinstance(dictionary, AutoEncoderTopK):
        dictionary.rule = calibration["encode_rule"]
    if calibrated:
        dictionary.require_calibrated(str(weights))
        if calibration and dictionary.scalar_threshold != calibration["threshold"]:
            raise TsaeError(
                f"{weights}: the threshold is {dictionary.scalar_threshold}, config.json records "
                f"{calibration['threshold']}: a calibration was interrupted; run it again: tsae calibrate {path}"
            )
    return dictionary.to(device).eval().requires_grad_(False), config


def _require_agreement(dictionary: Dictionary, trainer: dict[str, Any], where: str) -> None:
    """Refuse sizes in config.json that are not those of the weights; older files do not carry all of them."""
    for key in ("activation_dim", "dict_size", "group_sizes"):
        found = getattr(dictionary, key)
        found = list(found) if key == "group_sizes" else found
        if trainer.get(key, found) != found:
            raise TsaeError(f"{where}: {key} is {found} in the weights and {trainer[key]} in config.json; one is wrong")


def find_dictionary(path: str | Path) -> Path:
    """The folder with config.json and ae.pt behind a run folder or a hub id (fetched, or found in the hub's cache).

    Raises TsaeError if there is none.
    """
    local = Path(path)
    for folder in (local, local / "trainer_0"):
        if (folder / "config.json").is_file():
            return folder
    if (local / "cfg.json").is_file():
        raise TsaeError(f"{path}: a folder of SAELens; make a run of it first: tsae import {path} --out RUN")
    if local.exists() or str(path).count("/") != 1 or str(path).startswith((".", "/", "~")):
        raise TsaeError(
            f"{path}: no config.json here nor in trainer_0/; a run folder or a hub id owner/name is expected"
        )
    snapshot = fetch(str(path), ["*.json", "*.pt"])
    for folder in (snapshot, snapshot / "trainer_0"):
        if (folder / "config.json").is_file():
            return folder
    raise TsaeError(f"{path}: the hub repository holds no config.json and no trainer_0/config.json")


def fetch(repo_id: str, patterns: list[str], revision: str | None = None) -> Path:
    """The folder in the hub's cache with the files of a repository that match. Raises TsaeError."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise TsaeError(f"{repo_id}: neither a folder here nor reachable on the hub: {reason}") from None


def _read_weights(path: Path, checksums: list[int]) -> dict[str, torch.Tensor]:
    """The tensors in a file that has one of these CRC-32C, if any are known."""
    import pickle

    import torch

    from tsae.runtime.checksums import checksum_of

    if not path.is_file():
        others = sorted(p.stem.removeprefix("ae_") for p in path.parent.glob("*.pt"))
        raise TsaeError(f"{path}: no such weights; found here: {', '.join(others) or 'none'}")
    _check_archive(path)
    if checksums and checksum_of(path) not in checksums:
        raise TsaeError(
            f"{path}: not the weights that config.json beside it was written for: changed, or of another run; restore them, or take "
            "`weights` and `digest` out of config.json if they were changed on purpose"
        )
    try:
        # Mapped, so that a tensor is in memory once, and only when it is used.
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError:
        raise TsaeError(f"{path}: holds more than tensors and might run code when loaded; refused") from None
    except (RuntimeError, OSError, EOFError, ValueError, LookupError, TypeError, AttributeError) as error:
        reason = (str(error) or "it ends too early").splitlines()[0]
        raise TsaeError(f"{path}: not a readable weights file: {reason}") from None
    if not (isinstance(state, dict) and all(_is_plain(value) for value in state.values())):
        raise TsaeError(f"{path}: a plain state dict of dense tensors is expected")
    return state


def _is_plain(value: object) -> bool:
    import torch

    return isinstance(value, torch.Tensor) and value.layout == torch.strided and not value.is_meta


def _check_archive(path: Path) -> None:
    """Compare every record with its checksum, which torch does not; a flipped byte would be a wrong weight."""
    import zipfile

    with path.open("rb") as stream:
        if stream.read(2) != b"PK":
            raise TsaeError(
                f"{path}: not torch's zip format: without checksums, and might run code when loaded; refused; if it is one "
                "of torch's first format, torch.save(torch.load(path, weights_only=True), path) makes a new one of it"
            )
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, OSError) as error:
        raise TsaeError(f"{path}: not a readable weights file: it is cut off or damaged ({error})") from None
    if damaged is not None:
        raise TsaeError(f"{path}: damaged: the record {damaged} fails its checksum; restore the file or train again")
