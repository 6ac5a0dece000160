"""The training loop: store in, checkpoints and metrics out, resumable after a kill at any moment."""

from __future__ import annotations

import copy
import logging
import os
import time
import uuid
from collections.abc import Sequence
from functools import partial
from importlib.metadata import version
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from tsae.checkpoint import CONFIG, RunFolder, save_run
from tsae.config import run as configuration
from tsae.config import schema
from tsae.config.run import Counted, RunConfig, reading_settings
from tsae.config.sections import KIND_SETTINGS
from tsae.parallel.group import Group
from tsae.parallel.rendezvous import together
from tsae.runtime import metadata, preemption
from tsae.runtime.errors import TsaeError
from tsae.runtime.progress import Progress
from tsae.runtime.provenance import provenance
from tsae.sae.reference import reference_config
from tsae.store import binding
from tsae.store.moments import moments_of
from tsae.store.pairs import PairStream, Waits
from tsae.store.reader import Store
from tsae.store.rolling import open_store
from tsae.training.metrics import Metrics, first_fve, has_diverged, living, measures_of
from tsae.training.resume import ResumeStates, random_state, set_random_state
from tsae.training.splits import beside, of_splits, trouble
from tsae.training.start import load_start
from tsae.training.trackers import Trackers, require
from tsae.training.trainer import Terms, Trainer
from tsae.training.waits import write_waits

SHOWN = ("loss", "l2_loss", "temp_loss", "auxk_loss", "l0", "fve", "dead_percent")
OF_SPLITS = {"alive": "alive", "share": "share", "fve": "fve_alone"}
"""Measures of each split that the progress line shows, and their names there."""

log = logging.getLogger("tsae")


def train(config: RunConfig, run: RunFolder, inexact: bool = False) -> None:
    """Train the dictionary of `config` into `run`; continues what an earlier call left, does nothing when complete.

    `inexact`: also from a state that another version of torch or tsae saved; provenance.json and all results then say so.
    Where several processes were started together, all call this; the first one writes the files.
    Raises Preempted, its state saved, if the process is asked to leave meanwhile (see `tsae.runtime.preemption`).
    """
    train_together([(config, run)], inexact)


def train_together(runs: Sequence[tuple[RunConfig, RunFolder]], inexact: bool = False) -> None:
    """Train several dictionaries on the same batches, which are read once; each comes out as if trained alone.

    Runs that are complete are skipped. One that fails does not stop the others; the first error is raised at the end.
    Raises TsaeError if the runs would not read the same batches, and Preempted as `train` does.
    """
    pending = []
    for config, run in runs:
        if run.is_trained(config):
            run.end(config)  # a process killed right after the final weights has left states
        else:
            pending.append((config, run))
    if not pending:
        return
    config = pending[0][0]
    for other, run in pending:
        if reading_settings(other) != reading_settings(config):
            raise TsaeError(f"{run.path}: reads other batches than {pending[0][1].path}; they cannot be packed")
    with together(cpu=config.training.device == "cpu") as group:
        _train(pending, group, inexact)


def _train(runs: Sequence[tuple[RunConfig, RunFolder]], group: Group, inexact: bool) -> None:
    config = runs[0][0]
    store = open_store(config)
    running = [_Training(config, run, store, group, inexact) for config, run in runs]
    for training in running:
        if training.step == training.steps:  # killed between the state after its last step and its weights
            training.finish(Waits())
    running = [training for training in running if not training.finished]
    if not running:
        return
    first, end = min(training.step for training in running), max(training.steps for training in running)
    settings = config.training
    stream = PairStream(
        store,
        config.pair_rule,
        settings.batch_size,
        settings.seed,
        counted=config.counted,
        pool_sequences=settings.pool_sequences,
        rank=group.rank,
        world=group.world,
        device=running[0].device,
        spoken_for=sum(training.bytes_to_come for training in running),
    )
    stream.read_first(first, preemption.requested)
    if group.start_any([preemption.requested()])()[0]:
        raise preemption.Preempted
    try:
        failed = _steps(list(running), stream, first, end, group)
    finally:
        for training in running:
            training.settle()
    if failed:
        raise failed[0]


