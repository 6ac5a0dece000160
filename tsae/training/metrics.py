"""metrics.jsonl: one line of measures every few steps, the same bytes whether or not a run was interrupted."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from tsae.config.run import RunConfig
from tsae.config.sections import KIND_SETTINGS
from tsae.runtime.errors import TsaeError

if TYPE_CHECKING:
    from tsae.training.trainer import Terms, Trainer

FEWEST = 0.1
"""A group has collapsed when its share of the feature activations is less than this part of its share of the latents."""

CROWDED = 0.3
"""The high-level group of a T-SAE has taken over when all others' share is less than this part of theirs of the latents:
what changes from token to token lives there, too, as in a Matryoshka SAE."""
EXPECTED_FIRINGS = 100
"""A latent is alive if it fired within as many tokens as latents need for so many firings each, if all fired alike."""
QUIET = 0.25
"""Share of its latents below which a group's being alive is warned of. On the embedded model all are at a learning rate
that fits, a third at one 10 times, a tenth at one 100 times too large."""
RUNAWAY, WORSE = 100.0, 2.0
"""A training has diverged when it leaves so many times as much variance unexplained as at its first line; at its last
line, as soon as that is clearly more. With learning rates 100 times too large, kinds that select come back from 18."""
LONGEST_LINE = 4096
"""Bytes that hold the last line of the file."""


class Living(NamedTuple):
    """How the latents of each of G groups are doing."""

    alive: list[float]
    """Share that fired within the last `tokens` tokens."""
    dead: list[float]
    """Share that did not within the last `training.dead_after` tokens."""
    tokens: int


def living(trainer: Trainer) -> Living:
    """What the counters of a trainer say after its last update; reading them waits for the device."""
    config, silence = trainer.config, trainer.tokens_since_fired.cpu()
    alike = EXPECTED_FIRINGS * config.sae.dict_size // config.sae.k
    tokens = min(alike, config.training.dead_after, trainer.steps_done * config.training.batch_size)
    groups = [silence[group] for group in trainer.dictionary.group_slices]
    dead = [float((group >= config.training.dead_after).double().mean()) for group in groups]
    return Living([float((group < tokens).double().mean()) for group in groups], dead, tokens)


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


def quiet(alive: Sequence[float], config: RunConfig) -> str:
    """Which groups have hardly a latent alive, given the shares that are; nothing if none has."""
    names = ["the dictionary"]
    if len(alive) > 1:
        names = [f"group {group} ({'low' if group else 'high'}-level split)" for group in range(len(alive))]
    return " and ".join(
        f"of the {size} latents of {name} only {share:.1%} are alive"
        for name, size, share in zip(names, config.sae.group_sizes, alive, strict=True)
        if share < QUIET
    )


def has_diverged(fve: float, first: float, last: bool) -> bool:
    """Whether a run whose first line had an explained variance of `first` has gone out of hand at this (`last`) line."""
    return math.isfinite(fve) and fve < 0 and 1 - fve > (WORSE if last else RUNAWAY) * (1 - first)


def first_fve(path: Path) -> float | None:
    """Explained variance at the first line of a metrics.jsonl; None where there is no line."""
    if not path.exists():
        return None
    with path.open() as stream:
        line = stream.readline()
    return json.loads(line).get("fve") if line.endswith("\n") else None


def last_imbalance(path: Path, config: RunConfig) -> str:
    """`imbalance`, or else `quiet`, at the last line of a metrics.jsonl; nothing where there is none."""
    if not path.exists():
        return ""
    with path.open("rb") as stream:
        stream.seek(max(0, path.stat().st_size - LONGEST_LINE))
        lines = stream.read().splitlines()
    last = json.loads(lines[-1]) if lines else {}
    shares, alive = (_of_groups(last, name, len(config.sae.fractions)) for name in ("share", "alive"))
    found = imbalance(shares, config) if len(shares) > 1 else ""
    return found or (quiet(alive, config) if alive else "")


def _of_groups(line: dict[str, float], name: str, groups: int) -> list[float]:
    """A line's values for each group; none where it has not all of them, as those of older versions."""
    found = [line[f"{name}_{group}"] for group in range(groups) if f"{name}_{group}" in line]
    return found if len(found) == groups else []


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
