"""Where a sweep's report lies, and whether it shows the results that are there now."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tsae.config import schema
from tsae.runtime import files

if TYPE_CHECKING:
    from tsae.sweep.plan import Plan


def page_path(plan: Plan) -> Path:
    """Where the page of a sweep lies."""
    return plan.folder / "report" / "report.html"


def record_path(plan: Plan) -> Path:
    """Where the report's numbers lie, with the hash of what they were made from."""
    return page_path(plan).with_name("results.json")


def is_current(plan: Plan) -> bool:
    """Whether the report on disk shows the results that are there now."""
    made = files.read_whole_json(record_path(plan)).get("made_from")
    return page_path(plan).exists() and bool(made == hash_of_results(plan))


def hash_of_results(plan: Plan) -> str:
    """Hash of what a report is made from: the points, and which results are there."""
    # Results are replaced as whole files, which changes their folder.
    runs = [plan.run(point) for point in plan.points]
    stamps = [path.stat().st_mtime_ns for run in runs for path in sorted(run.path.glob("*.json"))]
    return schema.stable_hash([stamps, [point.name for point in plan.points], plan.sweep.path.read_text()])
