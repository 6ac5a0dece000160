"""A point: one validated run of a grid, under a name made from the values that vary."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tsae.config import schema
from tsae.config.paths import as_written
from tsae.config.run import RunConfig
from tsae.config.sections import ObjectiveConfig
from tsae.config.synthetic import SyntheticConfig


@dataclass(frozen=True)
class Point:
    """One run of a sweep."""

    name: str
    """Run name, from the swept values: `split_fraction=0.2,seed=0`."""
    axes: dict[str, Any]
    """Key path → value, of what the sweep varies."""
    config: RunConfig

    def value(self, key: str) -> Any:
        """The setting at key path `key`, swept in this point or not."""
        found: Any = self.config
        for name in key.split("."):
            found = getattr(found, name)
        return found.preset if isinstance(found, (ObjectiveConfig, SyntheticConfig)) else found


def short_names(keys: list[str]) -> dict[str, str]:
    """Key path → its last component, or the whole path where that is ambiguous."""
    distinct = list(dict.fromkeys(keys))
    last = Counter(key.rpartition(".")[2] for key in distinct)
    return {key: key.rpartition(".")[2] if last[key.rpartition(".")[2]] == 1 else key for key in distinct}


def key_paths(cls: type = RunConfig, path: str = "") -> Iterator[str]:
    """Every setting of a run as a key path."""
    hints = schema.type_hints(cls)
    for field in dataclasses.fields(cls):
        dotted = f"{path}.{field.name}" if path else field.name
        if dataclasses.is_dataclass(hints[field.name]):
            yield from key_paths(hints[field.name], dotted)
        else:
            yield dotted


def file_name(text: str, longest: int = 150) -> str:
    """`text` as the name of a file or folder: portable characters, bounded length, still unique."""
    clean = re.sub(r"[^\w.,=+-]+", "-", text).strip("-.") or "sweep"
    if len(clean) <= longest:
        return clean
    return f"{clean[:longest]}-{schema.stable_hash(text, 8)}"


def shown(value: Any) -> str:
    """A setting's value as it reads in names and tables."""
    value = as_written(value)
    if isinstance(value, (list, tuple)):
        return "+".join(shown(item) for item in value)
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "none"}[value]
    return f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)
