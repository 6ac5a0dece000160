"""The last stage of a sweep as a job: its report, from what the launch left in its folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from plan import BASE_FILE, SWEEP_FILE, make_plan
from report import write_report
from sweepfile import load_sweep


def report_stage(configs: str, overrides: Sequence[str], name: str) -> None:
    """Write the report of the sweep whose launch left its files beside folder `configs`."""
    attempt = Path(configs).parent
    sweep = load_sweep(attempt / SWEEP_FILE, str(attempt / BASE_FILE), list(overrides), name)
    write_report(make_plan(sweep))
