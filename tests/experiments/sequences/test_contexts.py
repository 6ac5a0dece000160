"""How contexts of several passages are made."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tsae.data.labelled import LabelledText
from tsae.experiments.sequences.contexts import draw_lengths, draw_splice, from_texts, read_pool, total_tokens
from tsae.runtime.errors import TsaeError

BOS = [99]


def tokenizer(texts: list[str], **_: Any) -> dict[str, list[list[int]]]:
    """One token per word, which is a number."""
    return {"input_ids": [[int(word) for word in text.split()] for text in texts]}


def text_of(first: int, count: int) -> str:
    return " ".join(map(str, range(first, first + count)))


@pytest.fixture
def texts() -> list[LabelledText]:
    """Four texts of 100 tokens on each of three labels; a token tells its label and its place."""
    return [
        LabelledText(text_of(1000 * label + 100 * number, 100), "abc"[label], 4 * label + number)
        for label in range(3)
        for number in range(4)
    ]


def test_passages_come_whole_from_texts_of_different_labels(texts: list[LabelledText]) -> None:
    random = np.random.default_rng(0)
    pool = read_pool(texts, tokenizer, BOS, ())
    for _ in range(20):
        lengths = draw_lengths(3, 90, random)
        splice = draw_splice(pool, lengths, random)
        assert splice.tokens[0] == 99
        assert splice.passage[0] == -1
        assert np.bincount(splice.passage[1:]).tolist() == lengths.tolist()
        assert sorted(splice.names) == ["a", "b", "c"]
        for index, name in enumerate(splice.names):
            own = splice.tokens[splice.passage == index]
            assert (np.diff(own) == 1).all()
            assert "abc"[own[0] // 1000] == name
            assert own[0] // 100 == own[-1] // 100


def test_the_control_is_one_piece_of_one_text(texts: list[LabelledText]) -> None:
    random = np.random.default_rng(0)
    splice = draw_splice(read_pool(texts, tokenizer, BOS, ()), draw_lengths(3, 90, random), random, one_text=True)
    assert (np.diff(splice.tokens[1:]) == 1).all()
    assert len(set(splice.names)) == 1
    assert splice.passage.max() == 2


def test_drawn_lengths_differ_and_fill_the_room() -> None:
    random = np.random.default_rng(0)
    drawn = np.stack([draw_lengths(4, 120, random) for _ in range(50)])
    assert (drawn.sum(1) == 120).all()
    assert drawn.min() >= 15
    assert len(np.unique(drawn[:, 0])) > 5


@pytest.mark.parametrize(("wanted", "expected"), [(None, [20, 45, 45]), (10, [10, 10, 10])])
def test_room_that_a_short_text_leaves_goes_to_the_longer_ones(wanted: int | None, expected: list[int]) -> None:
    own = [text_of(0, 20), text_of(100, 200), text_of(400, 80)]
    splice = from_texts(own, tokenizer, BOS, 111, wanted)
    assert np.bincount(splice.passage[1:]).tolist() == expected
    assert splice.tokens[[1, expected[0] + 1]].tolist() == [0, 100]


def test_passages_that_have_no_room_are_refused() -> None:
    with pytest.raises(TsaeError, match="do not fit: the model has 20 positions"):
        from_texts([text_of(0, 50)] * 3, tokenizer, BOS, 20, None)
    with pytest.raises(TsaeError, match="has 5 tokens; 8 are asked for"):
        from_texts([text_of(0, 5), text_of(0, 50)], tokenizer, BOS, 100, None)
    with pytest.raises(TsaeError, match="at least 2 passages"):
        total_tokens(1, None, 100)
