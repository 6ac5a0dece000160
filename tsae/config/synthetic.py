"""The settings of a synthetic world: activations whose true features are known, in place of a language model's.

    x_t = scale · (Σ_i h_ti u_i + Σ_j l_tj v_j + noise · ε)        h: slow features, l: fast features

A slow feature stays for a segment of tokens, a fast one is drawn anew at every token. `place` and `recover` ask two
questions of a dictionary; the other presets are `place` (or what their name says) made harder in one respect.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from tsae.config.bounds import Bound, Count, Natural, NonNegative, Positive, Probability

Amplitudes = Annotated[
    tuple[float, ...],
    Bound(
        lambda ends: len(ends) == 2 and 0 < ends[0] <= ends[1],
        "two positive numbers, the smaller one first, are expected",
    ),
]
Rates = Annotated[
    tuple[float, ...],
    Bound(
        lambda rates: len(rates) > 0 and all(0 < rate <= 1 for rate in rates),
        "probabilities above 0, one for each time scale, are allowed",
    ),
]


@dataclass(frozen=True, kw_only=True)
class SyntheticConfig:
    """The world behind `data.source: synthetic`; `synthetic.preset` fills in what is not given."""

    preset: Literal[
        "place", "recover", "place_null", "recover_null", "distractors", "correlated", "drifting", "time_scales"
    ] = "place"
    """`place`: room for every feature, where do the slow ones live? `recover`: too few latents, are slow features learned at all? `_null`: nothing persists; `distractors`: frequent nuisances that persist as long; `correlated`: slow features come in families; `drifting`: their directions wander; `time_scales`: two speeds of slow features. Other keys override it."""
    sequences: Annotated[int, Bound(lambda n: n > 1, "one to train on and one to hold out are needed")] = 8704
    """Sequences of data.context_length tokens, held-out ones included."""
    activation_dim: Count = 64
    """Width of the activations (D)."""
    n_slow: Count = 30
    """Slow features, shared out evenly among the time scales."""
    k_slow: Count = 3
    """Slow features active at a time, over all time scales."""
    n_fast: Count = 90
    """Fast features."""
    k_fast: Count = 4
    """Fast features active on each token."""
    popularity: NonNegative = 1.0
    """Exponent of the fast features' popularity, which falls with their rank as a power law; 0: all alike."""
    slow_amplitude: Amplitudes = (1.0, 2.0)
    """Smallest and largest amplitude of a slow feature, drawn for each segment."""
    fast_amplitude: Amplitudes = (1.0, 2.0)
    """Smallest and largest amplitude of a fast feature, drawn for each token."""
    jitter: NonNegative = 0.2
    """Standard deviation of the logarithm of a slow feature's amplitude within a segment; it wanders slowly."""
    silence: Probability = 0.1
    """Probability that an active slow feature is silent on a token."""
    switch: Rates = (1 / 64,)
    """Probability per token that the slow features are drawn anew, one for each time scale; 1: nothing persists."""
    relatedness: Probability = 0.0
    """Probability that all slow features of a segment come from one family of related ones."""
    drift: NonNegative = 0.0
    """Length of a slowly wandering displacement of the slow features' directions, relative to theirs."""
    n_distractors: Natural = 0
    """Nuisance features that persist like slow ones, each with segments of its own; neither slow nor fast in the measures."""
    distractor_rate: Probability = 0.5
    """Share of the tokens on which a distractor is active."""
    noise: NonNegative = 0.05
    """Standard deviation of the noise in each dimension, before the scale."""
    scale: Positive = 1.0
    """Factor on all activations; at 1 their norm is about 4 in `place`."""

    @property
    def group_names(self) -> tuple[str, ...]:
        """Kinds of true features: one for each time scale, then the fast ones, then distractors if there are any."""
        slow = ("slow",) if len(self.switch) == 1 else tuple(f"slow_{i}" for i in range(len(self.switch)))
        return (*slow, "fast", *(("distractor",) if self.n_distractors else ()))

    @property
    def group_sizes(self) -> tuple[int, ...]:
        """True features of each kind."""
        scales = len(self.switch)
        slow = (self.n_slow // scales,) * scales
        return (*slow, self.n_fast, *((self.n_distractors,) if self.n_distractors else ()))


RECOVER: dict[str, Any] = {
    "n_slow": 16,
    "k_slow": 1,
    "n_fast": 120,
    "k_fast": 6,
    "popularity": 0.2,
    "slow_amplitude": [0.7, 1.0],
    "silence": 0.05,
}

SYNTHETIC_PRESETS: dict[str, dict[str, Any]] = {
    "place": {},
    "recover": RECOVER,
    "place_null": {"switch": [1.0]},
    "recover_null": {**RECOVER, "switch": [1.0]},
    "distractors": {"n_distractors": 6},
    "correlated": {"relatedness": 0.8},
    "drifting": {"drift": 0.5},
    "time_scales": {"k_slow": 4, "switch": [1 / 128, 1 / 8]},
}
