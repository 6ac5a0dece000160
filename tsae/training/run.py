"""The training loop: store in, checkpoints and metrics out, resumable after a kill at any moment."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from tsae import files, schema
from tsae.checkpoint import RunFolder, reference_config, save_dictionary
from tsae.config import RunConfig
from tsae.errors import TsaeError
from tsae.progress import Progress
from tsae.provenance import provenance
from tsae.store.layout import store_path
from tsae.store.pairs import PairStream
from tsae.store.reader import Store
from tsae.training.trainer import Terms, Trainer

KEEP_RESUME_STATES = 2


def train(config: RunConfig, run: RunFolder) -> None:
    """Train the dictionary of `config` into `run`; continues what an earlier call left, does nothing when complete."""
    if run.is_trained(config):
        return
    settings = config.training
    accelerator = _accelerator(config, run)
    store = Store.open(store_path(config), config)
    run.claim(config)
    files.write_json(run.provenance, provenance(config, store=store.attributes))

    trainer = Trainer(
        config, store.activation_dim, device=accelerator.device, mean_squared_norm=store.mean_squared_norm
    )
    files.write_json(run.config_json, reference_config(config, store.activation_dim, trainer.scale))
    metrics = Metrics(run.metrics, offset=_resume(run, trainer))
    stream = PairStream(
        store,
        settings.pair_rule,
        settings.batch_size,
        settings.seed,
        skip_positions=config.data.skip_positions,
        pool_sequences=settings.pool_sequences,
    )
    progress = Progress(f"train {run.path.parent.name}", settings.steps, "steps", run.progress, trainer.steps_done)
    for batch in stream.iterate(trainer.steps_done, settings.steps):
        step = trainer.steps_done
        if step in settings.save_steps:
            save_dictionary(run.checkpoint(step), trainer.dictionary, trainer.scale)
        with accelerator.autocast():
            terms = trainer.step(batch.to(accelerator.device, non_blocking=True))
        if step % settings.log_every == 0 or step + 1 == settings.steps:
            measures = _measures(step, terms, config)
            metrics.append(measures)
            accelerator.log({name: value for name, value in measures.items() if name != "step"}, step=step)
            rate = progress.rate(step + 1) * settings.batch_size
            shown = ("loss", "l2_loss", "temp_loss", "auxk_loss", "l0", "fve", "dead_percent")
            progress.update(step + 1, **{"tokens/s": rate}, **{name: measures[name] for name in shown})
        if settings.resume_every and (step + 1) % settings.resume_every == 0 and step + 1 < settings.steps:
            _save_resume(run, trainer, metrics.sync())
    metrics.sync()
    accelerator.end_training()
    save_dictionary(run.weights, trainer.dictionary, trainer.scale)
    shutil.rmtree(run.resume, ignore_errors=True)


def _accelerator(config: RunConfig, run: RunFolder) -> Accelerator:
    settings = config.training
    for tracker in settings.trackers:
        if importlib.util.find_spec(tracker) is None:
            raise TsaeError(f"training.trackers: {tracker} is not installed; pip install 'tsae[{tracker}]'")
    accelerator = Accelerator(
        cpu=settings.device == "cpu",
        mixed_precision=settings.precision,
        log_with=list(settings.trackers) or None,
        project_dir=str(run.path),
    )
    if settings.trackers:
        accelerator.init_trackers("tsae", config=_flat(schema.to_plain(config)))
    return accelerator


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` → `{"a.b": 1}`; what trackers cannot store becomes text."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value if isinstance(value, (int, float, str, bool)) else str(value)
    return flat


def _measures(step: int, terms: Terms, config: RunConfig) -> dict[str, float]:
    """One line of metrics.jsonl: the terms of update `step`. No clock in it, so that a resumed run writes the same."""
    values = {name: float(value) for name, value in terms._asdict().items()}
    values["l0"] = values.pop("n_active") / config.training.batch_size
    values["dead_percent"] = 100 * values.pop("dead_features") / config.sae.dict_size
    return {"step": step, "tokens": (step + 1) * config.training.batch_size, **values}


class Metrics:
    """metrics.jsonl, appended line by line; an earlier attempt's lines past its last resumable state are cut off."""

    def __init__(self, path: Path, offset: int) -> None:
        path.touch()
        self._stream = path.open("r+b")
        self._stream.truncate(offset)
        self._stream.seek(offset)

    def append(self, measures: dict[str, float]) -> None:
        """Add one line."""
        self._stream.write((json.dumps(measures) + "\n").encode())
        self._stream.flush()

    def sync(self) -> int:
        """Bring the file to the disk; returns its length in bytes."""
        files.sync_stream(self._stream)
        return self._stream.tell()


def _save_resume(run: RunFolder, trainer: Trainer, metrics_bytes: int) -> None:
    state = {**trainer.state(), "metrics_bytes": metrics_bytes}
    folder = run.resume / f"step_{trainer.steps_done}"
    files.write_atomically(folder / "state.pt", lambda stream: torch.save(state, stream))
    files.write_atomically(run.resume / "latest", lambda stream: stream.write(folder.name.encode()))
    states = sorted(run.resume.glob("step_*"), key=lambda path: int(path.name.removeprefix("step_")))
    for stale in states[:-KEEP_RESUME_STATES]:
        shutil.rmtree(stale)


def _resume(run: RunFolder, trainer: Trainer) -> int:
    """Load the last resumable state, if any; returns the length of metrics.jsonl at that moment."""
    latest = run.resume / "latest"
    if not latest.exists():
        return 0
    path = run.resume / latest.read_text() / "state.pt"
    state = torch.load(path, map_location="cpu", weights_only=True)
    trainer.load_state(state)
    return int(state["metrics_bytes"])
