"""metrics.jsonl: one line of measures every few steps, the same bytes whether or not a run was interrupted."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import google_crc32c

from tsae.config.run import RunConfig
from tsae.runtime import metadata
from tsae.runtime.checksums import checksum_of
from tsae.runtime.errors import TsaeError
from tsae.training.splits import LINE, LONGEST_LINE, collapsed, window

if TYPE_CHECKING:
    from tsae.training.trainer import Terms, Trainer

RUNAWAY, WORSE = 100.0, 2.0
"""A training has diverged when it leaves so many times as much variance unexplained as at its first line; at its last
line, as soon as that is clearly more. With learning rates 100 times too large, kinds that select come back from 18."""


class Living(NamedTuple):
    """How the latents of each of G groups are doing."""

    alive: list[float]
    """Share that fired within the last window of tokens (`tsae.training.splits.window`)."""
    dead: list[float]
    """Share that did not within the last `training.dead_after` tokens."""


def living(trainer: Trainer) -> Living:
    """What the counters of a trainer say after its last update; reading them waits for the device."""
    config, silence = trainer.config, trainer.tokens_since_fired.cpu()
    tokens = min(window(config), trainer.steps_done * config.training.batch_size)
    groups = [silence[group] for group in trainer.dictionary.group_slices]
    dead = [float((group >= config.training.dead_after).double().mean()) for group in groups]
    return Living([float((group < tokens).double().mean()) for group in groups], dead)


def measures_of(step: int, terms: Terms, config: RunConfig, latents: Living) -> dict[str, float]:
    """The line of update `step`. No clock is in it, so that a resumed run writes the same."""
    of_groups = {
        "share": terms.group_shares.tolist(),
        "l0": (terms.group_active / config.training.batch_size).tolist(),
        "fve": terms.group_fve.tolist(),
    }
    values = {name: float(value) for name, value in terms._asdict().items() if not name.startswith("group_")}
    if len(of_groups["share"]) > 1:
        for name, each in of_groups.items():
            values |= {f"{name}_{group}": value for group, value in enumerate(each)}
        values["collapsed_groups"] = len(collapsed(of_groups["share"], config.sae.fractions))
    for name in ("alive", "dead"):
        values |= {f"{name}_{group}": share for group, share in enumerate(getattr(latents, name))}
    values["l0"] = values.pop("n_active") / config.training.batch_size
    values["dead_percent"] = 100 * values.pop("dead_features") / config.sae.dict_size
    return {"step": step, "tokens": (step + 1) * config.training.batch_size, **values}


def has_diverged(fve: float, first: float, last: bool) -> bool:
    """Whether a run whose first line had an explained variance of `first` has gone out of hand at this (`last`) line."""
    return math.isfinite(fve) and fve < 0 and 1 - fve > (WORSE if last else RUNAWAY) * (1 - first)


def first_fve(path: Path) -> float | None:
    """Explained variance at the first line of a metrics.jsonl; None where there is no line."""
    if not path.exists():
        return None
    with path.open("rb") as stream:
        line = stream.readline(LONGEST_LINE)
    return (metadata.record(line, LINE) or {}).get("fve") if line.endswith(b"\n") else None


class Metrics:
    """The file, continued at byte `offset`: an earlier attempt's lines past its last resumable state are cut off.

    `checksum` is that of the lines before (None: an earlier version did not note it). Raises TsaeError if the file is
    shorter than that, or they are others.
    """

    def __init__(self, path: Path, offset: int, checksum: int | None = None) -> None:
        path.touch()
        if path.stat().st_size < offset:
            raise TsaeError(
                f"{path}: has lost lines since the run was interrupted ({path.stat().st_size} bytes of {offset}); "
                f"remove {path.with_name('resume')} to begin again"
            )
        self._checksum = checksum_of(path, offset)
        if checksum not in (None, self._checksum):
            raise TsaeError(
                f"{path}: has changed since the run was interrupted; restore it, or remove {path.with_name('resume')} "
                "to begin again"
            )
        self._stream = path.open("r+b")
        self._stream.truncate(offset)
        self._stream.seek(offset)

    def append(self, measures: dict[str, float]) -> None:
        """Add one line."""
        line = metadata.line(measures)
        self._stream.write(line)
        self._stream.flush()
        self._checksum = int(google_crc32c.extend(self._checksum, line))

    @property
    def state(self) -> dict[str, int]:
        """Where the file is continued from here on: its length in bytes, and their checksum."""
        return {"metrics_bytes": self._stream.tell(), "metrics_crc32c": self._checksum}

    def sync(self) -> None:
        """Return when every line is on the disk; any thread may call it."""
        os.fsync(self._stream.fileno())

    def close(self) -> None:
        """Write no more lines."""
        self.sync()
        self._stream.close()
