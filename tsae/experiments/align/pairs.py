"""Pairs of dialogues for `tsae align`: where the responses begin, how dialogues are cut, and pairs that run anywhere."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from tsae.config.experiments import AlignConfig
from tsae.data.chat import shared_length
from tsae.data.labelled import ANSWER, EMBEDDED, LabelledText, ResponsePair, labelled_texts, response_pairs
from tsae.runtime.errors import TsaeError

HUMAN, ASSISTANT = "\n\nHuman:", f"\n\n{ANSWER}"
CHOSEN_TOPIC, REJECTED_TOPIC, PROMPT_TOPIC = "stdlib-network", "sympy", "stdlib-system"
CHOSEN_WORDS, REJECTED_WORDS, PROMPT_WORDS = (12, 36), (16, 48), (8, 16)
EMBEDDED_NOTE = (
    f"no preferences: the chosen response is a passage of documentation on {CHOSEN_TOPIC}, the rejected one a passage "
    f"on {REJECTED_TOPIC} and a third longer in words, after a prompt on {PROMPT_TOPIC}"
)


class Dialogue(NamedTuple):
    """One side of a pair as it is read: the end of the prompt, and the response."""

    text: str
    start: int
    """Character at which the response begins."""
    templated: bool = False
    """Whether a chat template wrote it: what spells a special token in it is one."""


class Pairs(NamedTuple):
    """Both sides of P pairs, and what happened on the way."""

    chosen: list[Dialogue]
    rejected: list[Dialogue]
    skipped: int
    """Pairs without a response of their own on either side."""
    cut: int
    """Dialogues that were longer than what is read."""
    note: str | None
    """What the pairs are, where they are not preferences."""


def read_pairs(settings: AlignConfig, subset: str | None, split: str | None, tokenizer: Any, room: int) -> Pairs:
    """The first pairs of the dataset that have responses, cut to `room` tokens. Raises TsaeError if none has."""
    dataset, embedded = settings.dataset, settings.dataset == EMBEDDED
    source = (
        embedded_pairs(settings.seed) if embedded else response_pairs(dataset, tokenizer, subset=subset, split=split)
    )
    chosen, rejected, skipped, cut = [], [], 0, 0
    for pair in source:
        start = response_start(pair)
        if start is None or not (pair.chosen[start:].strip() and pair.rejected[start:].strip()):
            skipped += 1
            continue
        texts = (pair.chosen, pair.rejected)
        sides = [_fitted(Dialogue(text, start, pair.templated), tokenizer, room) for text in texts]
        chosen.append(sides[0])
        rejected.append(sides[1])
        cut += sum(side.text != text for side, text in zip(sides, texts, strict=True))
        if len(chosen) == settings.pairs:
            break
    if not chosen:
        raise TsaeError(
            f"--dataset {dataset}: none of {skipped} pairs has two responses after a common prompt; expected are whole "
            f"dialogues of the form 'Human: … {ANSWER} …', or a column prompt beside the responses, or chat messages"
        )
    return Pairs(chosen, rejected, skipped, cut, EMBEDDED_NOTE if embedded else None)


def response_start(pair: ResponsePair) -> int | None:
    """Where the dataset says that the responses begin; else after the last 'Assistant:' that both dialogues share.

    None if there is no such place. What the responses themselves begin with in common belongs to the responses.
    """
    if pair.start is not None or pair.templated:
        return pair.start
    shared = shared_length(pair.chosen, pair.rejected)
    turn = pair.chosen.rfind(ANSWER, 0, shared)
    return None if turn < 0 else turn + len(ANSWER)


def _fitted(whole: Dialogue, tokenizer: Any, room: int) -> Dialogue:
    """The dialogue with as much of its prompt as fits before the response; one prompt token always stays."""
    offsets = tokenizer(
        whole.text,
        add_special_tokens=False,
        split_special_tokens=not whole.templated,
        return_offsets_mapping=True,
        verbose=False,
    )["offset_mapping"]
    response = next((index for index, (first, _) in enumerate(offsets) if first >= whole.start), len(offsets))
    kept = max(min(len(offsets) - room, response - 1), 0)
    left = offsets[kept][0] if kept else 0
    end = offsets[min(kept + room, len(offsets)) - 1][1]
    return Dialogue(whole.text[left:end], whole.start - left, whole.templated)


def embedded_pairs(seed: int) -> Iterator[ResponsePair]:
    """Pairs made of passages of the embedded corpus, until a topic has none left; see `EMBEDDED_NOTE`."""
    random = np.random.default_rng(seed)
    prompts, chosen, rejected = (
        _passages(topic, words, random)
        for topic, words in (
            (PROMPT_TOPIC, PROMPT_WORDS),
            (CHOSEN_TOPIC, CHOSEN_WORDS),
            (REJECTED_TOPIC, REJECTED_WORDS),
        )
    )
    for prompt, right, wrong in zip(prompts, chosen, rejected, strict=False):
        opening = f"{HUMAN} {prompt}{ASSISTANT} "
        yield ResponsePair(opening + right, opening + wrong)


def _passages(topic: str, words: tuple[int, int], random: np.random.Generator) -> Iterator[str]:
    """Stretches of so many words of the topic's texts, in a random order, each once."""
    texts = [text.text.split() for text in labelled_texts(EMBEDDED) if text.label == topic]
    if not texts:
        raise TsaeError(f"--dataset {EMBEDDED}: this machine has no documentation on {topic}; name another dataset")
    pieces = []
    for text in texts:
        at = 0
        while at + words[1] <= len(text):
            length = int(random.integers(words[0], words[1] + 1))
            pieces.append(" ".join(text[at : at + length]))
            at += length
    yield from (pieces[index] for index in random.permutation(len(pieces)))


def as_texts(pairs: Pairs) -> list[LabelledText]:
    """All dialogues, the chosen ones first; both sides of a pair are of one group."""
    sides = (("chosen", pairs.chosen), ("rejected", pairs.rejected))
    return [
        LabelledText(side.text, label, group, side.templated)
        for label, part in sides
        for group, side in enumerate(part)
    ]