def _steps(running: list[_Training], stream: PairStream, first: int, end: int, group: Group) -> list[Exception]:
    """All steps from `first` up to `end`, of each run its own; what runs failed by, while the others went on."""
    failed: list[Exception] = []
    for step, (batch, document) in enumerate(stream.with_documents(first, end), first):
        together_now = [training for training in running if training.step == step]
        # Asked before the step and answered after it, so that nobody waits for the answer.
        asked = group.start_any([preemption.requested(), *(training.will_be_due() for training in together_now)])
        for training in together_now:
            try:
                training.advance(batch, document)
                if training.step == training.steps:
                    training.finish(stream.waits)
            except (TsaeError, RuntimeError, OSError) as error:
                if group.world > 1:
                    raise  # the others may not have failed, and would wait
                failed.append(error)
                running.remove(training)
        running = [training for training in running if not training.finished]
        leave, *due = asked()
        for training, now in zip(together_now, due, strict=True):
            if now and training in running:
                training.save()
        if leave and running:
            _leave(running, group, stream.waits)
    return failed


def _leave(running: Sequence[_Training], group: Group, waits: Waits) -> None:
    """Save every run's state and raise Preempted, in all processes together."""
    for training in running:
        training.save()
    for training in running:
        group.on_first(partial(training.leave, waits))
        if group.rank == 0:
            log.warning("%s: state saved before step %d", training.run.path, training.step)
    raise preemption.Preempted


