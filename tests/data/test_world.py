"""The synthetic world: what its settings promise of the features, and that any part of it can be made alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tsae.config import run as configuration
from tsae.data.synthetic import World
from tsae.runtime.errors import TsaeError


def world(length: int = 32, seed: int = 0, **settings: Any) -> World:
    """A world of 600 sequences."""
    tree = {
        "data": {"source": "synthetic", "context_length": length, "seed": seed, "skip_positions": 0},
        "synthetic": {"sequences": 600, **settings},
    }
    return World.of(configuration.from_mapping(tree, "test"))


def of_kind(made: World, features: np.ndarray, kind: str) -> np.ndarray:
    """The features [N, L, n] of one kind."""
    return features[..., made.group == made.settings.group_names.index(kind)]


def stays(features: np.ndarray) -> float:
    """How often a feature that is active is so on the next token."""
    on = features > 0
    return float((on[:, 1:] & on[:, :-1]).sum() / on[:, :-1].sum())


def test_any_range_of_sequences_is_what_the_whole_holds_there() -> None:
    made = world()
    features, x = made.read(range(600))
    for part in (range(3), range(200, 300), range(511, 513), range(590, 600)):
        again, again_x = made.read(part)
        np.testing.assert_array_equal(again, features[part.start : part.stop])
        np.testing.assert_array_equal(again_x, x[part.start : part.stop])


def test_the_seed_changes_directions_and_features() -> None:
    one, other = world(), world(seed=1)
    assert not np.array_equal(one.directions, other.directions)
    assert not np.array_equal(one.read(range(4))[0], other.read(range(4))[0])


def test_activations_are_the_scaled_sum_of_active_directions() -> None:
    made = world(scale=20.0, noise=0.0)
    features, x = made.read(range(10))
    np.testing.assert_allclose(x, 20 * features @ made.directions, rtol=1e-4, atol=1e-3)


def test_directions_are_unit_vectors_kept_apart() -> None:
    directions = world().directions
    cosines = np.abs(directions @ directions.T) - np.eye(len(directions))
    np.testing.assert_allclose(np.linalg.norm(directions, axis=1), 1, rtol=1e-5)
    assert cosines.max() < 0.25  # 120 random directions of 64 dimensions come as close as 0.45


def test_slow_features_persist_and_fast_ones_do_not() -> None:
    made = world()
    features, _ = made.read(range(600))
    slow, fast = of_kind(made, features, "slow"), of_kind(made, features, "fast")
    assert stays(slow) == pytest.approx(0.9 * (63 / 64 + 0.1 / 64), abs=0.01)
    assert (fast > 0).sum(-1).min() == (fast > 0).sum(-1).max() == 4
    assert stays(fast) < 0.25
    assert (fast > 0).mean((0, 1))[0] > 0.5  # the most popular one
    assert ((slow > 0).sum(-1) <= 3).all()


def test_sequences_are_independent() -> None:
    made = world()
    on = of_kind(made, made.read(range(600))[0], "slow") > 0
    over_borders = (on[:-1, -1] & on[1:, 0]).sum() / on[:-1, -1].sum()
    assert over_borders == pytest.approx(0.09, abs=0.03)


def test_nothing_persists_in_the_null_world() -> None:
    made = world(preset="place_null")
    features, _ = made.read(range(600))
    assert stays(of_kind(made, features, "slow")) == pytest.approx(0.09, abs=0.01)


def test_time_scales_differ_in_how_long_their_features_stay() -> None:
    made = world(preset="time_scales", silence=0.0)
    features, _ = made.read(range(600))
    slower, faster = (stays(of_kind(made, features, kind)) for kind in ("slow_0", "slow_1"))
    assert slower == pytest.approx(1 - 127 / 128**2, abs=0.01)
    assert faster == pytest.approx(7 / 8 + 2 / 15 / 8, abs=0.01)


def test_distractors_are_frequent_and_persist() -> None:
    made = world(preset="distractors")
    features, _ = made.read(range(600))
    nuisance = of_kind(made, features, "distractor")
    assert (nuisance > 0).mean() == pytest.approx(0.5, abs=0.03)
    assert stays(nuisance) > 0.98


def test_related_features_come_together() -> None:
    def together(**settings: Any) -> float:
        made = world(silence=0.0, **settings)
        slow = of_kind(made, made.read(range(600))[0], "slow")[:, 0] > 0
        families = np.stack([slow[:, first : first + 6].sum(1) for first in range(0, 30, 6)], axis=1)
        return float((families.max(1) == 3).mean())

    assert together(preset="correlated") > 0.75
    assert together() < 0.15


def test_drift_moves_activations_away_from_the_directions() -> None:
    made, still = world(preset="drifting", noise=0.0), world(noise=0.0)
    features, x = made.read(range(20))
    moved = x - features @ made.directions
    strength = np.linalg.norm(of_kind(made, features, "slow"), axis=-1)
    assert np.linalg.norm(moved, axis=-1)[strength > 0].mean() == pytest.approx(
        0.5 * strength[strength > 0].mean(), rel=0.1
    )
    step = np.linalg.norm(np.diff(moved, axis=1), axis=-1).mean()
    assert step < 0.7 * np.linalg.norm(moved, axis=-1).mean()  # it wanders rather than jumps
    np.testing.assert_allclose(still.read(range(20))[1], still.read(range(20))[0] @ still.directions, atol=1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"k_slow": 31}, "synthetic.k_slow: 31 is impossible; there are only 30 slow features"),
        ({"switch": [0.5, 0.0]}, r"synthetic.switch: \[0.5, 0.0\] is impossible"),
        ({"switch": [0.5, 0.1], "n_slow": 31}, "synthetic.n_slow: 31 is impossible"),
        ({"fast_amplitude": [2, 1]}, "synthetic.fast_amplitude"),
        ({"preset": "plaice"}, "did you mean 'place'"),
        ({"scale": 0}, "synthetic.scale: 0.0 is impossible"),
    ],
)
def test_impossible_worlds_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(TsaeError, match=message):
        world(**settings)
