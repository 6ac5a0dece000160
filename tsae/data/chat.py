"""Dialogues as lists of messages, written as text by the tokenizer's chat template.

A message is an object with `role` and `content`, as in TRL and the hub's chat datasets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any

from tsae.runtime.errors import TsaeError

MESSAGES = "messages"
"""The column that chat datasets keep a dialogue in."""


def is_dialogue(value: Any) -> bool:
    """Whether a cell holds messages rather than text."""
    return isinstance(value, list) and bool(value) and all(isinstance(entry, Mapping) for entry in value)


def render(dialogue: Sequence[Any], tokenizer: Any, where: str, *, answer_follows: bool = False) -> str:
    """A dialogue as the template of `tokenizer` writes it, but for a BOS before it, which contexts have by themselves.

    With `answer_follows` up to where the assistant's next message begins. Raises TsaeError, naming `where`, for a
    tokenizer without a template, for what is no message, and for what the template refuses.
    """
    if tokenizer is None:
        raise TsaeError(
            f"{where}: holds chat messages, which no language model's template can write here; text is expected"
        )
    if getattr(tokenizer, "chat_template", None) is None:
        raise TsaeError(
            f"{where}: holds chat messages, and the language model's tokenizer has no chat template to write them by; "
            "take a model that has one, or a column of text"
        )
    messages = messages_of(dialogue, where)
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer_follows)
    except Exception as error:  # a template is a program, and ends in any way it likes
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise TsaeError(f"{where}: the tokenizer's chat template refuses this dialogue: {reason}") from error
    return str(text).removeprefix(tokenizer.bos_token or "")


def messages_of(dialogue: Sequence[Any], where: str) -> list[dict[str, Any]]:
    """The messages of a dialogue, of one form wherever they were read. Raises TsaeError for what is no message."""
    return [_message(entry, f"{where}: message {number}") for number, entry in enumerate(dialogue, 1)]


def shared_length(*sequences: Sequence[Any]) -> int:
    """How many of their first elements all of several texts, or dialogues, have in common."""
    return sum(1 for _ in takewhile(lambda first: all(one == first[0] for one in first), zip(*sequences, strict=False)))


def _message(entry: Any, where: str) -> dict[str, Any]:
    """Without what is null, as columnar files have it where other rows have something; text in parts becomes one."""
    message = {key: value for key, value in entry.items() if value is not None} if isinstance(entry, Mapping) else {}
    content = message.get("content", "" if "tool_calls" in message else None)
    if isinstance(content, list) and all(isinstance(part, Mapping) and "text" in part for part in content):
        content = "".join(str(part["text"]) for part in content)
    if not isinstance(message.get("role"), str) or not isinstance(content, str):
        raise TsaeError(
            f"{where}: a message with role and content, both text, is expected, found the keys: "
            f"{', '.join(map(str, message)) or 'none'}"
        )
    return {**message, "content": content}
