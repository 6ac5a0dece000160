"""Token ids of documents, kept in one flat array."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from tsae.data.records import Document
from tsae.runtime.progress import Progress

BATCH_CHARACTERS = 1_000_000


class TokenizedDocuments(NamedTuple):
    """The ids of all documents in reading order, without special tokens."""

    tokens: np.ndarray
    """[tokens] int32."""
    ends: np.ndarray
    """[documents] int64: where each document ends in `tokens`."""
    label: np.ndarray
    """[documents] int32: index into `label_names`, -1 for none."""
    label_names: tuple[str, ...]

    @property
    def sizes(self) -> np.ndarray:
        """[documents] int64: tokens per document."""
        return np.diff(self.ends, prepend=0)

    def of(self, index: int) -> np.ndarray:
        """The token ids of one document."""
        return self.tokens[self.ends[index - 1] if index else 0 : self.ends[index]]


def starts_with_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer by itself puts BOS before a text."""
    ids = tokenizer("x")["input_ids"]
    return tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id]


def tokenize(
    documents: Iterable[Document],
    tokenizer: Any,
    enough: int | None = None,
    counted: Callable[[np.ndarray], np.ndarray] = lambda sizes: sizes,
) -> TokenizedDocuments:
    """The ids of `documents`, read in batches until `enough` tokens count; labels are numbered in sorted order.

    `counted` says how many tokens of documents of given sizes will be of use: [documents] to [documents].
    A text that spells a special token is split like any other text.
    """
    progress = Progress("tokenize", enough, "tokens")
    ids: list[np.ndarray] = []
    labels: list[str | None] = []
    total = 0
    for batch in _batches(documents):
        encoded = tokenizer(
            [encodable(document.text) for document in batch],
            add_special_tokens=False,
            split_special_tokens=True,
            return_attention_mask=False,
            verbose=False,
        )
        ids += [np.asarray(sequence, np.int32) for sequence in encoded["input_ids"]]
        labels += [document.label for document in batch]
        total += int(counted(np.array([len(sequence) for sequence in encoded["input_ids"]])).sum())
        progress.update(total, documents=len(ids))
        if enough is not None and total >= enough:
            break
    names = tuple(sorted({label for label in labels if label is not None}))
    number = {name: index for index, name in enumerate(names)}
    return TokenizedDocuments(
        tokens=np.concatenate(ids) if ids else np.zeros(0, np.int32),
        ends=np.cumsum([len(sequence) for sequence in ids], dtype=np.int64),
        label=np.array([-1 if label is None else number[label] for label in labels], np.int32),
        label_names=names,
    )


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def encodable(text: str) -> str:
    """`text` with lone surrogates, which scraped JSON holds and no tokenizer takes, replaced by U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
