"""The parts of explaining by themselves: rules over tokens, prompts and their answers, scores and their means."""

from __future__ import annotations

import numpy as np
import pytest

from tsae.experiments.answers.prompts import Answer
from tsae.experiments.explain import prompts
from tsae.experiments.explain.explainers import DETECTION, FUZZING, TokenExplainer, TokenRules, describe, tasks_of
from tsae.experiments.explain.scores import balanced_accuracy, headline, summarise
from tsae.experiments.shared.firings import Firings, cut, peaks

LENGTH = 16


@pytest.fixture(scope="module")
def planted() -> Firings:
    """300 texts. Latent 0 fires on token 7; latent 1 everywhere in texts that hold token 8 or 9; latent 2 on 3 when alone."""
    generator = np.random.default_rng(0)
    tokens = generator.integers(10, 60, (300, LENGTH)).astype(np.int32)
    for row in range(300):
        if row % 3 == 0:
            tokens[row, generator.integers(1, LENGTH)] = 7
        if row % 4 == 0:
            tokens[row, generator.integers(1, LENGTH)] = 8 if row % 8 else 9
    topic = (row % 4 == 0 for row in range(300))
    f = np.zeros((300, LENGTH, 3), np.float32)
    f[..., 0] = 2.0 * (tokens == 7)
    f[..., 1] = np.array(list(topic))[:, None] * generator.uniform(1, 2, (300, LENGTH))
    f[:, 0] = 0
    document = np.repeat(np.arange(300)[:, None], LENGTH, 1).astype(np.int32)
    document[:, 0] = -1
    by_latent = f.reshape(-1, 3).T
    latents, places = np.nonzero(by_latent)
    offsets = np.searchsorted(latents, np.arange(4))
    distance = np.ones((300, LENGTH), np.float32)
    distance[:, :2] = np.nan
    return Firings(offsets, places.astype(np.int32), by_latent[latents, places], tokens, document, distance)


def test_rules_find_the_token_a_latent_fires_on_and_the_ones_that_give_it_away(planted: Firings) -> None:
    windows = cut(planted, LENGTH)
    rules = TokenRules(planted, windows)
    assert rules.fires_on(0) == [7]
    assert rules.given_away_by(peaks(planted, windows, 0)[0])[:1] == [7]
    assert rules.fires_on(1) == []  # no token carries a twentieth of it
    assert set(rules.given_away_by(peaks(planted, windows, 1)[0])[:2]) == {8, 9}
    assert rules.fires_on(2) == []
    assert rules.given_away_by(np.empty(0, np.int64)) == []


def test_rules_in_words() -> None:
    assert describe([" the", "\n"], [" the", "\n"]) == 'on " the", "\\n"'
    assert describe([" a"], ["b"]) == 'on " a"; in text with "b"'
    assert describe([], []) == ""


def _excerpt(tokens: str, *fires: int) -> dict:
    return {"document": 0, "tokens": tokens.split(), "values": {str(place): 1.0 + place for place in fires}}


def test_marks_are_as_many_and_never_on_active_tokens_when_they_are_wrong() -> None:
    record = {
        "latent": 3,
        "rule": {"on": ["x"], "given_away_by": ["x"]},
        "active": [_excerpt("a x b c d x", 1, 5), _excerpt("x x x", 0, 1, 2), _excerpt("x x x y", 0, 1, 2)],
        "inactive": [_excerpt("a b c"), _excerpt("d e f")],
    }
    detection, fuzzing = tasks_of(record, "x", seed=0)
    assert (detection.scorer, fuzzing.scorer) == (DETECTION, FUZZING)
    assert sorted(item.truth for item in detection.items) == [False, False, True, True, True]
    assert len(fuzzing.items) == 4  # a text that is active everywhere cannot be marked wrongly
    for item in fuzzing.items:
        active = {int(place) for place in item.excerpt["values"]}
        assert set(item.marks) <= active if item.truth else set(item.marks).isdisjoint(active)
    assert sorted(len(item.marks) for item in fuzzing.items) == [1, 1, 2, 2]
    assert tasks_of(record, "x", seed=0) == [detection, fuzzing]

    judged = TokenExplainer().judge([detection, fuzzing])
    for task, (verdicts, reasons) in zip((detection, fuzzing), judged, strict=True):
        assert verdicts == [item.truth for item in task.items]
        assert reasons == []


def test_marked_text_keeps_its_spaces_outside_the_marks() -> None:
    excerpt = {"tokens": ["The", " cat", "s", " sat", "\n", " down"], "values": {}}
    assert prompts.marked(excerpt, (1, 2, 5)) == "The <<cats>> sat <<down>>"
    assert prompts.plain(excerpt) == "The cats sat down"


