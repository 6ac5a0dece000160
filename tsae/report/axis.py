"""Where swept values stand on an axis."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tsae.config.points import short_names, shown

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDE_RATIO = 20.0
"""Swept values that span more than this factor are spread evenly or logarithmically."""
MOST_TICKS = 10


class SweptAxis:
    """The values of one swept setting, in the order and on the scale in which they are drawn."""

    def __init__(self, key: str, values: list[Any]) -> None:
        self.key = key
        self.values = list(dict.fromkeys(tuple(v) if isinstance(v, list) else v for v in values))
        numbers = [v for v in self.values if isinstance(v, (int, float)) and not isinstance(v, bool)]
        self.scale = "category"
        if len(numbers) == len(self.values) > 1:
            self.values.sort()
            smallest = min((abs(v) for v in numbers if v), default=1.0)
            wide = max(numbers) / smallest > WIDE_RATIO
            self.scale = "linear" if not wide else "log" if min(numbers) > 0 else "category"

    def position(self, value: Any) -> float:
        """Where `value` stands."""
        value = tuple(value) if isinstance(value, list) else value
        return float(self.values.index(value)) if self.scale == "category" else float(value)

    @property
    def label(self) -> str:
        """The setting's name for people."""
        return short_names([self.key])[self.key].replace("_", " ")

    @property
    def is_ordered(self) -> bool:
        """Whether a line between neighbours means something."""
        return all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in self.values)

    def apply(self, axes: Axes) -> None:
        """Set scale, ticks and label of `axes`."""
        if self.scale == "log":
            axes.set_xscale("log")
        if len(self.values) <= MOST_TICKS:
            labels = [shown(value) for value in self.values]
            long = max(map(len, labels)) * len(labels) > 44
            axes.set_xticks([self.position(v) for v in self.values], labels, rotation=30 if long else 0)
            axes.minorticks_off()
        if self.scale == "category":
            axes.set_xlim(-0.5, len(self.values) - 0.5)
            axes.grid(visible=False, axis="x")
        axes.set_xlabel(self.label)
