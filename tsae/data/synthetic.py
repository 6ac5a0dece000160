"""A synthetic world: true directions, and sequences of true feature activations as a function of seed and number.

Sequences are made in blocks, each from a random stream of its own, so that any part can be made without the rest.
Shapes: N sequences, L positions, D activation_dim, n true features, k of one kind active on a token.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from tsae.config.run import RunConfig
from tsae.config.sections import DataConfig
from tsae.config.synthetic import SyntheticConfig
from tsae.data.contexts import Contexts

VERSION = 1
"""Raised whenever the same settings give other numbers; part of a store's name."""

BLOCK = 256  # sequences
PERSISTENCE = 0.95  # of a slow feature's amplitude and of a drifting direction, from token to token
REPULSION_STEPS, REPULSION = 200, 0.01
DIRECTIONS, SEQUENCES = 1, 2  # keep the two kinds of random streams apart


class Truth(NamedTuple):
    """What is known of a synthetic store: n features of several kinds and their activations on held-out sequences."""

    directions: np.ndarray
    """[n, D] float32 unit vectors."""
    group: np.ndarray
    """[n] int32: index into `group_names` of each feature."""
    group_names: tuple[str, ...]
    features: np.ndarray
    """[heldout, L, n] float32 activations, without the scale."""


class World:
    """The features of a run's synthetic world and their activations."""

    def __init__(self, world: SyntheticConfig, data: DataConfig) -> None:
        self.settings, self._length, self._seed = world, data.context_length, data.seed % 2**64
        self.heldout = min(max(1, round(data.holdout * world.sequences)), world.sequences - 1)
        self.group = np.repeat(np.arange(len(world.group_sizes), dtype=np.int32), world.group_sizes)
        random = np.random.default_rng([self._seed, DIRECTIONS])
        self.directions = spread_directions(random, len(self.group), world.activation_dim)

    @classmethod
    def of(cls, config: RunConfig) -> World:
        """The world of a run."""
        return cls(config.synthetic, config.data)

    def contexts(self) -> Contexts:
        """Sequences without text: every one is a document of its own, all tokens are 0."""
        shape = (self.settings.sequences, self._length)
        rows = np.arange(shape[0], dtype=np.int32)
        return Contexts(
            tokens=np.zeros(shape, np.int32),
            lengths=np.full(shape[0], self._length, np.int32),
            document=np.repeat(rows[:, None], self._length, axis=1),
            label=np.full(shape[0], -1, np.int32),
            label_names=(),
            heldout=self.heldout,
            fingerprint="",
        )

    def truth(self) -> Truth:
        """What is known of the held-out sequences."""
        held_out = range(self.settings.sequences - self.heldout, self.settings.sequences)
        return Truth(self.directions, self.group, self.settings.group_names, self.read(held_out)[0])

    def read(self, sequences: range) -> tuple[np.ndarray, np.ndarray]:
        """True features [N, L, n] and activations [N, L, D] of consecutive sequences, both float32."""
        blocks = range(sequences.start // BLOCK, -(-sequences.stop // BLOCK))
        parts = []
        for block in blocks:
            wanted = slice(max(sequences.start - block * BLOCK, 0), sequences.stop - block * BLOCK)
            parts.append(tuple(array[wanted] for array in self._block(block)))
        features, activations = (np.concatenate(column) for column in zip(*parts, strict=True))
        return features, activations

    def _block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        random, world = np.random.default_rng([self._seed, SEQUENCES, block]), self.settings
        shape, scales = (BLOCK, self._length), len(world.switch)
        slow = [
            slow_features(random, shape, world.n_slow // scales, world.k_slow // scales, p, world) for p in world.switch
        ]
        parts = [*slow, fast_features(random, shape, world)]
        if world.n_distractors:
            parts.append(distractors(random, shape, world))
        features = np.concatenate(parts, axis=2)
        x = features @ self.directions
        if world.drift:
            strength = np.linalg.norm(np.concatenate(slow, axis=2), axis=2, keepdims=True)
            wander = wandering(random, shape, world.activation_dim) / np.sqrt(world.activation_dim)
            x += world.drift * strength * wander
        x += world.noise * random.standard_normal(x.shape, dtype=np.float32)
        return features, (world.scale * x).astype(np.float32)


def spread_directions(random: np.random.Generator, n: int, dim: int) -> np.ndarray:
    """Random unit vectors [n, dim], float32, pushed apart where two of them are close."""
    directions = random.standard_normal((n, dim))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    for _ in range(REPULSION_STEPS):
        cosines = directions @ directions.T
        np.fill_diagonal(cosines, 0)
        # A high power lets the closest neighbours count most.
        push = cosines * (cosines / np.abs(cosines).max(1, keepdims=True)) ** 8
        directions -= REPULSION * push @ directions
        directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    return directions.astype(np.float32)


def slow_features(
    random: np.random.Generator, shape: tuple[int, int], n: int, k: int, switch: float, world: SyntheticConfig
) -> np.ndarray:
    """Activations [N, L, n] of which k stay for a segment; segments end with probability `switch` at each token."""
    begins = random.random(shape) < switch
    begins[:, 0] = True
    segment = np.cumsum(begins).reshape(shape) - 1
    draws = int(begins.sum())
    order = random.random((draws, n))
    related = random.random(draws) < world.relatedness
    families = -(-n // (2 * k))
    family = random.integers(families, size=draws)
    order += related[:, None] & (np.arange(n) // (2 * k) == family[:, None])
    chosen = _largest(order, k)
    amplitude = _uniform(random, world.slow_amplitude, (draws, k))
    values = amplitude[segment] * np.exp(world.jitter * wandering(random, shape, k))
    values *= random.random(values.shape) >= world.silence
    return _scattered(chosen[segment], values, n)


def fast_features(random: np.random.Generator, shape: tuple[int, int], world: SyntheticConfig) -> np.ndarray:
    """Activations [N, L, n_fast], k_fast of them drawn anew at each token by popularity, without replacement."""
    n, k = world.n_fast, world.k_fast
    popularity = -world.popularity * np.log(np.arange(1, n + 1))
    # The k largest of log-probabilities with Gumbel noise are a draw without replacement.
    chosen = _largest(random.gumbel(size=(*shape, n)) + popularity, k)
    return _scattered(chosen, _uniform(random, world.fast_amplitude, (*shape, k)), n)


def distractors(random: np.random.Generator, shape: tuple[int, int], world: SyntheticConfig) -> np.ndarray:
    """Activations [N, L, n_distractors]: each has segments of its own and is on or off for a whole one."""
    size = (*shape, world.n_distractors)
    begins = random.random(size) < world.switch[0]
    begins[:, 0] = True
    values = _uniform(random, world.slow_amplitude, size) * (random.random(size) < world.distractor_rate)
    last = np.maximum.accumulate(np.where(begins, np.arange(shape[1])[:, None], 0), axis=1)
    return np.take_along_axis(values, last, axis=1).astype(np.float32)


def wandering(random: np.random.Generator, shape: tuple[int, int], n: int) -> np.ndarray:
    """n stationary random walks [N, L, n] of variance 1 along the positions."""
    walk = random.standard_normal((*shape, n), dtype=np.float32)
    fresh = np.sqrt(1 - PERSISTENCE**2)
    for t in range(1, shape[1]):
        walk[:, t] = PERSISTENCE * walk[:, t - 1] + fresh * walk[:, t]
    return walk


def _uniform(random: np.random.Generator, ends: tuple[float, ...], size: tuple[int, ...]) -> np.ndarray:
    return random.uniform(ends[0], ends[-1], size)


def _largest(scores: np.ndarray, k: int) -> np.ndarray:
    """Indices [..., k] of the k largest entries of the last axis."""
    return np.argpartition(scores, -k, axis=-1)[..., -k:]


def _scattered(index: np.ndarray, values: np.ndarray, n: int) -> np.ndarray:
    """[..., n] float32 with `values` [..., k] at `index` [..., k]."""
    dense = np.zeros((*index.shape[:-1], n), np.float32)
    np.put_along_axis(dense, index, values.astype(np.float32), axis=-1)
    return dense
