"""metrics.jsonl: one line of measures every few steps, the same bytes whether or not a run was interrupted."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from tsae.config import RunConfig
from tsae.errors import TsaeError
from tsae.training.trainer import Terms

FEWEST = 0.1
"""A group has collapsed when its share of the feature activations is less than this part of its share of the latents."""


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