class _Training:
    """One run in training: its trainer, and what the first of its processes writes."""

    def __init__(self, config: RunConfig, run: RunFolder, store: Store, group: Group, inexact: bool) -> None:
        self.config, self.run, self._group = config, run, group
        self.steps = config.training.steps
        self.finished, self._told = False, set[str]()
        self._shorter = run.shorter(config)
        origin = _origin(config, store)
        self._store, self._opened = store, False
        self._states = ResumeStates(run.resume, origin, config.training.resume_keep)
        group.on_first(lambda: require(config.training.trackers))
        state = self._begin(inexact)
        self._inexact = state.get("inexact", [])
        self._require_agreement(origin)
        # The name of this run in the trackers, and the step that comes next there.
        self._tracking = state.get("tracking") or {"id": uuid.uuid4().hex, "step": 0}
        self._metrics_before = state.get("metrics_bytes", 0), state.get("metrics_crc32c")
        device = Accelerator(cpu=config.training.device == "cpu").device
        # In one process accelerate names no GPU, and each thread would take the one that is its own.
        self.device = torch.device("cuda", torch.cuda.current_device()) if device == torch.device("cuda") else device
        moments = moments_of(store, config.counted)
        start = None if state else load_start(config, store.activation_dim)
        self._trainer = Trainer(
            config, store.activation_dim, device=self.device, moments=moments, group=group, start=start
        )
        self._first_fve = first_fve(run.metrics) if state else None
        if state:
            self._continue(state)
        self._saved, self._saved_at = self.step, time.monotonic()
        self._progress = Progress(f"train {run.path.parent.name}", self.steps, "steps", run.progress, self.step)

    def _begin(self, inexact: bool) -> dict[str, Any]:
        """The state to continue from, empty at the start. Raises TsaeError for a folder of another configuration."""
        state: dict[str, Any] = {}

        def begin() -> None:
            self.run.require_free(self.config)
            state.update(self._load(inexact))
            for change in state.get("inexact", []):
                log.warning("%s: goes on inexactly %s", self.run.path.parent.name, change)

        self._group.on_first(begin)
        if self._group.rank > 0:
            state.update(self._load(inexact))
        return state

    def _load(self, inexact: bool) -> dict[str, Any]:
        """The newest state of this run or, where there is none yet, that of the shorter run which it goes on from."""
        state = self._states.load(inexact)
        if state is None and self._shorter is not None:
            kept = ResumeStates(self.run.kept, _origin(self._shorter, self._store), keep=1)
            state, self._states.newest = kept.load(inexact), kept.newest
            if state is None:
                raise TsaeError(f"{self.run.kept}: the state is damaged; remove it, and this run begins again")
            end = self._shorter.training.steps
            if other := _other_schedules(self._shorter, self.config):
                change = f"from step {end}, the last of a run whose {other} went by its {end} steps"
                state["inexact"] = [*state.get("inexact", []), change]
        return state or {}

    def _continue(self, state: dict[str, Any]) -> None:
        try:
            self._trainer.load_state(state["trainer"])
            if self._group.rank < len(state["random"]):  # of more processes than saved it, the new ones keep their own
                set_random_state(state["random"][self._group.rank])
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            if not self._inexact:
                raise
            raise TsaeError(f"{self.run.resume}: these versions cannot read what those saved ({error})") from error

    def _require_agreement(self, origin: dict[str, str]) -> None:
        """Refuse processes that would train apart, as two machines might that see other files or have other packages."""
        begun = self._group.collect({**origin, "step to continue at": str(max(0, self._states.newest))})

        def compare() -> None:
            for rank, other in enumerate(begun):
                for name, wanted in begun[0].items():
                    if other[name] != wanted:
                        raise TsaeError(
                            f"{self.run.path}: process {rank} has another {name} ({other[name]}) than the first one "
                            f"({wanted}); all must read the same files by the same versions"
                        )

        self._group.on_first(compare)

    def _open(self) -> None:
        """Claim the folder, after the first update: whatever is refused until then leaves the run's name free."""
        if not self._opened:
            self._group.on_first(self._open_files)
            self._opened = True

    def _open_files(self) -> None:
        config, run, store = self.config, self.run, self._store
        if self._shorter is not None and run.weights.exists():  # before they could pass for those of this run
            aside = run.checkpoint(self._shorter.training.steps)
            aside.parent.mkdir(exist_ok=True)
            os.replace(run.weights, aside)
        run.claim(config)
        run.remove_leftovers()
        self._states.remove_leftovers()
        about = {name: value for name, value in store.attributes.items() if name != "statistics"}  # many numbers
        sources: dict[str, Any] = {"store": about, "data": binding.record(config)}
        if not config.counted.all_tokens:
            sources |= _left_out(config, store)
        if self._inexact:
            sources["inexact"] = self._inexact
        metadata.write(run.provenance, provenance(config.training_hash, **sources))
        # Of an earlier attempt's weights, what that noted stays.
        noted = {name: entry for name, entry in metadata.whole(run.config_json, CONFIG).items() if name == "weights"}
        if self._shorter is not None and (last := noted.get("weights", {}).pop(run.weights.name, None)):
            noted["weights"][run.checkpoint(self._shorter.training.steps).relative_to(run.path).as_posix()] = last
        self._written = {**reference_config(config, store.activation_dim, self._trainer.scale), **noted}
        metadata.write(run.config_json, self._written)
        self._metrics = Metrics(run.metrics, *self._metrics_before)
        self._trackers = Trackers(config, run, self._tracking)

    @property
    def step(self) -> int:
        """The update that comes next: the position in the data."""
        return self._trainer.steps_done

    @property
    def bytes_to_come(self) -> int:
        """What the first update will take beside the weights: their gradients, and Adam's two moments."""
        return 3 * sum(parameter.nbytes for parameter in self._trainer.dictionary.parameters())

    def advance(self, batch: Tensor, document: Tensor) -> None:
        """One update, and what is due after it: a line of metrics, the final weights."""
        settings, step = self.config.training, self.step
        self._states.raise_failure()
        first = self._group.rank == 0
        kept = copy.deepcopy(self._trainer.dictionary) if first and step in settings.save_steps else None
        tell = self._trainer.advance(*(part.to(self.device, non_blocking=True) for part in (batch, document)))
        last, terms = self.step == self.steps, None
        if last or step % settings.log_every == 0:
            terms = tell().on_host()
            self._require_finite(terms.loss)
            self._require_sense(terms, last)
        self._open()
        if kept is not None:
            save_run(self.run, self._written, kept, step, self._trainer.scale, self._trainer.shift)
        if terms is not None and first:
            self._log(step, terms)

    def finish(self, waits: Waits) -> None:
        """Leave the final weights, and with them a whole folder: whoever finds them there does not come back to it."""
        self._open()
        if self.config.training.keep_state:
            self.save()
        self._group.on_first(partial(self._finish, waits))
        self.finished = True

    def _require_finite(self, *more: Tensor) -> None:
        """Refuse to go on from, or to keep, weights that are lost."""
        dictionary = self._trainer.dictionary
        everything = sum(
            (tensor.detach().sum() for tensor in (dictionary.W_enc, *more)), dictionary.W_dec.detach().sum()
        )
        if not bool(torch.isfinite(everything)):
            raise self._diverged("the loss or the weights are not finite")

    def _require_sense(self, terms: Terms, last: bool) -> None:
        """Refuse to go on with, or to keep, weights that explain far less than they did before they were trained."""
        fve = float(terms.fve)
        if self._first_fve is None:
            self._first_fve = fve
        if has_diverged(fve, self._first_fve, last):
            raise self._diverged(
                f"the fraction of variance explained is {fve:.3g}, after {self._first_fve:.3g} at first,"
            )
        if last and int(terms.n_active) == 0:
            raise self._diverged("no latent fires any more")

    def _diverged(self, what: str) -> TsaeError:
        return TsaeError(
            f"{self.run.path.parent.name}: training diverged: {what} at step {self.step - 1}; lower training.lr "
            f"({self._trainer.peak_lr:g}) or training.clip_norm ({self.config.clip_norm:g}) under another run name; "
            f"{self.run.metrics} tells how it went, and without {self.run.path} this run begins again"
        )

    def will_be_due(self) -> bool:
        """Whether a resumable state should be written after the update that comes next; the first process decides."""
        if self._group.rank > 0 or self._states.busy:
            return False  # the disk is slower than states are asked for; training does not wait for it
        every, minutes = self.config.training.resume_every, self.config.training.resume_minutes
        if every and (self.step + 1) % every == 0:
            return True
        return minutes is not None and time.monotonic() - self._saved_at >= 60 * minutes

    def save(self) -> None:
        """Begin to write a resumable state, in which all processes have a part, unless that of this very step is there."""
        if self.step == self._saved:
            return
        self._require_finite()
        trainer, random = self._trainer.state(), self._group.collect(random_state())
        self._saved, self._saved_at = self.step, time.monotonic()
        if self._group.rank == 0:
            state = {
                "trainer": trainer,
                **self._metrics.state,
                "random": random,
                "tracking": {**self._tracking, "step": self.step},
                "inexact": self._inexact,
            }
            self._states.save(self.step, state, first=self._metrics.sync)

    def settle(self) -> None:
        """Return when nothing of this run is being written any more, whatever it ends by."""
        try:
            self._states.wait()
        except TsaeError as error:
            log.warning("%s", error)

    def leave(self, waits: Waits) -> None:
        """Return when the last resumable state is on the disk, and what was waited for until then."""
        self._states.wait()
        self._tell(waits)

    def _tell(self, waits: Waits) -> None:
        """Of a training on a window say whether it or the harvest was the limit, and write it down in the run's folder."""
        if self._store.maker is not None:
            log.warning("%s: %s", self.run.path.parent.name, waits.line())
            write_waits(self.run, waits, self._store.maker.window)

    def _log(self, step: int, terms: Terms) -> None:
        measures = measures_of(step, terms, self.config, living(self._trainer))
        self._metrics.append(measures)
        if step >= self.config.training.warmup:
            self._warn_once(step, measures)
        self._trackers.log({name: value for name, value in measures.items() if name != "step"}, step)
        rate = self._progress.rate(self.step) * self.config.training.batch_size
        splits = {told: beside(of_splits(measures, name, self.config)) for name, told in OF_SPLITS.items()}
        shown = {name: measures[name] for name in SHOWN} | {told: values for told, values in splits.items() if values}
        self._progress.update(self.step, **{"tokens/s": rate}, **shown)

    def _warn_once(self, step: int, measures: dict[str, float]) -> None:
        """Say once that a split is not as it should be; metrics.jsonl tells it at every line, a sweep's report the end."""
        found = trouble(measures, self.config)
        if found and found.remedy not in self._told:
            self._told.add(found.remedy)
            log.warning("%s: step %d: %s", self.run.path.parent.name, step, found)

    def _finish(self, waits: Waits) -> None:
        self._states.wait()
        self._metrics.close()
        self._tell(waits)
        trainer = self._trainer
        save_run(self.run, self._written, trainer.dictionary, None, trainer.scale, trainer.shift)
        self._states.close()
        self.run.end(self.config)
        self._trackers.finish()  # which may wait for a server


