"""Where responses begin, and how dialogues are cut to what a language model can read."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest

from tsae.config.experiments import AlignConfig
from tsae.data.labelled import ResponsePair
from tsae.experiments.align import pairs as align_pairs
from tsae.experiments.align.pairs import read_pairs, response_start
from tsae.runtime.errors import TsaeError

PROMPT = "\n\nHuman: Hello there\n\nAssistant: Hi.\n\nHuman: What now?\n\nAssistant:"


def words(text: str, **_: Any) -> dict[str, Any]:
    """A tokenizer of words with their leading blanks."""
    return {"offset_mapping": [match.span() for match in re.finditer(r"\s*\S+", text)]}


def test_the_response_begins_after_the_last_common_turn_of_the_assistant() -> None:
    pair = ResponsePair(PROMPT + " I am sure it is fine.", PROMPT + " I am not sure.")
    assert response_start(pair) == len(PROMPT)


def test_a_turn_inside_the_responses_is_not_taken() -> None:
    pair = ResponsePair(PROMPT + " A.\n\nHuman: x\n\nAssistant: y", PROMPT + " B.\n\nHuman: x\n\nAssistant: y")
    assert response_start(pair) == len(PROMPT)


def test_dialogues_without_a_common_turn_have_no_response() -> None:
    assert response_start(ResponsePair("Human: a", "Assistant: b")) is None


def pairs(monkeypatch: pytest.MonkeyPatch, found: list[ResponsePair], room: int) -> align_pairs.Pairs:
    monkeypatch.setattr(align_pairs, "response_pairs", lambda *_, **__: iter(found))
    return read_pairs(AlignConfig(dataset="local"), None, None, words, room)


def test_a_long_prompt_is_cut_from_its_beginning_and_the_response_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = ResponsePair(PROMPT + " one two three", PROMPT + " four")
    found = pairs(monkeypatch, [pair], room=5)
    assert found.chosen[0].text[found.chosen[0].start :] == " one two three"
    assert found.rejected[0].text[found.rejected[0].start :] == " four"
    assert len(words(found.chosen[0].text)["offset_mapping"]) == 5
    assert found.cut == 2


def test_a_response_longer_than_the_room_loses_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    found = pairs(monkeypatch, [ResponsePair(PROMPT + " a b c d e f", PROMPT + " g")], room=4)
    assert found.chosen[0].text == "\n\nAssistant: a b c"
    assert found.chosen[0].text[found.chosen[0].start :] == " a b c"


def test_pairs_without_responses_are_skipped_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    good = ResponsePair(PROMPT + " a", PROMPT + " b")
    found = pairs(monkeypatch, [ResponsePair("x", "y"), good, ResponsePair(PROMPT + " a", PROMPT)], room=50)
    assert (len(found.chosen), found.skipped) == (1, 2)
    with pytest.raises(TsaeError, match="none of 1 pairs has two responses"):
        pairs(monkeypatch, [ResponsePair("x", "y")], room=50)


def test_where_the_dataset_tells_the_answers_begin_there(monkeypatch: pytest.MonkeyPatch) -> None:
    found = pairs(monkeypatch, [ResponsePair("Why? Because.", "Why? Never.", 4)], room=50)
    assert [side.text[side.start :] for side in (*found.chosen, *found.rejected)] == [" Because.", " Never."]
    templated = ResponsePair("<s>Assistant: a b", "<s>Assistant: a c", 3, templated=True)
    found = pairs(monkeypatch, [templated._replace(start=None), templated], room=50)
    assert (found.skipped, found.chosen[0].start) == (1, 3)
    assert all(text.templated for text in align_pairs.as_texts(found))


def test_the_embedded_pairs_say_what_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [
        SimpleNamespace(label=topic, text=" ".join(f"{topic}{word}" for word in range(400)))
        for topic in (align_pairs.CHOSEN_TOPIC, align_pairs.REJECTED_TOPIC, align_pairs.PROMPT_TOPIC)
    ]
    monkeypatch.setattr(align_pairs, "labelled_texts", lambda _: iter(texts))
    found = read_pairs(AlignConfig(), None, None, words, 128)
    assert found.note is not None
    assert "no preferences" in found.note
    for chosen, rejected in zip(found.chosen, found.rejected, strict=True):
        assert set(re.findall(r"\D+(?=\d)", chosen.text[chosen.start :].replace(" ", ""))) == {align_pairs.CHOSEN_TOPIC}
        assert align_pairs.REJECTED_TOPIC in rejected.text[rejected.start :]
        assert chosen.text[: chosen.start] == rejected.text[: rejected.start]
