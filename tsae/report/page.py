"""The values of the report's one HTML page (page.html), which needs nothing else: styles and pictures are inside."""

from __future__ import annotations

import base64
import itertools
import math
import os
import time
import urllib.parse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from tsae.config.points import short_names, shown
from tsae.evaluation.measures import REGISTRY, Chart, Measure, label, shown_in, with_unit
from tsae.experiments.driver import draw_again, files_of, read_results
from tsae.experiments.registry import EXPERIMENTS
from tsae.pages import render
from tsae.report.summary import Summary, compare
from tsae.report.text import figures, sentences, with_interval

FEW_ROWS = 8
"""Rows of the summary from which on they can be filtered."""
LONG_TABLE = 40
"""Rows above which a table scrolls in a box of its own."""
WIDE = 600
"""Pixels on the page above which a picture needs its whole width."""
MOST_MISSING = 12
"""Points with a trouble that are named."""
MOST_COLUMNS = 60
"""Points whose every measure fits into one table that a person would read."""
MOST_LATENTS = 12
"""Latents of an experiment that a page links to the page of latents."""
BYTES_A_RUN, MOST_BYTES = 600_000, 6_000_000
"""Of the runs' own pictures, which a page carries for each of its runs and in all; beyond that it leads to their files."""


def as_page(
    summary: Summary,
    charts: list[tuple[Chart, Path]],
    claims: dict[str, Any] | None = None,
    apart: Mapping[str, Summary] | None = None,
    notes: Sequence[tuple[str, str]] = (),
) -> str:
    """The whole page; `claims` are those of `claims.section`, `notes` further warnings.

    `apart` are the points by what they were measured on, in words, where that is not the same: nothing is said across them.
    """
    compared, rows = summary.compared, [row for row in summary.rows if not row.missing]
    drawn = [(_picture(path, chart.title), chart, path.stem) for chart, path in charts]
    swept = short_names([key for row in rows for key in row.point.axes])
    return render(
        "report/page.html",
        title=compared.name,
        lead=_lead(summary, len(apart or ())),
        warnings=[*notes, *_warnings(summary)],
        sentences=[f"{name}: {text}" for name, own in apart.items() for text in sentences(own)]
        if apart
        else sentences(summary),
        claims=claims,
        summary=_summary_table(summary),
        differences={"rows": []} if apart else _differences(summary),
        figures=[(image, chart.caption, name) for image, chart, name in drawn if chart.name not in EXPERIMENTS],
        experiments=_experiments(summary, drawn),
        points=rows,
        axes=[(_words(name), [shown(row.point.value(key)) for row in rows]) for key, name in swept.items()],
        measures=[
            (name, with_unit(name), [figures(row.values.get(name, math.nan)) for row in rows])
            for name in summary.measures
        ],
        command=compared.command,
        origin=compared.origin,
        file=compared.origin.read_text(encoding="utf-8"),
        common=yaml.safe_dump(compared.common, sort_keys=False),
        few=FEW_ROWS,
        long=LONG_TABLE,
        wide=WIDE,
        most_columns=MOST_COLUMNS,
    )


def _lead(summary: Summary, apart: int) -> str:
    """How many points over what, of which model, when."""
    config = summary.compared.points[0].config
    axes = short_names([key for point in summary.compared.points for key in point.axes])
    done = len(summary.rows) - len(summary.missing)
    parts = [f"{done} of {len(summary.rows)} points over {', '.join(axes.values())}"]
    if apart:
        parts.append(f"measured on {apart} different things")
    elif config.is_synthetic:
        parts.append(f"synthetic world ({config.synthetic.preset})")
    elif config.is_stored:
        parts.append(f"stored activations: {config.store.path}")
    else:
        parts.append(f"{config.model.name}, {config.model.hook_point or f'layer {config.model.layer}'}")
        parts.append(f"text: {config.data.source}")
    return " · ".join([*parts, time.strftime("%-d %B %Y, %H:%M")])


def _warnings(summary: Summary) -> list[tuple[str, str]]:
    """What is not here, and which trainings ended with a split that is dead, idle or does almost everything."""
    found = []
    if summary.missing:
        points = "; ".join(f"{row.point.name} ({row.missing})" for row in summary.missing[:MOST_MISSING])
        more = len(summary.missing) - MOST_MISSING
        found.append(
            ("Not in this report:", points + (f"; and {more} more, which table.csv names" if more > 0 else ""))
        )
    changed = [row for row in summary.rows if row.changed]
    if changed:
        points = "; ".join(f"{row.point.name}: {row.changed}" for row in changed[:MOST_MISSING])
        more = len(changed) - MOST_MISSING
        found.append(("Data changed since the training:", points + (f"; and {more} more" if more > 0 else "")))
    inexact = [
        f"{row.point.name}: {'; '.join(row.results['trained_inexactly'])}"
        for row in summary.rows
        if "trained_inexactly" in row.results
    ]
    if inexact:
        found.append(("Trained on with other versions than begun with:", "; ".join(inexact[:MOST_MISSING])))
    unwell = [row for row in summary.rows if row.trouble]
    if unwell:
        points = "; ".join(f"{row.point.name}: {row.trouble}" for row in unwell[:MOST_MISSING])
        more = len(unwell) - MOST_MISSING
        count = f"In {len(unwell)} of {len(summary.rows)} trainings a split ended unwell:"
        found.append((count, points + (f"; and {more} more" if more > 0 else "")))
    return found


