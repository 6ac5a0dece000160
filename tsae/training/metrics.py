"""metrics.jsonl: one line of measures every few steps, the same bytes whether or not a run was interrupted."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tsae.config.run import RunConfig
from tsae.config.sections import KIND_SETTINGS
from tsae.runtime.errors import TsaeError

if TYPE_CHECKING:
    from tsae.training.trainer import Terms

FEWEST = 0.1
"""A group has collapsed when its share of the feature activations is less than this part of its share of the latents."""

CROWDED = 0.3
"""The high-level group of a T-SAE has taken over when all others' share is less than this part of theirs of the latents:
what changes from token to token lives there, too, as in a Matryoshka SAE."""
LONGEST_LINE = 4096
"""Bytes that hold the last line of the file."""


def measures_of(step: int, terms: Terms, config: RunConfig) -> dict[str, float]:
    """The line of update `step`. No clock is in it, so that a resumed run writes the same."""
    shares = terms.group_shares.tolist()
    values = {name: float(value) for name, value in terms._asdict().items() if name != "group_shares"}
    if len(shares) > 1:
        values |= {f"share_{group}": share for group, share in enumerate(shares)}
        values["collapsed_groups"] = len(collapsed(shares, config.sae.fractions))
    values["l0"] = values.pop("n_active") / config.training.batch_size
    values["dead_percent"] = 100 * values.pop("dead_features") / config.sae.dict_size
    return {"step": step, "tokens": (step + 1) * config.training.batch_size, **values}


def collapsed(shares: Sequence[float], fractions: Sequence[float]) -> list[int]:
    """The groups whose share of the feature activations is far below their share of the latents: others took over."""
    return [
        group
        for group, (share, fraction) in enumerate(zip(shares, fractions, strict=True))
        if share < FEWEST * fraction
    ]


def imbalance(shares: Sequence[float], config: RunConfig) -> str:
    """Which group fell silent or took over, given the groups' shares of the feature activations; nothing if none did."""
    fractions = config.sae.fractions
    silent = collapsed(shares, fractions)
    if silent:
        first, largest = silent[0], max(range(len(shares)), key=shares.__getitem__)
        return (
            f"group {largest} took over: it has {shares[largest]:.1%} of the feature activations, group {first} only "
            f"{100 * shares[first]:.2g}% with {fractions[first]:.0%} of the latents"
        )
    if KIND_SETTINGS[config.sae.kind].temporal and 1 - shares[0] < CROWDED * (1 - fractions[0]):
        return f"group 0 took over: it has {shares[0]:.1%} of the feature activations with {fractions[0]:.0%} of the latents"
    return ""


def last_imbalance(path: Path, config: RunConfig) -> str:
    """`imbalance` at the last line of a metrics.jsonl; nothing where there is none."""
    if len(config.sae.fractions) == 1 or not path.exists():
        return ""
    with path.open("rb") as stream:
        stream.seek(max(0, path.stat().st_size - LONGEST_LINE))
        lines = stream.read().splitlines()
    last = json.loads(lines[-1]) if lines else {}
    names = [f"share_{group}" for group in range(len(config.sae.fractions))]
    return imbalance([last[name] for name in names], config) if set(names) <= set(last) else ""


class Metrics:
    """The file, continued at byte `offset`: an earlier attempt's lines past its last resumable state are cut off.

    Raises TsaeError if the file is shorter than that.
    """

    def __init__(self, path: Path, offset: int) -> None:
        path.touch()
        if path.stat().st_size < offset:
            raise TsaeError(
                f"{path}: has lost lines since the run was interrupted ({path.stat().st_size} bytes of {offset}); "
                f"remove {path.with_name('resume')} to begin again"
            )
        self._stream = path.open("r+b")
        self._stream.truncate(offset)
        self._stream.seek(offset)

    def append(self, measures: dict[str, float]) -> None:
        """Add one line."""
        self._stream.write((json.dumps(measures) + "\n").encode())
        self._stream.flush()

    @property
    def length(self) -> int:
        """Bytes written so far."""
        return self._stream.tell()

    def sync(self) -> None:
        """Return when every line is on the disk; any thread may call it."""
        os.fsync(self._stream.fileno())

    def close(self) -> None:
        """Write no more lines."""
        self.sync()
        self._stream.close()
