"""Documents to contexts: tokenised, cut into rows of one fixed length, shuffled, with whole documents held out."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from tsae.config.sections import DataConfig
from tsae.data.documents import Document, may_stop_early
from tsae.runtime.errors import TsaeError
from tsae.runtime.progress import Progress

ROWS_AT_ONCE = 65_536
BATCH_CHARACTERS = 1_000_000  # of text, given to the tokenizer at a time

HELD_OUT_BY = "text"
"""What decides whether a document is held out: its text, and not its number as up to version 3195aa1. Kept in a store's
sources, and so in its identity."""


class Contexts(NamedTuple):
    """What the language model reads, one context per row, and where each token comes from.

    The first S - heldout rows and the last `heldout` rows come from different texts: documents that differ in blanks
    alone are on one side. Each part is in a random order that follows from `data.seed`.
    """

    tokens: np.ndarray
    """[S, L] int32, padded on the right."""
    lengths: np.ndarray
    """[S] int32: tokens of the row that are not padding, BOS included."""
    document: np.ndarray
    """[S, L] int32: index of the document that a token belongs to; -1 for padding, BOS and the EOS between documents."""
    label: np.ndarray
    """[documents] int32: index into `label_names`; -1 for none."""
    label_names: tuple[str, ...]
    heldout: int
    """How many of the last rows are held out."""
    fingerprint: str
    """sha256 of tokens and lengths."""


class TokenizedDocuments(NamedTuple):
    """The ids of all documents in reading order, without special tokens."""

    tokens: np.ndarray
    """[tokens] int32."""
    ends: np.ndarray
    """[documents] int64: where each document ends in `tokens`."""
    label: np.ndarray
    """[documents] int32: index into `label_names`, -1 for none."""
    label_names: tuple[str, ...]
    text: np.ndarray
    """[documents] uint64: hash of each text, blanks apart."""

    @property
    def sizes(self) -> np.ndarray:
        """[documents] int64: tokens per document."""
        return np.diff(self.ends, prepend=0)

    def of(self, index: int) -> np.ndarray:
        """The token ids of one document."""
        return self.tokens[self.ends[index - 1] if index else 0 : self.ends[index]]


class _Pieces(NamedTuple):
    """Stretches of the token stream that become one row each."""

    start: np.ndarray  # [S] int64
    size: np.ndarray  # [S] int64

    def pick(self, index: np.ndarray) -> _Pieces:
        return _Pieces(self.start[index], self.size[index])


def make_contexts(documents: Iterable[Document], tokenizer: Any, data: DataConfig) -> Contexts:
    """Tokenise `documents` and cut them into contexts by `data.packing`.

    The embedded corpus and hub datasets are read until they give `data.max_tokens`; local files are read wholly, so
    that the limit takes a random sample of them. Raises TsaeError if no context is left or no document can be held out.
    """
    bos = _bos_token(tokenizer, data)
    ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    pad = next(int(token) for token in ids if token is not None)
    room = data.context_length - len(bos)  # tokens of text per row
    enough = data.max_tokens if may_stop_early(data) else None
    tokenized = tokenize(documents, tokenizer, enough, lambda sizes: _kept(sizes, room, len(bos), data))
    random = np.random.default_rng(data.seed)
    limit = float("inf") if data.max_tokens is None else float(data.max_tokens)
    budgets = (limit * (1 - data.holdout), limit * data.holdout)
    parts = []
    for part, budget in zip(_split_documents(tokenized, room, len(bos), data, random), budgets, strict=True):
        stream, pieces = _cut(tokenized, part, room, len(bos), tokenizer, data)
        pieces = pieces.pick(random.permutation(len(pieces.start)))
        # The row that crosses the budget is the last.
        within = int(np.searchsorted(np.cumsum(pieces.size + len(bos)), budget)) + 1
        pieces = _Pieces(pieces.start[:within], pieces.size[:within])
        parts.append(_fill(stream, pieces, bos, pad, data.context_length))
    for name, part_rows in zip(("training", "held-out"), parts, strict=True):
        if not len(part_rows[0]):
            raise TsaeError(
                f"data.min_length: no {name} context of {data.min_length} tokens is left; {_size(tokenized)}"
            )
    tokens, document, lengths = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return Contexts(
        tokens=tokens,
        lengths=lengths,
        document=document,
        label=tokenized.label,
        label_names=tokenized.label_names,
        heldout=len(parts[1][0]),
        fingerprint=hashlib.sha256(tokens.tobytes() + lengths.tobytes()).hexdigest(),
    )


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
    texts: list[int] = []
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
        texts += [_hash_of(" ".join(encodable(document.text).split()).encode()) for document in batch]
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
        text=np.array(texts, np.uint64),
    )


def _hash_of(content: bytes, seed: int = 0) -> int:
    """64 bits that follow from `content` and the seed alone, on every machine."""
    salt = (seed % 2**64).to_bytes(8, "little")
    return int.from_bytes(hashlib.blake2b(content, digest_size=8, salt=salt).digest(), "little")


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


def _bos_token(tokenizer: Any, data: DataConfig) -> list[int]:
    """What each row begins with: the BOS id, or nothing."""
    wanted = data.bos == "always" or (data.bos == "auto" and starts_with_bos(tokenizer))
    if wanted and tokenizer.bos_token_id is None:
        raise TsaeError("data.bos: the tokenizer has no BOS token; auto or never are possible")
    return [tokenizer.bos_token_id] if wanted else []


def _kept(sizes: np.ndarray, room: int, extra: int, data: DataConfig) -> np.ndarray:
    """How many tokens of documents of these sizes [documents] end up in a context."""
    if data.packing == "concat":
        return sizes
    whole = np.minimum(sizes // room, 1 if data.packing == "truncate" else sizes) * room
    rest = np.where((data.packing == "truncate") & (whole > 0), 0, sizes % room)
    return whole + np.where(rest + extra >= data.min_length, rest, 0)


def _split_documents(
    tokenized: TokenizedDocuments, room: int, extra: int, data: DataConfig, random: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the documents to train on and of those held out: a share of the different texts that give a context.

    Which texts these are follows from their hashes and `data.seed`, so that copies of a text are on one side.
    """
    usable = np.flatnonzero(_kept(tokenized.sizes, room, extra, data))
    texts = np.unique(tokenized.text[usable])
    if len(texts) < 2:
        raise TsaeError(
            f"data.holdout: at least 2 different documents must give a context of {data.min_length} tokens or more, one "
            f"to train on and one to hold out; {len(texts)} do: {_size(tokenized)}"
        )
    share = min(max(round(len(texts) * data.holdout), 1), len(texts) - 1)
    heldout = sorted(texts, key=lambda text: _hash_of(text.tobytes(), data.seed))[:share]
    order = random.permutation(usable)
    chosen = np.isin(tokenized.text[order], heldout)
    return order[~chosen], order[chosen]


