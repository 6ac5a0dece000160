"""What an objective sets apart for the splits of a T-SAE must be there: latents, and enough active ones in a batch.

sae.dict_size 2048, sae.split_fraction 0.2   409 latents of the high-level split, 1,639 others
objective.coarse_fraction 0.1                204 of the others, the first
sae.k 16, objective.high_share 0.3           4.8 active latents of a token of the 409, 11.2 of the others
"""

from __future__ import annotations

from collections.abc import Callable

from tsae.config.sections import TERM_SETTINGS, ObjectiveConfig, SaeConfig

STRONGEST = 1e30
"""The largest weight of the temporal term: single precision holds it times the squares of activations."""
ONE_GROUP = "sae.group_fractions leaves no latents outside the high-level split; set it to none"


def coarse_latents(sae: SaeConfig, objective: ObjectiveConfig) -> int:
    """How many latents after the high-level split are the coarse part of the low-level one."""
    return int((objective.coarse_fraction or 0) * sae.dict_size)


def check_splits(
    sae: SaeConfig, objective: ObjectiveConfig, batch: int, check: Callable[[str, bool, str], None]
) -> None:
    """Have `check` refuse, by key path and what would be possible, settings of a T-SAE that its splits do not bear.

    `batch` is the number of tokens among which active latents are selected.
    """
    high, *others = sae.group_sizes
    low, share = sum(others), objective.high_share
    check(
        "objective.temporal",
        low > 0 or not TERM_SETTINGS[objective.temporal].predicts,
        "sae.group_fractions leaves no low-level split, which reconstructs the token itself; objective=scale_free needs none",
    )
    if objective.coarse_fraction is not None:
        check("objective.coarse_fraction", low > 0, ONE_GROUP)
        check(
            "objective.coarse_fraction",
            0 < coarse_latents(sae, objective) < others[0],
            f"it must be at least one of sae.dict_size ({sae.dict_size}) latents and leave one of the {others[0]} that "
            "follow the high-level split; or set it to none",
        )
    if share is not None:
        check("objective.high_share", low > 0, ONE_GROUP)
        check(
            "objective.high_share",
            share * sae.k <= high and (1 - share) * sae.k <= low,
            f"sae.k ({sae.k}) can be divided between a high-level split of {high} latents and {low} others by shares "
            f"from {max(0, 1 - low / sae.k):.3g} to {min(1, high / sae.k):.3g}; or set it to none",
        )
        check("objective.high_share", fills_both(sae, objective, batch), empty_split(sae, batch))
    strongest = objective.temporal_alpha * objective.temporal_anneal
    check(
        "objective.temporal_anneal",
        strongest <= STRONGEST,
        f"times objective.temporal_alpha it is {strongest:g}, and weights up to {STRONGEST:g} can be computed with",
    )


def fills_both(sae: SaeConfig, objective: ObjectiveConfig, batch: int) -> bool:
    """Whether each split's share of k is at least one active latent in a selection among `batch` tokens."""
    share = objective.high_share
    return share is None or min(round(part * sae.k * batch) for part in (share, 1 - share)) > 0


def empty_split(sae: SaeConfig, batch: int) -> str:
    """What to say where it is not."""
    return f"of the {sae.k * batch} active latents that are selected among {batch} tokens, one of the splits would get none"
