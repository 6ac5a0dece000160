"""What a new pair rule costs: a name among the settings, and an entry with what it does."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from tsae.config import run as configuration
from tsae.config.run import Counted
from tsae.config.sections import PAIR_RULE_SETTINGS, PairRuleSettings
from tsae.runtime.errors import TsaeError
from tsae.store.pairs import PAIR_RULES, PairRule, PairStream
from tsae.store.reader import Store

SKIP = 1
BATCH = 24


@pytest.fixture
def exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rule `exactly:N`: the partner is the token N back; tokens with fewer before them are left out."""
    monkeypatch.setitem(PAIR_RULE_SETTINGS, "exactly", PairRuleSettings(numbered=True))
    monkeypatch.setitem(
        PAIR_RULES, "exactly", PairRule(lambda rows, _, number, *__: rows - number, fewest=lambda number: number)
    )


@pytest.fixture(scope="session")
def store(write_store: Callable[..., Store], ragged: np.ndarray) -> Store:
    """Sequences of 32 positions, 100 of them held out."""
    return write_store(ragged[:400], heldout=100)


def stream_of(store: Store, rule: str) -> PairStream:
    return PairStream(store, rule, BATCH, 3, counted=Counted(SKIP), pool_sequences=100)


def tokens_with(document: np.ndarray, back: int) -> set[tuple[int, int]]:
    """(sequence, position) of every token that has `back` tokens of its document before it."""
    return {
        (sequence, position)
        for sequence, row in enumerate(document)
        for position in range(SKIP + back, len(row))
        if row[position] >= 0 and (row[position - back : position] == row[position]).all()
    }


def test_a_pair_rule_is_named_and_described_in_one_table_each() -> None:
    assert list(PAIR_RULE_SETTINGS) == list(PAIR_RULES)
    for name, rule in PAIR_RULES.items():
        assert (rule.partners is not None) == PAIR_RULE_SETTINGS[name].paired


@pytest.mark.usefixtures("exactly")
@pytest.mark.parametrize("back", [1, 3])
def test_a_new_rule_pairs_the_tokens_that_it_names(store: Store, ragged: np.ndarray, back: int) -> None:
    stream, seen = stream_of(store, f"exactly:{back}"), set()
    for step, batch in enumerate(stream.iterate(0, stream.steps_per_epoch)):
        # The store's activations begin with the sequence and the position that they stand at.
        place = batch[..., :2].numpy().astype(int)
        np.testing.assert_array_equal(place[:, 1], place[:, 0] - [0, back])
        np.testing.assert_array_equal(batch, stream[step])
        seen |= {(int(sequence), int(position)) for sequence, position in place[:, 0]}
    allowed = tokens_with(ragged[:300], back)
    assert len(seen) == BATCH * stream.steps_per_epoch
    assert seen <= allowed
    assert len(allowed) - len(seen) < BATCH


@pytest.mark.usefixtures("exactly")
def test_a_new_rule_is_a_setting_like_the_others() -> None:
    config = configuration.from_mapping({"training": {"pair_rule": "exactly:8"}}, "test")
    assert config.training.pair_rule == "exactly:8"
    with pytest.raises(TsaeError, match=r"did you mean 'exactly:8'\?.*allowed: .*none, exactly:N \(N at least 1\)"):
        configuration.from_mapping({"training": {"pair_rule": "exactly"}}, "test")
    with pytest.raises(TsaeError, match="needs pairs: previous, random, within:N or exactly:N"):
        configuration.from_mapping({"training": {"pair_rule": "none"}}, "test")


def test_without_it_the_name_is_refused() -> None:
    with pytest.raises(TsaeError, match=r"'exactly:8' is not allowed; .*allowed: previous, random, within:N \(N at"):
        configuration.from_mapping({"training": {"pair_rule": "exactly:8"}}, "test")


def test_a_number_beyond_every_context_means_any_earlier_token(store: Store) -> None:
    far, any_earlier = (stream_of(store, rule)[0] for rule in (f"within:{10**12}", "random"))
    np.testing.assert_array_equal(far, any_earlier)