def _summary_table(summary: Summary) -> dict[str, Any]:
    """Groups as rows; measures of one family stand under a common head."""
    keys = list(dict.fromkeys(key for group in summary.groups for key in group.axes))
    short, names = short_names(keys), shown_in("summary", summary.measures)
    families = itertools.groupby((REGISTRY[name] for name in names), key=lambda measure: measure.family)
    if summary.seeds > 1:
        note = f"± is the 95 % interval of the mean over up to {summary.seeds} seeds (Student's t)."
    else:
        note = "One seed: ± is the 95 % interval over held-out documents of that run; it says nothing about seeds."
    return {
        "axes": [_words(short[key]) for key in keys],
        "several": summary.seeds > 1,
        "families": [(family, _members(list(measures))) for family, measures in families],
        "rows": [
            {
                "settings": [shown(group.value(key)) for key in keys],
                "seeds": sum(not row.missing for row in group.rows),
                "cells": [with_interval(*group.interval(name)) for name in names],
            }
            for group in summary.groups
        ],
        "note": note,
    }


def _members(measures: list[Measure]) -> list[str]:
    """What tells measures of a family apart; the one that is alone needs nothing."""
    return [measure.member or ("all" if len(measures) > 1 else "") for measure in measures]


def _words(name: str) -> str:
    return name.replace("_", " ")


def _differences(summary: Summary) -> dict[str, Any]:
    """Differences seed by seed, and whether their interval leaves out zero."""
    found = compare(summary)
    measures = list(dict.fromkeys(name for entry in found for name in entry.differences))
    rows = []
    for entry in found:
        group, reference = entry.group, entry.reference
        keys = list(dict.fromkeys([*group.axes, *reference.axes]))
        differing = [key for key in keys if shown(group.value(key)) != shown(reference.value(key))]
        names = {key: _words(name) for key, name in short_names(keys).items()}
        pairs = [f"{names[key]} {shown(group.value(key))} − {shown(reference.value(key))}" for key in differing]
        shared = [f"{names[key]} {shown(group.value(key))}" for key in group.axes if key not in differing]
        cells = [("–", "", False)] * len(measures)
        for place, name in enumerate(measures):
            if name in entry.differences:
                mean, half, _ = entry.differences[name]
                cells[place] = (f"{mean:+.3f}", f"{half:.3f}", abs(mean) > half)
        rows.append({"change": ", ".join(pairs), "where": ", ".join(shared), "cells": cells})
    return {
        "measures": [label(name) for name in measures],
        "rows": rows,
        "seeds": max((seeds for entry in found for _, _, seeds in entry.differences.values()), default=0),
    }


def _picture(path: Path, title: str) -> dict[str, Any]:
    """A PNG as data, to be shown at half its pixels."""
    content = path.read_bytes()
    width, height = int.from_bytes(content[16:20], "big"), int.from_bytes(content[20:24], "big")
    data = base64.b64encode(content).decode()
    return {"data": data, "title": title, "width": width // 2, "height": height // 2}


class Experimented(NamedTuple):
    """What a page shows of one experiment."""

    help: str
    rows: list[tuple[dict[str, Any], str, str]]
    """Picture of its headline numbers, caption, and address of the file without its ending."""
    results: list[dict[str, Any]]
    """Its own pictures, point by point."""


def _experiments(summary: Summary, charts: list[tuple[dict[str, Any], Chart, str]]) -> list[Experimented]:
    """Each experiment's headline numbers over the points, and its own figures of every point."""
    folder = summary.compared.folder
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in EXPERIMENTS}
    for name, experiment in EXPERIMENTS.items():
        for row, run in zip(summary.rows, summary.compared.runs, strict=True):
            for place, path in enumerate(files_of(run, row.point.config, name)):
                drawn, page = path.with_suffix(".png"), path.with_suffix(".html")
                if not drawn.exists():
                    continue
                if experiment.compared:
                    draw_again(name, path)
                found[name].append(
                    {
                        "title": f"{row.point.name}: {path.stem}",
                        "image": None,
                        "drawn": drawn,
                        "place": place,
                        "file": _address(drawn, folder),
                        "page": _address(page, folder) if page.exists() else "",
                        "latents": _latents(path, run.result("features", "html"), folder),
                    }
                )
    # The first split of every run and experiment comes before the second of any.
    room = min(MOST_BYTES, BYTES_A_RUN * len(summary.rows))
    for result in sorted((result for results in found.values() for result in results), key=lambda one: one["place"]):
        room -= result["drawn"].stat().st_size
        if room > 0:
            result["image"] = _picture(result["drawn"], result["title"])
    made = []
    for name, results in found.items():
        rows = [(image, chart.caption, stem) for image, chart, stem in charts if chart.name == name]
        if rows or results:
            made.append(Experimented(EXPERIMENTS[name].help, rows, results))
    return made


def _address(path: Path, folder: Path) -> str:
    return urllib.parse.quote(os.path.relpath(path, folder))


def _latents(path: Path, features: Path, folder: Path) -> list[tuple[int, str, str]]:
    """The first latents that results speak of, what they are called there, and where the page of latents shows them."""
    if path.stem == features.stem or not features.exists():
        return []
    found: dict[int, str] = {}
    open_: list[Any] = [read_results(path)]
    while open_ and len(found) < MOST_LATENTS:
        node = open_.pop(0)
        if isinstance(node, dict):
            latent, explained = node.get("latent"), node.get("explanations")
            if isinstance(latent, int):
                words = [str(node[key]) for key in ("concept", "label", "explanation") if node.get(key)]
                found.setdefault(latent, ": ".join(words))
            if isinstance(explained, dict) and isinstance(node.get("top"), list):  # of a spliced context
                found |= {latent: str(explained.get(str(latent), "")) for latent in node["top"] if latent not in found}
        open_ += [part for part in (node.values() if isinstance(node, dict) else node) if isinstance(part, dict | list)]
    page = _address(features, folder)
    return [(latent, name, f"{page}#latent={latent}") for latent, name in [*found.items()][:MOST_LATENTS]]
