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
    options = {"clean_up_tokenization_spaces": False}
    before = tokenizer.decode(anchor, **options)
    after = tokenizer.batch_decode([[*anchor, token] for token in wanted], **options)
    alone = tokenizer.batch_decode([[token] for token in wanted], **options)
    return {
        token: joined.removeprefix(before) if joined.startswith(before) else single
        for token, joined, single in zip(wanted, after, alone, strict=True)
    }
