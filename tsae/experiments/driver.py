"""Runs one experiment on one run: the same flags, files and completeness rule for all of them.

    <run>/<file>[_chunkN].json      what it was made from, subject, numbers; written last: complete while that is as it was
    <run>/<file>[_chunkN].png       the picture of it

An experiment is a module with `measure(subject, settings, chunk)`, which returns a JSON mapping with the numbers that a
sweep's report shows under "headline" (and their half-widths under "half_width_95"), and `draw(results, path)`.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tsae.checkpoint import BASELINE, RunFolder
from tsae.config import run as configuration
from tsae.config import schema
from tsae.config.run import RunConfig
from tsae.data.labelled import content_of
from tsae.evaluation.measures import versions
from tsae.experiments.answers.ask import content_of_answers
from tsae.experiments.registry import EXPERIMENTS, declare_measures, module_of, settings_of
from tsae.interop.settings import find_beside
from tsae.runtime import metadata, preemption
from tsae.runtime.errors import TsaeError
from tsae.store import binding

if TYPE_CHECKING:
    from tsae.experiments.shared.subject import Subject


log = logging.getLogger("tsae")
NUMBERS = {str: (None, float)}
RESULTS = {
    **{"experiment": str, "made_from": dict, "subject": dict, "settings": dict},
    **{"headline?": NUMBERS, "half_width_95?": NUMBERS, "explanations_hash?": str},
}
"""What every experiment's results hold."""
declare_measures()


def run(
    name: str,
    config: RunConfig,
    run: RunFolder,
    chunks: Sequence[int] | None = None,
    checkpoint: str | None = None,
    explanations: Path | None = None,
) -> list[str]:
    """Make experiment `name` for the splits `chunks` (all there are by default); the paths of its results.

    A split whose results are complete is not measured again, unless they show explanations and there are others now.
    Raises TsaeError, before anything is measured, for a split that is not there, for explanations that cannot be read
    and for the dense baseline where only latents make sense.
    """
    experiment = EXPERIMENTS[name]
    subject = _subject(name, config, run, checkpoint, explanations)
    for split in chunks or ():
        subject.latents(split)
    if explanations is not None:
        _ = subject.explanations
    splits: Sequence[int | None] = (subject.chunks if chunks is None else chunks) if experiment.splits else (None,)
    try:
        return _made(name, subject, splits, checkpoint)
    finally:
        forget(name)


def forget(name: str) -> None:
    """Let go of what an experiment keeps from split to split, its language model among it; another stage may follow here."""
    package = str(module_of(name).__package__)
    for module in [each for path, each in sys.modules.items() if path.startswith(f"{package}.")]:
        for value in vars(module).values():
            if callable(clear := getattr(value, "cache_clear", None)):
                clear()


def _made(name: str, subject: Subject, splits: Sequence[int | None], checkpoint: str | None) -> list[str]:
    experiment, config, run = EXPERIMENTS[name], subject.config, subject.run
    made = []
    for chunk in splits:
        path = run.result(_stem(config, name, chunk, checkpoint), "json")
        current = _is_current(run, name, config, chunk, checkpoint)
        if current and experiment.explained:
            current = read_results(path).get("explanations_hash") == explanations_hash(subject.explanations)
        if not current:
            _make(name, subject, chunk)
        else:
            log.info("%s: complete already", path)
        made.append(str(path))
    if experiment.compared:
        for result in made:
            draw_again(name, Path(result))
    return made


def cost(name: str, config: RunConfig, run: RunFolder, checkpoint: str | None = None) -> list[str]:
    """What `run` would ask of others before experiment `name` is complete, in lines; nothing is written.

    Of an experiment whose module has a `cost` beside `measure`. Raises TsaeError as `run` does.
    """
    subject = _subject(name, config, run, checkpoint, None)
    if _is_current(run, name, config, None, checkpoint):
        return [f"{run.result(_stem(config, name, None, checkpoint), 'json')}: complete already"]
    lines: list[str] = module_of(name).cost(subject, settings_of(config, name))
    return lines


def _subject(
    name: str, config: RunConfig, run: RunFolder, checkpoint: str | None, explanations: Path | None
) -> Subject:
    """What is measured. Raises TsaeError where its data have changed, and for the dense baseline where it has no place."""
    from tsae.experiments.shared.subject import Subject

    if EXPERIMENTS[name].reads_store:
        binding.require_unchanged(run, config)
    else:
        binding.require_same_model(run, config)
    subject = Subject(config, run, checkpoint=checkpoint, explanation_path=explanations)
    if subject.is_dense and not EXPERIMENTS[name].dense:
        raise TsaeError(f"--run_name {BASELINE}: tsae {name} is about latents; name a trained run")
    return subject


def draw_again(name: str, path: Path) -> None:
    """Draw the picture beside complete results, with what lies beside them now; in a folder that may be written."""
    if os.access(path.parent, os.W_OK):
        module_of(name).draw(read_results(path), path.with_suffix(".png"))


def read_results(path: Path) -> dict[str, Any]:
    """The results in a file of an experiment; empty where there is none or it is damaged, so that they are made again."""
    return metadata.whole(path, RESULTS)


