"""What a report is made from: points with their run folders. Who put them together does not matter here."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tsae.checkpoint import RunFolder
from tsae.config import schema
from tsae.config.points import Point
from tsae.runtime import metadata


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """What the report shows."""

    x: str | None = None
    """Key path of the swept value on the horizontal axis; by default the first that varies and is not a seed."""
    baseline: dict[str, Any] = field(default_factory=dict)
    """Key path: value of the points that the others are compared with, seed by seed; by default those with the first swept value."""
    claims: bool = False
    """Judge the paper's claims, too; nothing but sae.kind and seeds may vary."""


@dataclass(frozen=True, kw_only=True)
class Compared:
    """The runs that one report compares, and where it goes."""

    name: str
    points: tuple[Point, ...]
    runs: tuple[RunFolder, ...]
    """The run of each point."""
    folder: Path
    """Where the report lies."""
    settings: ReportConfig
    origin: Path
    """The file that says what is compared."""
    base: Path
    """The file with the settings below it."""
    common: dict[str, Any]
    """The settings that all points share, as a tree."""
    drawn: tuple[str, ...] = ()
    """Key paths of settings that were drawn at random."""
    command: str = ""
    """The command line that makes the runs and the report again, where one does."""
    evaluated: bool = True
    """Whether the points are evaluated at all; else their experiments are all there is."""

    @property
    def page(self) -> Path:
        """The page."""
        return self.folder / "report.html"

    @property
    def record(self) -> Path:
        """The report's numbers, with the hash of what they were made from."""
        return self.folder / "results.json"

    def is_current(self) -> bool:
        """Whether the report on disk shows the results that are there now."""
        made = metadata.whole(self.record).get("made_from")
        return self.page.exists() and bool(made == self.hash_of_results())

    def anything(self) -> bool:
        """Whether any run has weights or results."""
        return any(run.weights.exists() or run.eval_results.exists() for run in self.runs)

    def hash_of_results(self) -> str:
        """Hash of what a report is made from: the points, and which results are there."""
        # Results are replaced as whole files, which changes their folder.
        read = [path for run in self.runs for path in (*sorted(run.path.glob("*.json")), run.weights) if path.exists()]
        stamps = [path.stat().st_mtime_ns for path in read]
        return schema.stable_hash([stamps, [point.name for point in self.points], self.origin.read_text()])
