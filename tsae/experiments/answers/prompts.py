"""What a language model is asked, what comes back, and what every one that answers can do."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol


class Prompt(NamedTuple):
    """One question."""

    system: str
    """What the model is and how it should answer."""
    user: str
    """What it is asked."""
    max_tokens: int
    """Longest answer."""


class Answer(NamedTuple):
    """What came back: a text, or the reason why there is none, or why there is no more of it."""

    text: str | None
    failure: str | None = None


Keep = Callable[[int, Answer], None]
"""Puts the answer to a prompt, given by its index, on disk as soon as it is there: whoever stops then has it."""


class Respondent(Protocol):
    """Whoever answers prompts that have no answer yet."""

    counts_by: str
    """How `tokens` counts, in words."""

    def tokens(self, prompts: Sequence[Prompt]) -> int:
        """Tokens of these prompts together; an estimate where nobody knows the tokenizer."""
        ...

    def ask(self, prompts: Sequence[Prompt], keep: Keep) -> Iterator[tuple[int, Answer]]:
        """Index and answer of each prompt, in any order, after `keep` was told of it, possibly in another thread.

        Raises TsaeError where asking on is pointless.
        """
        ...
