"""The training loop: store in, checkpoints and metrics out, resumable after a kill at any moment."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from tsae import files, schema
from tsae.checkpoint import RunFolder, save_dictionary
from tsae.config import RunConfig, reading_settings
from tsae.errors import TsaeError
from tsae.progress import Progress
from tsae.provenance import provenance
from tsae.reference import reference_config
from tsae.store.layout import store_path
from tsae.store.pairs import PairStream
from tsae.store.reader import Store
from tsae.training.trainer import Terms, Trainer

KEEP_RESUME_STATES = 2
SHOWN = ("loss", "l2_loss", "temp_loss", "auxk_loss", "l0", "fve", "dead_percent")


def train(config: RunConfig, run: RunFolder) -> None:
    """Train the dictionary of `config` into `run`; continues what an earlier call left, does nothing when complete."""
    train_together([(config, run)])


def train_together(runs: Sequence[tuple[RunConfig, RunFolder]]) -> None:
    """Train several dictionaries on the same batches, which are read once; each comes out as if trained alone.

    Runs that are complete are skipped. One that fails does not stop the others; the first error is raised at the end.
    Raises TsaeError if the runs would not read the same batches.
    """
    pending = [(config, run) for config, run in runs if not run.is_trained(config)]
    if not pending:
        return
    config = pending[0][0]
    for other, run in pending:
        if reading_settings(other) != reading_settings(config):
            raise TsaeError(f"{run.path}: reads other batches than {pending[0][1].path}; they cannot be packed")
    store = Store.open(store_path(config), config)
    running = [_Training(config, run, store) for config, run in pending]
    failed: list[Exception] = []
    start, stop = min(training.step for training in running), max(training.steps for training in running)
    for step, batch in enumerate(_stream(store, config).iterate(start, stop), start):
        for training in [training for training in running if training.step == step]:
            try:
                training.advance(batch)
            except (TsaeError, RuntimeError, OSError) as error:
                failed.append(error)
                running.remove(training)
        running = [training for training in running if not training.finished]
    if failed:
        raise failed[0]


def _stream(store: Store, config: RunConfig) -> PairStream:
    settings = config.training
    return PairStream(
        store,
        settings.pair_rule,
        settings.batch_size,
        settings.seed,
        skip_positions=config.data.skip_positions,
        pool_sequences=settings.pool_sequences,
    )


class _Training:
    """One run in training: its trainer, and what it writes."""

    def __init__(self, config: RunConfig, run: RunFolder, store: Store) -> None:
        self.config, self.run = config, run
        self.steps = config.training.steps
        self.finished = False
        self._accelerator = _accelerator(config, run)
        run.claim(config)
        files.write_json(run.provenance, provenance(config, store=store.attributes))
        device, norm = self._accelerator.device, store.mean_squared_norm
        self._trainer = Trainer(config, store.activation_dim, device=device, mean_squared_norm=norm)
        files.write_json(run.config_json, reference_config(config, store.activation_dim, self._trainer.scale))
        self._metrics = Metrics(run.metrics, offset=_resume(run, self._trainer))
        self._progress = Progress(f"train {run.path.parent.name}", self.steps, "steps", run.progress, self.step)

    @property
    def step(self) -> int:
        """The update that comes next."""
        return self._trainer.steps_done

    def advance(self, batch: Tensor) -> None:
        """One update, and what is due after it: a line of metrics, a resumable state, the final weights."""
        settings, step = self.config.training, self.step
        if step in settings.save_steps:
            save_dictionary(self.run.checkpoint(step), self._trainer.dictionary, self._trainer.scale)
        with self._accelerator.autocast():
            terms = self._trainer.step(batch.to(self._accelerator.device, non_blocking=True))
        last = self.step == self.steps
        if step % settings.log_every == 0 or last:
            self._log(step, terms)
        if last:
            self._finish()
        elif settings.resume_every and self.step % settings.resume_every == 0:
            _save_resume(self.run, self._trainer, self._metrics.sync())

    def _log(self, step: int, terms: Terms) -> None:
        measures = _measures(step, terms, self.config)
        self._metrics.append(measures)
        self._accelerator.log({name: value for name, value in measures.items() if name != "step"}, step=step)
        rate = self._progress.rate(self.step) * self.config.training.batch_size
        self._progress.update(self.step, **{"tokens/s": rate}, **{name: measures[name] for name in SHOWN})

    def _finish(self) -> None:
        self._metrics.sync()
        self._accelerator.end_training()
        save_dictionary(self.run.weights, self._trainer.dictionary, self._trainer.scale)
        shutil.rmtree(self.run.resume, ignore_errors=True)
        self.finished = True


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
