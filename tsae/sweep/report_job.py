"""The last stage of a sweep as a job: its report, from what the launch left in its folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tsae.report.write import write_report
from tsae.sweep.attempt import attempts
from tsae.sweep.commandline import load_launch
from tsae.sweep.plan import make_plan


def report_stage(configs: str, overrides: Sequence[str], name: str) -> None:
    """Write the report of the sweep as its latest launch describes it; folder `configs` is of any launch of it.

    A job of an earlier launch may be the last to run, and must not bring back the points of an older file.
    """
    newest = attempts(Path(configs).parents[2])[-1].folder
    write_report(make_plan(load_launch(newest, name, list(overrides))).compared)