def test_the_explanation_prompt_shows_marks_and_relative_strengths() -> None:
    prompt = prompts.explanation_prompt([_excerpt("a x b", 1), _excerpt("x b y", 0, 2)])
    assert "Text 1: a<<x>>b" in prompt.user
    assert "Strongest: 'y' 10, 'x' 3" in prompt.user


@pytest.mark.parametrize(
    ("text", "explanation"),
    [
        ("EXPLANATION: names of months", "names of months"),
        ("Let me see.\n\n**Explanation:** names of months", "names of months"),
        ("[EXPLANATION]: [names of months]", "names of months"),
        ("EXPLANATION: a first idea\nbut no.\nEXPLANATION: a better one", "a better one"),
        ("There is no explanation: I give up\n", ""),
        ("EXPLANATION:", ""),
        ("", ""),
    ],
)
def test_an_explanation_is_the_last_line_that_is_marked_as_one(text: str, explanation: str) -> None:
    found, reason = prompts.read_explanation(Answer(text))
    assert found == explanation
    assert bool(reason) == (not explanation)


@pytest.mark.parametrize(
    ("text", "verdicts"),
    [
        ("[1, 0, 1]", [True, False, True]),
        ("Text 2 [a note] is odd.\n```json\n[1,0,1]\n```", [True, False, True]),
        ("[true, false, true]", [True, False, True]),
        ("[1, 0]", []),
        ("[1, 2, 0]", []),
        ("[1, 0, [1]]", []),
        ('["1", "0", "1"]', []),
        ("1, 0, 1", []),
    ],
)
def test_verdicts_are_a_list_of_as_many_zeros_and_ones(text: str, verdicts: list[bool]) -> None:
    found, reason = prompts.read_verdicts(Answer(text), 3)
    assert found == verdicts
    assert bool(reason) == (not verdicts)


def test_a_failed_answer_keeps_its_reason() -> None:
    failed = Answer(None, "HTTP 500")
    assert prompts.read_explanation(failed) == ("", "HTTP 500")
    assert prompts.read_verdicts(failed, 3) == ([], "HTTP 500")


def test_saying_always_the_same_scores_a_half_however_many_texts_there_are() -> None:
    truth = [True] * 4 + [False] * 10
    assert balanced_accuracy(truth, [False] * 14)["score"] == 0.5
    assert balanced_accuracy(truth, [True] * 14)["score"] == 0.5
    found = balanced_accuracy(truth, [True] * 3 + [None] + [False] * 9 + [True])
    assert found == {"score": 0.95, "recall": 1.0, "specificity": 0.9, "texts": 13, "unanswered": 1}
    assert balanced_accuracy([True, False], [None, False])["score"] is None


def _about(group: int, rate: float, count: int, first: int) -> list[dict]:
    return [{"latent": first + n, "group": group, "rate": rate} for n in range(count)]


def test_means_weigh_strata_by_the_latents_in_them_and_groups_are_compared_at_equal_rate() -> None:
    # The high-level split is frequent; within a stratum of rates it is better by 0.1, overall it looks worse.
    about = [
        *_about(0, 0.5, 60, 0),
        *_about(0, 0.005, 20, 100),
        *_about(1, 0.5, 20, 200),
        *_about(1, 0.005, 300, 300),
    ]
    value = {(0, 0.5): 0.6, (0, 0.005): 0.9, (1, 0.5): 0.5, (1, 0.005): 0.8}
    scores = {}
    for group, rate, first in ((0, 0.5, 0), (0, 0.005, 100), (1, 0.5, 200), (1, 0.005, 300)):
        for n in range(10):  # ten of each stratum are drawn
            noisy = value[group, rate] + (0.02 if n % 2 else -0.02)
            scores[first + n] = {"detection": {"score": noisy}, "fuzzing": {"score": None}}
    results = summarise(about, scores)
    detection = results["detection"]
    assert detection["high"]["mean"] == pytest.approx((60 * 0.6 + 20 * 0.9) / 80)
    assert detection["low"]["mean"] == pytest.approx((20 * 0.5 + 300 * 0.8) / 320)
    assert detection["all"]["mean"] == pytest.approx((60 * 0.6 + 20 * 0.9 + 20 * 0.5 + 300 * 0.8) / 400)
    assert detection["all"]["latents"] == 40
    difference = detection["high_minus_low_at_equal_rate"]
    assert difference["mean"] == pytest.approx(0.1)
    assert difference["strata"] == 2
    assert 0 < difference["half_width_95"] < 0.05
    assert results["fuzzing"]["all"]["mean"] is None
    assert detection["recall"]["latents"] == 0
    shown, half = headline(results)
    assert (
        set(shown)
        == set(half)
        == {
            "detection",
            "detection_high",
            "detection_low",
            "detection_high_minus_low_at_equal_rate",
        }
    )
