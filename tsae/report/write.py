"""Tables, figures and one HTML page of a sweep: `python launch/report.py sweeps/split_fraction.yaml`.

May be run at any time, also while the sweep runs: points without results are named and left out.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tsae.report import text
from tsae.report.claims import section, write_claims
from tsae.report.compared import Compared
from tsae.report.figures import draw_experiments, draw_figures
from tsae.report.page import as_page
from tsae.report.summary import Summary, summarise
from tsae.report.training import draw_training
from tsae.runtime import files, locks, metadata


def write_report(compared: Compared) -> Path:
    """Write results.json, table.md, table.csv, the figures and report.html; returns the path of the page."""
    state = compared.hash_of_results()
    summary = summarise(compared)
    page = compared.page
    page.parent.mkdir(parents=True, exist_ok=True)
    with locks.hold_when_free(page.with_name("report.lock"), f"report {compared.name}"):
        for leftover in page.parent.glob(".*.tmp"):  # of one that was killed
            leftover.unlink(missing_ok=True)
        files.write_text(page.with_name("table.csv"), text.as_csv(summary))
        files.write_text(page.with_name("table.md"), text.as_markdown(summary))
        drawn = [
            *draw_figures(summary, page.parent),
            *draw_training(summary, page.parent),
            *draw_experiments(summary, page.parent),
        ]
        judged = section(compared, write_claims(compared)) if compared.settings.claims else None
        files.write_text(page, as_page(summary, drawn, judged))
        metadata.write(compared.record, {"sweep": compared.name, "made_from": state, "points": points_of(summary)})
    return page


def points_of(summary: Summary) -> list[dict[str, Any]]:
    """The points with all that is known of them, for results.json."""
    return [
        {
            "name": row.point.name,
            "axes": row.point.axes,
            "missing": row.missing,
            "results": row.results,
            "experiments": {name: value for name, (value, _) in row.experiments.items()},
        }
        for row in summary.rows
    ]


def short_table(compared: Compared) -> list[str]:
    """A few measures of each point, for the terminal."""
    return text.short_table(summarise(compared))
