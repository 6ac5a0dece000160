"""The stages of a run as functions of plain arguments: what the command line calls and what jobs pickle.

Each stage is idempotent: it returns at once when its output is complete, continues what an earlier process
left, and holds a lock while it works, so that no two processes write the same output. Asked to leave by SIGTERM or
SIGUSR2, it saves what it has and raises `preemption.Preempted`. Importing this module is cheap; torch and the rest
load when a stage runs.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tsae.checkpoint import RunFolder
from tsae.config import run as configuration
from tsae.config.run import RunConfig, require_processes
from tsae.runtime import locks, preemption
from tsae.runtime.environment import process_count, process_rank

if TYPE_CHECKING:
    from tsae.parallel.group import Group

log = logging.getLogger("tsae")


@preemption.watched()
def harvest_stage(config: RunConfig | str, task: int = 0, tasks: int = 1) -> Path:
    """Write share `task` of `tasks` of the activation store of the run described by `config`, a configuration or its file.

    Processes that were started together divide the share among themselves.
    """
    return _harvest([_resolved(config)], task, tasks)[0]


@preemption.watched()
def harvest_places_stage(configs: Sequence[str], task: int = 0, tasks: int = 1) -> None:
    """The same for several runs that read one text by one language model at different places: in one forward pass."""
    _harvest([*map(_resolved, configs)], task, tasks)


def _harvest(configs: Sequence[RunConfig], task: int, tasks: int) -> list[Path]:
    paths = [*map(store_path, configs)]
    with _started_together(configs[0]) as group, ExitStack() as held:
        missing = [config for config in configs if not _in_any(group, is_harvested(config))]
        if missing:
            own, all_shares = task * process_count() + process_rank(), tasks * process_count()
            for config in missing:
                held.enter_context(locks.hold(harvest_lock(store_path(config), own, all_shares), "harvest"))
            from tsae.store.harvest import harvest_places

            harvest_places(missing, own, all_shares)
    for path, config in zip(paths, configs, strict=True):
        if is_harvested(config):  # whoever was killed after its last shard never comes back for its lock
            locks.clear(path.parent, f"{path.name}.")
            locks.clear(path)
    return paths


@preemption.watched()
def train_stage(config: RunConfig | str, checkpoints_path: Path | str, run_name: str, inexact: bool = False) -> Path:
    """Train the dictionary of run `run_name`, from its last resumable state if there is one; see `tsae.training.run.train`."""
    config = _resolved(config)
    run = RunFolder.of(checkpoints_path, run_name)
    require_processes(config, process_count())
    refuse_other_data(config, run)
    with _started_together(config) as group:
        if _in_any(group, run.is_trained(config)):
            run.end(config)
            locks.clear(run.path, run_lock(run, "train").name)
            log.info("%s: already trained", run.path)
            return run.path
        with _held_by_first(run_lock(run, "train"), f"train {run_name}", group):
            from tsae.training.run import train

            train(config, run, inexact)
    return run.path


@preemption.watched()
def train_pack_stage(
    configs: Sequence[str], checkpoints_path: Path | str, run_names: Sequence[str], inexact: bool = False
) -> None:
    """Train several runs in one process on the same batches; each comes out as if trained alone."""
    runs = [
        (_resolved(config), RunFolder.of(checkpoints_path, name))
        for config, name in zip(configs, run_names, strict=True)
    ]
    for config, _ in runs:
        require_processes(config, process_count())
    with _started_together(runs[0][0]) as group, ExitStack() as held:
        for _, run in runs:
            held.enter_context(_held_by_first(run_lock(run, "train"), f"train {run.path.parent.name}", group))
        from tsae.training.run import train_together

        train_together(runs, inexact)


def evaluate_stage(config: RunConfig | str, checkpoints_path: Path | str, run_name: str) -> Path:
    """Measure the trained dictionary of run `run_name` on held-out activations; the folder of the results."""
    return evaluate_run(_resolved(config), RunFolder.of(checkpoints_path, run_name))


@preemption.watched()
def evaluate_run(config: RunConfig, run: RunFolder) -> Path:
    """The same for a run wherever it lies.

    Processes that were started together divide the contexts among themselves; the results are the same.
    """
    refuse_other_data(config, run)
    with _started_together(config) as group:
        if _in_any(group, is_evaluated(config, run)):
            locks.clear(run_lock(run, "evaluate").parent, run_lock(run, "evaluate").name)
            log.info("%s: already evaluated", run.path)
            return run.measured
        run.require_place()
        with _held_by_first(run_lock(run, "evaluate"), f"evaluate {run.path.parent.name}", group):
            from tsae.evaluation.driver import evaluate

            if not _in_any(group, is_evaluated(config, run)):  # another process may have been faster
                if process_rank() == 0:
                    run.remove_leftovers(run.eval_results.stem)
                evaluate(config, run)
    return run.measured


def experiment_stage(
    config: RunConfig | str, checkpoints_path: Path | str, run_name: str, name: str, **asked: Any
) -> list[str]:
    """Make experiment `name` on run `run_name`, as `experiment_run` takes it; the paths of the results."""
    return experiment_run(_resolved(config), RunFolder.of(checkpoints_path, run_name), name, **asked)


@preemption.watched()
def experiment_run(
    config: RunConfig,
    run: RunFolder,
    name: str,
    chunks: Sequence[int] | None = None,
    checkpoint: str | None = None,
    explanations: Path | None = None,
) -> list[str]:
    """Make experiment `name` on a run wherever it lies, for all of its splits or `chunks`; the paths of the results.

    Results that are complete are found also where nothing may be written.
    """
    from tsae.experiments.registry import EXPERIMENTS

    with ExitStack() as held:
        if run.takes_results:
            held.enter_context(locks.hold(run_lock(run, name), f"{name} {run.path.parent.name}"))
            run.remove_leftovers(EXPERIMENTS[name].file)
        from tsae.experiments import driver  # which takes long to import: the lock is held soon

        return driver.run(name, config, run, chunks, checkpoint, explanations)


def harvest_elsewhere(config: RunConfig, run: RunFolder, calibrated: bool = True) -> None:
    """Harvest the store of a run from elsewhere, unless it is there: no YAML of ours would make it.

    Raises TsaeError for weights that cannot be measured, which unless `calibrated` may lack a threshold.
    """
    if not run.resolved.exists():
        from tsae.checkpoint import load_dictionary

        load_dictionary(run.path, calibrated=calibrated)
        harvest_stage(config)


@contextmanager
def _started_together(config: RunConfig) -> Iterator[Group | None]:
    """The processes started with this one; all enter and leave together. None, at no cost, where this one is alone."""
    if process_count() == 1:
        yield None
        return
    from tsae.parallel.rendezvous import together

    with together(cpu=config.training.device == "cpu") as group:
        yield group


def _in_any(group: Group | None, found: bool) -> bool:
    """Whether a process finds something, as all of them then take it."""
    return found if group is None else group.start_any([found])()[0]


@contextmanager
def _held_by_first(path: Path, what: str, group: Group | None) -> Iterator[None]:
    """The lock at `path`; of processes that work together only the first one holds it. Raises LockHeld in all."""
    with ExitStack() as held:
        refusal: locks.LockHeld | None = None
        if process_rank() == 0:
            try:
                held.enter_context(locks.hold(path, what))
            except locks.LockHeld as error:
                refusal = error
        if _in_any(group, refusal is not None):
            raise refusal or locks.LockHeld(f"{what}: somebody else is already working on it; wait for it or end it")
        yield


def _resolved(config: RunConfig | str) -> RunConfig:
    return config if isinstance(config, RunConfig) else configuration.load(config)


def store_path(config: RunConfig) -> Path:
    """The folder of the activation store of a run."""
    from tsae.store import layout

    return layout.store_path(config)


def harvest_lock(store: Path, task: int = 0, tasks: int = 1) -> Path:
    """Where the lock on one share of a harvest lies: beside the store, which may not exist yet."""
    return store.with_name(f"{store.name}.harvest_{task}of{tasks}.lock")


def harvest_progress(store: Path) -> Path:
    """The progress file of a harvest."""
    from tsae.store import layout

    return layout.StoreLayout(store).progress


def run_lock(run: RunFolder, stage: str) -> Path:
    """Where the lock on one stage of a run lies."""
    return run.result(stage, "lock")


def refuse_other_data(config: RunConfig, run: RunFolder) -> None:
    """Refuse to go on with a run, trained or begun, whose text or language model has changed since. Raises TsaeError."""
    if run.training_hash() == config.training_hash:
        from tsae.store import binding

        binding.require_unchanged(run, config)


def require_sound(run: RunFolder) -> None:
    """Refuse a run whose small files are damaged. Raises TsaeError that names one."""
    from tsae.store import binding

    binding.require_sound(run)


def changed_since(config: RunConfig, run: RunFolder) -> str:
    """In words, what of a run's text and language model has changed since it was trained or begun; nothing if nothing has."""
    if run.training_hash() != config.training_hash:
        return ""
    from tsae.store import binding

    return binding.difference(run, config)


def accept_new_data(config: RunConfig, run: RunFolder) -> None:
    """Have a trained run measured on the text and the language model that are there now. Raises TsaeError."""
    if run.training_hash() == config.training_hash and process_rank() == 0:
        from tsae.store import binding

        binding.accept(run, config)


def is_evaluated(config: RunConfig, run: RunFolder) -> bool:
    """Whether the evaluation of exactly this configuration, of the weights and data that are there now, is complete."""
    from tsae.evaluation import identity

    return identity.is_evaluated(config, run)


def is_harvested(config: RunConfig) -> bool:
    """Whether the store of exactly this configuration is complete."""
    from tsae.store import layout

    return layout.is_harvested(config)