def is_done(config: RunConfig, run: RunFolder, name: str) -> bool:
    """Whether the results for every split are complete and show the run's explanations; reads small files alone."""
    from tsae.interop.explanations import find_explanations

    chunks: Sequence[int | None] = (None,)
    if EXPERIMENTS[name].splits:
        chunks = (0, 1, 2) if len(config.sae.group_sizes) > 1 and run.path.parent.name != BASELINE else (2,)
    if not all(_is_current(run, name, config, chunk, None) for chunk in chunks):
        return False
    if not EXPERIMENTS[name].explained:
        return True
    found = find_explanations(run)
    wanted = explanations_hash({} if found is None else metadata.whole(found))
    paths = (run.result(_stem(config, name, chunk, None), "json") for chunk in chunks)
    return all(read_results(path).get("explanations_hash") == wanted for path in paths)


def made_from(
    config: RunConfig, run: RunFolder, name: str, chunk: int | None, checkpoint: str | None
) -> dict[str, Any]:
    """What decides an experiment's results: weights, language model, data, texts, settings, and how it measures."""
    experiment, dense = EXPERIMENTS[name], run.path.parent.name == BASELINE
    own = settings_of(config, name)
    passages = own.texts if name == "sequences" else ()
    asked = {"explain": "answers", "steer": "judge"}.get(name)
    named = [getattr(own, "dataset", None), config.experiments.texts.categories, *passages]
    beside, matched = getattr(own, "beside", None), {}
    if beside is not None:
        matched["beside"] = ""
        with suppress(TsaeError):  # of one that is gone: these are not the results that would be made now
            matched["beside"] = binding.weights_identity(find_beside(run, beside))
    return {
        **matched,
        "weights": "" if dense else binding.weights_identity(run, checkpoint),
        "model": binding.model_identity(config.model, run),
        "data": "" if dense else binding.data_identity(run, config),
        "texts": [content_of(text) for text in named if text],
        "answers": content_of_answers(getattr(own, asked)) if asked else "",
        "settings": schema.stable_hash([configuration.experiment_settings(config, name), chunk, checkpoint]),
        "measures": schema.stable_hash([experiment.version, versions(experiment.file)]),
    }


def explanations_hash(explanations: Mapping[Any, str]) -> str:
    """What tells explanations by latent from others."""
    return schema.stable_hash({str(latent): text for latent, text in explanations.items()})


def files_of(run: RunFolder, config: RunConfig, name: str) -> list[Path]:
    """The complete results of an experiment on the final weights, split by split; pictures lie beside them as .png."""
    splits: Sequence[int | None] = (0, 1, 2) if EXPERIMENTS[name].splits else (None,)
    return [
        run.result(_stem(config, name, chunk, None), "json")
        for chunk in splits
        if _is_current(run, name, config, chunk, None)
    ]


def headlines(run: RunFolder, config: RunConfig) -> dict[str, tuple[float, float | None]]:
    """Every complete experiment's headline numbers, `probing_chunk0/semantics` → (value, half-width of its interval)."""
    found: dict[str, tuple[float, float | None]] = {}
    for path in (path for name in EXPERIMENTS for path in files_of(run, config, name)):
        results = read_results(path)
        half = results.get("half_width_95", {})
        for measure, value in results.get("headline", {}).items():
            if value is not None:
                found[f"{path.stem}/{measure}"] = (float(value), half.get(measure))
    return found


def _make(name: str, subject: Subject, chunk: int | None) -> None:
    preemption.check()
    subject.run.require_place()
    module = module_of(name)
    settings = settings_of(subject.config, name)
    results: dict[str, Any] = {
        "experiment": name,
        "made_from": made_from(subject.config, subject.run, name, chunk, subject.checkpoint),
        "subject": subject.description(),
        **binding.inexact(subject.run),
        "settings": {} if settings is None else schema.to_plain(settings),
    }
    if EXPERIMENTS[name].explained:
        results["explanations_hash"] = explanations_hash(subject.explanations)
    if chunk is None:
        results |= module.measure(subject, settings)
    else:
        from tsae.experiments.shared.subject import SPLIT_NAMES

        results |= {"chunk": chunk, "split": "residual stream" if subject.is_dense else SPLIT_NAMES[chunk]}
        results |= module.measure(subject, settings, chunk)
    stem = _stem(subject.config, name, chunk, subject.checkpoint)
    module.draw(results, subject.run.result(stem, "png"))
    metadata.write(subject.run.result(stem, "json"), results)


def _stem(config: RunConfig, name: str, chunk: int | None, checkpoint: str | None) -> str:
    """Stem of the files of one experiment; another protocol than the usual one has files of its own."""
    parts = [EXPERIMENTS[name].file]
    if getattr(settings_of(config, name), "protocol", None) == "reference":
        parts.append("reference")
    if chunk is not None:
        parts.append(f"chunk{chunk}")
    if checkpoint is not None:
        parts.append(f"step{checkpoint}")
    return "_".join(parts)


def _is_current(run: RunFolder, name: str, config: RunConfig, chunk: int | None, checkpoint: str | None) -> bool:
    path = run.result(_stem(config, name, chunk, checkpoint), "json")
    found = read_results(path).get("made_from")
    return found is not None and bool(found == made_from(config, run, name, chunk, checkpoint))


def with_dataset(config: RunConfig, name: str, dataset: str | None) -> RunConfig:
    """`config` with another dataset for one experiment. Raises TsaeError if it takes none."""
    if dataset is None:
        return config
    settings = settings_of(config, name)
    if not hasattr(settings, "dataset"):
        raise TsaeError(f"--dataset: tsae {name} takes none; it reads the run's own store")
    [found] = configuration.locate({f"experiments.{name}.dataset": dataset}, Path.cwd()).values()
    changed = dataclasses.replace(settings, dataset=found)
    return dataclasses.replace(config, experiments=dataclasses.replace(config.experiments, **{name: changed}))
