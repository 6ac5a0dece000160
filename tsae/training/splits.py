"""How the splits of a dictionary do while it is trained: what is wrong with one, and which setting changes it.

All is said of a line of metrics.jsonl, so that a training says it while it runs and a report says the same at its end.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import NamedTuple

from tsae.config.run import RunConfig
from tsae.config.sections import KIND_SETTINGS
from tsae.runtime import metadata

EXPECTED_FIRINGS = 100
"""A latent is alive if it fired within as many tokens as latents need for so many firings each, if all fired alike."""
ALIVE = 0.7
"""Share of its latents below which a split's being alive is warned of. On SmolLM2-135M runs that read well have 0.89 to
1, those whose high-level split lost to the temporal term 0.28 to 0.47; a learning rate 10 times too large leaves a third."""
UNDERUSED = 0.75
"""The high-level split of a T-SAE is underused when its share of the activity is less than this part of its share of the
latents. With 20 % of them on SmolLM2-135M, splits from which topics are read better have 45 to 80 % of the active latents
of a token, those that lost them 1 to 18 %; on synthetic worlds, where little is slow, good ones have 28 to 35 %."""
RESERVED = 0.5
"""Where active latents are reserved for it, the same part of their share: of 30 % of them, well used ones have 18 to 20 % of
the activity, with 20 % or with 50 % of the latents."""
COLLAPSED = 0.1
"""The same part for every other split: the first stands in all nested reconstructions, and what it takes is gone."""
CROWDED = 0.25
"""The high-level split of a T-SAE has taken over when the share of all others is less than this part of theirs of the
latents: what changes from token to token lives there, too, as in a Matryoshka SAE. On the embedded model the high-level
split of that has 87 % of the activity, those of a term that acts 28 to 78 %."""
TOO_STRONG = "the temporal term is too strong: lower objective.temporal_alpha, or set training.normalize where activations are large"
TOO_WEAK = "the temporal term is too weak, so that fast features live there, too: raise objective.temporal_alpha"
TOO_FEW = "raise objective.high_share, which reserves too few active latents for it"
TOO_MANY = "lower objective.high_share, which reserves too many active latents for it"
UNHEARD = "give it more weight in objective.group_weights"
DYING = "lower training.lr to keep latents alive, training.dead_after to let aux-k revive them"
LONGEST_LINE = 2**16
"""Bytes that hold the last line of the file."""
LINE = {str: Real}
"""What a line holds."""


class Trouble(NamedTuple):
    """What is wrong with a split."""

    what: str
    """Which split it is, and its numbers."""
    remedy: str
    """The setting to change."""

    def __str__(self) -> str:
        return f"{self.what}; {self.remedy}"


def window(config: RunConfig) -> int:
    """Tokens within which a latent must have fired to be called alive."""
    return EXPECTED_FIRINGS * config.sae.dict_size // config.sae.k


def collapsed(shares: Sequence[float], fractions: Sequence[float]) -> list[int]:
    """The groups whose share of the feature activations is far below their share of the latents: others took over."""
    return [
        group
        for group, (share, fraction) in enumerate(zip(shares, fractions, strict=True))
        if share < COLLAPSED * fraction
    ]


def trouble(line: Mapping[str, float], config: RunConfig) -> Trouble | None:
    """What is wrong with the splits at a line of metrics.jsonl, and what changes it; none where all are well."""
    fractions, temporal = config.sae.fractions, KIND_SETTINGS[config.sae.kind].temporal
    alive, shares = (of_splits(line, name, config) for name in ("alive", "share"))
    # Before a window has passed, latents that fire seldom seem dead.
    settled = line.get("tokens", 0) >= window(config)
    dying = [group for group, share in enumerate(alive) if settled and share < ALIVE]
    underused = collapsed(shares, fractions) if shares else []
    crowded, reserved = False, config.objective.high_share
    if temporal and shares:
        crowded = 1 - shares[0] < CROWDED * (1 - fractions[0])
        least = RESERVED * reserved if reserved else UNDERUSED * fractions[0]
        if shares[0] < least and 0 not in underused:
            underused.insert(0, 0)
    # The term explains a dying high-level split, and one that took over all others' dying; nothing else does.
    if any(not temporal or (group == 0) == crowded for group in dying):
        unwell, remedy = dying, DYING
    elif crowded:
        unwell, remedy = [0], TOO_MANY if reserved else TOO_WEAK
    else:
        unwell = sorted({*dying, *underused})
        remedy = UNHEARD
        if temporal and unwell == [0]:
            remedy = TOO_FEW if reserved and not dying else TOO_STRONG
    if not unwell:
        return None
    uneven = [0] if crowded else underused
    return Trouble(" and ".join(_numbers(line, g, config, g in dying, g in uneven) for g in unwell), remedy)


def _numbers(line: Mapping[str, float], group: int, config: RunConfig, dying: bool, uneven: bool) -> str:
    """`the high-level split (group 0) is 34% alive, has 12% of the activity with 20% of the latents`."""
    parts = [f"is {line[f'alive_{group}']:.0%} alive"] if dying else []
    if uneven:
        share, fraction = 100 * line[f"share_{group}"], 100 * config.sae.fractions[group]
        parts.append(f"has {share:.3g}% of the activity with {fraction:.3g}% of the latents")
    if of_splits(line, "fve", config):
        parts.append(f"explains {line[f'fve_{group}']:.2f} of the variance alone")
    return f"{name_of(group, config)} {', '.join(parts)}"


def name_of(group: int, config: RunConfig) -> str:
    """A group of latents in words."""
    if len(config.sae.fractions) == 1:
        return "the dictionary"
    return f"the {'low' if group else 'high'}-level split (group {group})"


def of_splits(line: Mapping[str, float], name: str, config: RunConfig) -> list[float]:
    """A line's values for each split; none where it has not all of them, as those of older versions."""
    keys = [f"{name}_{group}" for group in range(len(config.sae.fractions))]
    return [line[key] for key in keys] if all(math.isfinite(line.get(key, math.nan)) for key in keys) else []


def beside(values: Sequence[float]) -> str:
    """`0.98/0.91`: one value for each split."""
    return "/".join(f"{value:.2f}" for value in values)


def last_line(path: Path) -> dict[str, float]:
    """The last whole line of a metrics.jsonl; empty where there is none, or it is damaged."""
    whole, _, _ = _end_of(path).rpartition(b"\n")
    return metadata.record(whole.rpartition(b"\n")[2], LINE) or {}


def damaged_end(path: Path) -> str:
    """In words, that a finished run's metrics.jsonl does not end in a whole line; nothing if it does or is not there."""
    sound = not path.exists() or (_end_of(path).endswith(b"\n") and last_line(path))
    return "" if sound else f"{path}: its last line is damaged, so nothing is known of the splits in training"


def _end_of(path: Path) -> bytes:
    if not path.exists():
        return b""
    with path.open("rb") as stream:
        stream.seek(max(0, path.stat().st_size - LONGEST_LINE))
        return stream.read()
