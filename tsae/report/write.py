"""Tables, figures and one HTML page of a sweep: `python launch/report.py sweeps/split_fraction.yaml`.

May be run at any time, also while the sweep runs: points without results are named and left out.
"""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import TYPE_CHECKING

from tsae.config.points import shown
from tsae.report.claims import section, write_claims
from tsae.report.compared import Compared
from tsae.runtime import files

if TYPE_CHECKING:
    from tsae.report.summary import Summary

SHORT_COLUMNS = (
    "frac_variance_explained",
    "lipschitz_cont_h",
    "lipschitz_cont_l",
    "frac_recovered",
    "l0",
    "frac_alive",
)


def write_report(compared: Compared) -> Path:
    """Write results.json, table.md, table.csv, the figures and report.html; returns the path of the page."""
    from tsae.report.charts import draw_charts
    from tsae.report.page import render
    from tsae.report.summary import summarise

    state = compared.hash_of_results()
    summary = summarise(compared)
    page = compared.page
    page.parent.mkdir(parents=True, exist_ok=True)
    files.write_text(page.with_name("table.csv"), _csv(summary))
    files.write_text(page.with_name("table.md"), _markdown(summary))
    files.write_text(page, render(summary, draw_charts(summary, page.parent), _claims_section(compared)))
    points = [
        {
            "name": row.point.name,
            "axes": row.point.axes,
            "missing": row.missing,
            "results": row.results,
            "experiments": {name: value for name, (value, _) in row.experiments.items()},
        }
        for row in summary.rows
    ]
    files.write_json(compared.record, {"sweep": compared.name, "made_from": state, "points": points})
    return page


def _claims_section(compared: Compared) -> str:
    """The verdicts as HTML, where the sweep asks for them."""
    if not compared.settings.claims:
        return ""
    return section(compared, write_claims(compared))


def short_table(compared: Compared) -> list[str]:
    """A few measures of each point, for the terminal."""
    from tsae.report.measures import figures, label
    from tsae.report.summary import summarise

    summary = summarise(compared)
    columns = [name for name in SHORT_COLUMNS if name in summary.measures]
    cells = [["point", *(label(name) for name in columns)]]
    for row in summary.rows:
        values = [figures(row.values.get(name, float("nan")), 3) for name in columns]
        cells.append([row.point.name, *values] if not row.missing else [row.point.name, f"({row.missing})"])
    widths = [max(len(line[i]) for line in cells if len(line) == len(cells[0]) or not i) for i in range(len(cells[0]))]
    return ["  ".join(_aligned(line, widths)).rstrip() for line in cells]


def _aligned(line: list[str], widths: list[int]) -> list[str]:
    # The remark on a missing point stands in the place of all its figures, and there may be no column of figures.
    return [
        line[0].ljust(widths[0]),
        *(cell.rjust(width) for cell, width in zip(line[1:], [*widths[1:], 0], strict=False)),
    ]


def _csv(summary: Summary) -> str:
    """One line for each point: name, swept values, every measure."""
    axes = list(dict.fromkeys(key for row in summary.rows for key in row.point.axes))
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["point", *axes, "missing", *summary.measures])
    for row in summary.rows:
        swept = [shown(row.point.value(key)) for key in axes]
        table.writerow([row.point.name, *swept, row.missing, *(row.values.get(name, "") for name in summary.measures)])
    return text.getvalue()


def _markdown(summary: Summary) -> str:
    """Measures as rows, points as columns."""
    from tsae.report.measures import figures

    rows = [row for row in summary.rows if not row.missing]
    lines = ["| measure | " + " | ".join(row.point.name for row in rows) + " |", "|---|" + "---:|" * len(rows)]
    for name in summary.measures:
        values = (figures(row.values.get(name, float("nan"))) for row in rows)
        lines.append(f"| {name} | " + " | ".join(values) + " |")
    lines += [f"\nMissing: {row.point.name} ({row.missing})" for row in summary.missing]
    return "\n".join(lines) + "\n"
