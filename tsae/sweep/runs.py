"""`tsae runs`: what lies under TSAE_HOME, read from small files, and from weights only what they hash to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from tsae import stages
from tsae.checkpoint import CONFIG, RESULTS, RunFolder
from tsae.config import run as configuration
from tsae.config.points import short_names, shown
from tsae.config.schema import flatten
from tsae.evaluation.measures import FVE
from tsae.runtime import locks, metadata
from tsae.runtime.errors import TsaeError
from tsae.store.binding import weights_identity, written_of
from tsae.store.layout import StoreLayout
from tsae.training.splits import last_line

DEEPEST = 4
"""Folders between checkpoints/ and a run's own, at most: names of runs may hold slashes."""
MOST_SETTINGS = 4


def listing(home: Path) -> list[str]:
    """A table of the runs under `home`, folder by folder, one of the sweeps and one of the stores.

    Raises TsaeError where there is nothing.
    """
    groups: dict[Path, list[RunFolder]] = {}
    for run in _runs(home / "checkpoints"):
        groups.setdefault(run.path.parent.parent, []).append(run)
    sweeps = sorted(path.parent for path in home.glob("sweeps/*/attempts"))
    stores = [StoreLayout(path.parent) for path in sorted(home.glob("stores/*/zarr.json"))]
    if not groups and not sweeps and not stores:
        raise TsaeError(f"{home}: no runs and no sweeps; TSAE_HOME names the folder that holds them (default ./runs)")
    lines = []
    for folder, runs in sorted(groups.items()):
        lines += [str(folder), *_table(runs), ""]
    if sweeps:
        lines += ["sweeps (tsae status FOLDER tells more)", *(f"  {path}  {_verdict(path)}" for path in sweeps), ""]
    if stores:
        every = [run for runs in groups.values() for run in runs]
        lines += ["stores (tsae store show FOLDER tells more)", *_stores(stores, every), ""]
    return lines[:-1]


def _runs(checkpoints: Path) -> Iterator[RunFolder]:
    for depth in range(1, DEEPEST + 1):
        for path in sorted(checkpoints.glob("/".join(["*"] * depth) + "/trainer_0")):
            yield RunFolder(path)


def _table(runs: list[RunFolder]) -> list[str]:
    """A line for each run: kind, what tells it from its neighbours, step, fraction of variance explained, state."""
    settings, damages = zip(*map(_settings, runs), strict=True)
    known = dict.fromkeys(key for own in settings for key in own)
    told = [key for key in known if len({shown(own.get(key)) for own in settings}) > 1 and key != "sae.kind"]
    names = short_names(told)
    rows = [["run", "kind", "differs in", "step", "FVE", "state"]]
    for run, own, damaged in zip(runs, settings, damages, strict=True):
        differing = [f"{names[key]}={shown(own[key])}" for key in told if key in own]
        more = f" and {len(differing) - MOST_SETTINGS} more" if len(differing) > MOST_SETTINGS else ""
        results, wrong = run.read_results(), metadata.damage(run.eval_results, RESULTS)
        damaged = damaged or (wrong and f"{run.eval_results}: {wrong}")
        made = results.get("made_from")  # older results do not say it
        try:
            current = bool(results) and (made is None or made["weights"] == weights_identity(run))
        except TsaeError as error:
            current, damaged = False, str(error)
        fve = results.get(FVE) if current else None
        rows.append(
            [
                run.path.parent.name,
                str(own.get("sae.kind", "?")),
                ", ".join(differing[:MOST_SETTINGS]) + more,
                _step(run, own),
                f"{fve:.3f}" if isinstance(fve, float) else "",
                f"damaged: {damaged}" if damaged else _state(run, current),
            ]
        )
    return _aligned(rows)


def _aligned(rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]


def _stores(stores: list[StoreLayout], runs: list[RunFolder]) -> list[str]:
    """A line for each store: what is in it, what it takes on disk, and how many of the runs were trained on it."""
    trained_on = Counter(_store_of(run) for run in runs)
    rows = [["store", "tokens", "dimensions", "on disk", "runs", "state"]]
    for layout in stores:
        on_disk = 0
        for path in layout.path.rglob("*"):
            with suppress(FileNotFoundError):  # a harvest goes on meanwhile
                on_disk += path.stat().st_size if path.is_file() else 0
        size = f"{on_disk / 1e9:.1f} GB" if on_disk >= 1e8 else f"{on_disk / 1e6:.1f} MB"
        try:
            tokens, geometry = f"{layout.attributes['tokens']:,}", layout.geometry
            shape, used = f"{geometry.activation_dim} {geometry.dtype}", str(trained_on[layout.identity])
            state = "whole" if layout.is_whole() else "not finished"
            state += ", rolling" if layout.rolling else ""
        except TsaeError as error:
            tokens, shape, used, state = "?", "?", "?", f"damaged: {error}"
        rows.append([layout.path.name, tokens, shape, size, used, state])
    return _aligned(rows)


def _store_of(run: RunFolder) -> str | None:
    """Identity of the store that a run was trained on; None where that cannot be told."""
    try:
        identity = written_of(run).get("store", {}).get("identity")
    except TsaeError:
        return None  # the table of runs says what is damaged
    return None if identity is None else str(identity)


def _settings(run: RunFolder) -> tuple[dict[str, Any], str]:
    """Key path → value, of resolved.yaml; of a run that came from elsewhere, its kind and k from config.json; and in words
    why they cannot be told."""
    if run.resolved.exists():
        try:
            flat = flatten(configuration.read(run.resolved))
        except TsaeError as error:
            return {}, str(error)
        return {key: value for key, value in flat if not key.startswith(("experiments.", "training_hash"))}, ""
    trainer = metadata.whole(run.config_json, CONFIG).get("trainer", {})
    found = {"sae.kind": trainer.get("dict_class"), "sae.k": trainer.get("k")}
    return {key: value for key, value in found.items() if value is not None}, ""


def _step(run: RunFolder, settings: dict[str, Any]) -> str:
    """Steps of the whole; of an unfinished run, how far its last resumable state or its last word is."""
    steps = settings.get("training.steps")
    if run.weights.exists() or steps is None:
        return "" if steps is None else str(steps)
    return f"{int(last_line(run.metrics).get('step', 0))}/{steps}"


def _state(run: RunFolder, evaluated: bool) -> str:
    """evaluated, trained, imported, running, interrupted or begun; what was measured on other weights does not count."""
    for stage in ("train", "evaluate"):
        if (owner := locks.owner(stages.run_lock(run, stage))) is not None:
            return f"running: {stage} on {owner.host}"
    if run.weights.exists():
        return "evaluated" if evaluated else "trained" if run.resolved.exists() else "imported"
    return "interrupted" if run.resume.exists() else "begun"


def _verdict(sweep: Path) -> str:
    """How many of the points that a sweep's launches worked on have been measured."""
    points = {path.stem for path in sweep.glob("attempts/[0-9]*/points/*.yaml")}
    checkpoints = sweep.parents[1] / "checkpoints" / sweep.name
    done = sum(RunFolder.of(checkpoints, name).eval_results.exists() for name in points)
    page = sweep / "report" / "report.html"
    return f"{done} of {len(points)} points measured" + (f", report: {page}" if page.exists() else ", no report yet")
