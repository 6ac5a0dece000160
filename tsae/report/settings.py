"""What a sweep file says about its report."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """What the report shows."""

    x: str | None = None
    """Key path of the swept value on the horizontal axis; by default the first that varies and is not a seed."""
    baseline: dict[str, Any] = field(default_factory=dict)
    """Key path: value of the points that the others are compared with, seed by seed; by default those with the first swept value."""
    claims: bool = False
    """Judge the paper's claims, too; nothing but sae.kind and seeds may vary."""
