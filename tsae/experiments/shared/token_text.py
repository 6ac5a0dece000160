"""What single tokens look like in a text, with the space that belongs to them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def token_texts(tokenizer: PreTrainedTokenizerFast, ids: Iterable[int]) -> dict[int, str]:
    """Token → its text inside a sentence; a part of a character is shown as �.

    A token is decoded after another one, since decoders drop the space at the beginning of a text.
    """
    wanted = sorted(set(map(int, ids)))
    anchor = tokenizer("a", add_special_tokens=False)["input_ids"][-1:]

    def decoded(tokens: list[int]) -> str:
        return str(tokenizer.decode(tokens, clean_up_tokenization_spaces=False))

    before = decoded(anchor)
    texts = {}
    for token in wanted:
        after = decoded([*anchor, token])
        texts[token] = after.removeprefix(before) if after.startswith(before) else decoded([token])
    return texts
