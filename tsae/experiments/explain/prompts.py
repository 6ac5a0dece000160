"""What a language model is asked about a latent, and how its answers are read."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from tsae.experiments.answers.prompts import Answer, Prompt

TEXTS_PER_PROMPT = 5
EXPLANATION_TOKENS, VERDICT_TOKENS = 400, 200
OPEN, CLOSE = "<<", ">>"

ABOUT = (
    "A feature of a language model is a number that the model computes at every token of a text. It is zero at most "
    "tokens and positive where something particular is going on: a certain word, a form of grammar, a subject, a tone."
)
EXPLAIN = (
    f"{ABOUT} You see texts in which one feature is positive. Runs of tokens where it is positive stand between {OPEN} "
    f"and {CLOSE}; after each text its strongest tokens are listed with their strength from 1 to 10. Find out what "
    "the feature responds to. Say it in one short phrase that would let a reader tell, in new texts, where it is "
    "positive. Be as specific as the texts allow and do not mention features, tokens or these texts. You may think "
    "aloud; the last line of your answer must be\nEXPLANATION: the phrase"
)
DETECT = (
    f"{ABOUT} You get a description of one feature and numbered texts. Decide for each text whether the feature is "
    "positive anywhere in it. Answer with a JSON list alone that holds one number per text, in order: 1 if it is, 0 if not."
)
FUZZ = (
    f"{ABOUT} You get a description of one feature and numbered texts in which some tokens are marked with {OPEN} and "
    f"{CLOSE}. In some texts the marks are where the feature is strongest, in others they were put elsewhere. Decide "
    "for each text whether the marks fit the description. Answer with a JSON list alone that holds one number per "
    "text, in order: 1 if they fit, 0 if not."
)


def explanation_prompt(examples: Sequence[dict[str, Any]]) -> Prompt:
    """Asks for the explanation of a latent; `examples` are texts with its activations, the strongest one first."""
    largest = max(max(example["values"].values()) for example in examples)
    shown = []
    for number, example in enumerate(examples, start=1):
        strongest = sorted(example["values"].items(), key=lambda item: -item[1])[:3]
        listed = ", ".join(
            f"{example['tokens'][int(place)]!r} {max(1, round(10 * value / largest))}" for place, value in strongest
        )
        shown.append(f"Text {number}: {marked(example, map(int, example['values']))}\nStrongest: {listed}")
    return Prompt(EXPLAIN, "\n\n".join(shown), EXPLANATION_TOKENS)


def read_explanation(answer: Answer) -> tuple[str, str]:
    """The explanation in an answer and why there is none; one of the two is empty."""
    if answer.text is None:
        return "", str(answer.failure)
    found = re.findall(r"^[\W_]*explanation[\W_]*?:[*_\s]*(.+)$", answer.text, re.IGNORECASE | re.MULTILINE)
    text = found[-1].strip(" \t*_[]") if found else ""
    return (text, "") if text else ("", answer.failure or "the answer has no line that begins with EXPLANATION:")


def verdict_prompts(system: str, explanation: str, texts: Sequence[str]) -> list[Prompt]:
    """Asks for a verdict on each text, a few at a time; `system` is DETECT or FUZZ."""
    prompts = []
    for start in range(0, len(texts), TEXTS_PER_PROMPT):
        batch = texts[start : start + TEXTS_PER_PROMPT]
        numbered = "\n\n".join(f"Text {number}: {text}" for number, text in enumerate(batch, start=1))
        user = f"Description: {explanation}\n\n{numbered}\n\nThe JSON list of {len(batch)} numbers:"
        prompts.append(Prompt(system, user, VERDICT_TOKENS))
    return prompts


def read_verdicts(answer: Answer, count: int) -> tuple[list[bool], str]:
    """The verdicts in an answer and why there are none; one of the two is empty."""
    if answer.text is None:
        return [], str(answer.failure)
    for listed in reversed(re.findall(r"\[[^\[\]]*\]", answer.text)):
        try:
            numbers = json.loads(listed)
        except ValueError:
            continue
        if len(numbers) == count and all(number in (0, 1) for number in numbers):
            return [bool(number) for number in numbers], ""
    return [], answer.failure or f"the answer has no list of {count} zeros and ones"


def plain(excerpt: dict[str, Any]) -> str:
    """A text without marks."""
    return _one_line("".join(excerpt["tokens"]))


def marked(excerpt: dict[str, Any], places: Any) -> str:
    """A text with runs of marked tokens between marks."""
    at = set(places)
    pieces = []
    for place, token in enumerate(excerpt["tokens"]):
        begins, ends = place in at and place - 1 not in at, place in at and place + 1 not in at
        if begins:
            word = token.lstrip()
            token = f"{token.removesuffix(word)}{OPEN}{word}"
        pieces.append(token)
        if ends:
            pieces.append(CLOSE)
    return _one_line("".join(pieces))


def _one_line(text: str) -> str:
    return " ".join(text.split())