def _size(tokenized: TokenizedDocuments) -> str:
    return (
        f"{len(tokenized.sizes)} documents were read, {int(tokenized.sizes.sum())} tokens, "
        f"the longest has {int(tokenized.sizes.max(initial=0))}"
    )


class _Stream(NamedTuple):
    tokens: np.ndarray  # [tokens] int32
    document: np.ndarray  # [tokens] int32


def _cut(
    tokenized: TokenizedDocuments, part: np.ndarray, room: int, extra: int, tokenizer: Any, data: DataConfig
) -> tuple[_Stream, _Pieces]:
    """The documents of one part in a row, and where its contexts begin."""
    if data.packing == "concat":
        if tokenizer.eos_token_id is None:
            raise TsaeError("data.packing: concat puts EOS between documents, and the tokenizer has none; use split")
        stream = _joined(tokenized, part, tokenizer.eos_token_id)
        start = np.arange(0, len(stream.tokens), room)
        size = np.minimum(room, len(stream.tokens) - start)
    else:
        stream = _joined(tokenized, part, None)
        sizes = tokenized.sizes[part]
        rows = np.minimum(1, sizes) if data.packing == "truncate" else -(-sizes // room)
        first = np.repeat(np.cumsum(sizes) - sizes, rows)  # where the document of a row begins
        offset = room * (np.arange(rows.sum()) - np.repeat(np.cumsum(rows) - rows, rows))
        start, size = first + offset, np.minimum(room, np.repeat(sizes, rows) - offset)
    pieces = _Pieces(start, size)
    return stream, pieces.pick(np.flatnonzero(size + extra >= data.min_length))


def _joined(tokenized: TokenizedDocuments, part: np.ndarray, separator: int | None) -> _Stream:
    """The documents of `part` one after another, each followed by `separator` if there is one."""
    end = 0 if separator is None else 1
    sizes = tokenized.sizes[part] + end
    tokens = np.full(sizes.sum(), separator or 0, np.int32)
    document = np.full(sizes.sum(), -1, np.int32)
    for index, stop, size in zip(part, np.cumsum(sizes), sizes, strict=True):
        tokens[stop - size : stop - end] = tokenized.of(index)
        document[stop - size : stop - end] = index
    return _Stream(tokens, document)


def _fill(
    stream: _Stream, pieces: _Pieces, bos: list[int], pad: int, length: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows of `length`: BOS, the piece, padding. Returns tokens [S, L], document [S, L], lengths [S]."""
    rows, extra = len(pieces.start), len(bos)
    tokens = np.full((rows, length), pad, np.int32)
    document = np.full((rows, length), -1, np.int32)
    tokens[:, :extra] = bos
    for top in range(0, rows, ROWS_AT_ONCE):
        start, size = (values[top : top + ROWS_AT_ONCE, None] for values in pieces)
        within = np.arange(length - extra)
        real = within < size
        source = (start + within)[real]
        tokens[top : top + ROWS_AT_ONCE, extra:][real] = stream.tokens[source]
        document[top : top + ROWS_AT_ONCE, extra:][real] = stream.document[source]
    return tokens, document, (pieces.size + extra).astype(np.int32)