def _other_schedules(shorter: RunConfig, longer: RunConfig) -> str:
    """In words, what up to the end of the shorter run went otherwise than it would have gone in the longer one."""
    one, other = shorter.training, longer.training
    found = {
        "warm-up": one.warmup != other.warmup,
        "threshold": KIND_SETTINGS[longer.sae.kind].needs_threshold and one.threshold_start != other.threshold_start,
        "decay": one.decay_start is not None and one.decay_start < one.steps,
        "weight of the temporal term": KIND_SETTINGS[longer.sae.kind].temporal
        and longer.objective.temporal_anneal != 1,
    }
    return ", ".join(name for name, differs in found.items() if differs)


def _left_out(config: RunConfig, store: Store) -> dict[str, Any]:
    """The largest norm of a token that was trained on, and how many tokens were left out for their norm or their id."""
    every, rows = Counted(config.data.skip_positions), slice(len(store.sample))
    left_out = store.valid(every, rows) & ~store.valid(config.counted, rows)
    limited = config.counted.max_norm_multiple is not None
    return {"norm_limit": store.limit(config.counted) if limited else None, "tokens_left_out": int(left_out.sum())}


def _origin(config: RunConfig, store: Store) -> dict[str, str]:
    """What a bit-exact continuation must have in common with the process that saved the state."""
    return {
        "configuration": schema.stable_hash(configuration.training_settings(config)),
        "activation store": str(store.attributes["manifest"]["checksums"]),
        "version of tsae": version("tsae"),
        "version of torch": torch.__version__,
    }
