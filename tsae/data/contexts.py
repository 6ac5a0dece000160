"""Documents to contexts: tokenised, cut into rows of one fixed length, shuffled, with whole documents held out."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tsae.config.sections import DataConfig
from tsae.data.documents import Document, may_stop_early
from tsae.data.tokenized import TokenizedDocuments, hash_of, tokenize
from tsae.runtime.errors import TsaeError
from tsae.runtime.preemption import polled
from tsae.runtime.progress import Progress
from tsae.runtime.rows import Rows, RowsOnDisk, parts

HELD_OUT_BY = "text"
"""What decides whether a document is held out: its text, and not its number as up to version 3195aa1. Kept in a store's
sources, and so in its identity."""


class Contexts(NamedTuple):
    """What the language model reads, one context per row, and where each token comes from.

    The first S - heldout rows and the last `heldout` rows come from different texts: documents that differ in blanks
    alone are on one side. Each part is in a random order that follows from `data.seed`.
    """

    tokens: Rows
    """[S, L] int32, padded on the right."""
    lengths: np.ndarray
    """[S] int32: tokens of the row that are not padding, BOS included."""
    document: Rows
    """[S, L] int32: index of the document that a token belongs to; -1 for padding, BOS and the EOS between documents."""
    label: np.ndarray
    """[documents] int32: index into `label_names`; -1 for none."""
    label_names: tuple[str, ...]
    heldout: int
    """How many of the last rows are held out."""
    fingerprint: str
    """sha256 of tokens and lengths."""


def make_contexts(documents: Iterable[Document], tokenizer: Any, data: DataConfig, folder: Path) -> Contexts:
    """Tokenise `documents` and cut them into contexts by `data.packing`.

    The embedded corpus and hub datasets are read until they give `data.max_tokens`; local files are read wholly, so
    that the limit takes a random sample of them. The ids are kept in `folder`, and tokens and documents of the contexts
    are made of them whenever they are asked for: in memory there are some 20 bytes for each document and for each
    context. Raises TsaeError if no context is left or no document can be held out.
    """
    bos = _bos_token(tokenizer, data)
    if data.packing == "concat" and tokenizer.eos_token_id is None:
        raise TsaeError("data.packing: concat puts EOS between documents, and the tokenizer has none; use split")
    ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    pad = next(int(token) for token in ids if token is not None)
    room = data.context_length - len(bos)  # tokens of text per row
    enough = data.max_tokens if may_stop_early(data) else None
    tokenized = tokenize(documents, tokenizer, folder, enough, lambda sizes: _kept(sizes, room, len(bos), data))
    separator = tokenizer.eos_token_id if data.packing == "concat" else None
    random = np.random.default_rng(data.seed)
    sides = _split_documents(tokenized, room, len(bos), data, random)
    text = _Text.of(tokenized, np.concatenate(sides), separator)
    limit = float("inf") if data.max_tokens is None else float(data.max_tokens)
    budgets = (limit * (1 - data.holdout), limit * data.holdout)
    cuts, begin = [], 0
    for name, side, budget in zip(("training", "held-out"), sides, budgets, strict=True):
        start, size = _cut(text.ends[begin : begin + len(side)], begin and int(text.ends[begin - 1]), room, data)
        kept = np.flatnonzero(size + len(bos) >= data.min_length)
        if not len(kept):
            raise TsaeError(f"data.min_length: no {name} context of {data.min_length} tokens is left; {tokenized.told}")
        kept = kept[random.permutation(len(kept))]
        # The row that crosses the budget is the last.
        within = int(np.searchsorted(np.cumsum(size[kept] + len(bos)), budget)) + 1
        cuts.append((start[kept[:within]], size[kept[:within]]))
        begin += len(side)
    start, size = (np.concatenate(both) for both in zip(*cuts, strict=True))
    lengths = (size + len(bos)).astype(np.int32)
    tokens, document = (
        _Cells(text, start, size, data.context_length, bos, pad, of_documents) for of_documents in (False, True)
    )
    return Contexts(
        tokens=tokens,
        lengths=lengths,
        document=document,
        label=tokenized.label,
        label_names=tokenized.label_names,
        heldout=len(cuts[1][0]),
        fingerprint=_fingerprint(tokens, lengths),
    )


def starts_with_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer by itself puts BOS before a text."""
    ids = tokenizer("x")["input_ids"]
    return tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id]


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
            f"to train on and one to hold out; {len(texts)} do: {tokenized.told}"
        )
    share = min(max(round(len(texts) * data.holdout), 1), len(texts) - 1)
    drawn = np.fromiter((hash_of(text.tobytes(), data.seed) for text in texts), np.uint64, len(texts))
    heldout = texts[np.argsort(drawn, kind="stable")[:share]]
    order = random.permutation(usable)
    chosen = np.isin(tokenized.text[order], heldout)
    return order[~chosen], order[chosen]


class _Text(NamedTuple):
    """Documents one after another as contexts are cut from them, each followed by a separator if there is one."""

    tokens: RowsOnDisk
    order: np.ndarray  # [documents] int64: which document stands where
    ends: np.ndarray  # [documents] int64: the place after the last one of each, its separator included
    source: np.ndarray  # [documents] int64: where in `tokens` each begins
    separator: int | None

    @classmethod
    def of(cls, tokenized: TokenizedDocuments, order: np.ndarray, separator: int | None) -> _Text:
        sizes = tokenized.sizes
        ends = np.cumsum(sizes[order] + (separator is not None))
        return cls(tokenized.tokens, order, ends, (np.cumsum(sizes) - sizes)[order], separator)


def _cut(ends: np.ndarray, begin: int, room: int, data: DataConfig) -> tuple[np.ndarray, np.ndarray]:
    """Where in a text the contexts of some of its documents begin [S] int64, and their tokens [S] int32.

    The documents end at `ends`, the first of them begins at `begin`.
    """
    if data.packing == "concat":
        start = np.arange(begin, int(ends[-1]) if len(ends) else begin, room)
        return start, np.minimum(room, int(ends[-1]) - start).astype(np.int32)
    sizes = np.diff(ends, prepend=begin)
    rows = np.minimum(1, sizes) if data.packing == "truncate" else -(-sizes // room)
    # Row n of a document begins n times `room` after it.
    start = np.arange(int(rows.sum())) - np.repeat(np.cumsum(rows) - rows, rows)
    start *= room
    size = np.minimum(room, np.repeat(sizes, rows) - start).astype(np.int32)
    start += np.repeat(ends - sizes, rows)
    return start, size


class _Cells:
    """The tokens [S, L] int32 of contexts, or the documents they are of, made of the text when they are asked for."""

    def __init__(
        self,
        text: _Text,
        start: np.ndarray,
        size: np.ndarray,
        length: int,
        bos: list[int],
        pad: int,
        of_documents: bool,
    ) -> None:
        self.shape, self.dtype = (len(start), length), np.dtype(np.int32)
        self._text, self._start, self._size = text, start, size
        self._bos, self._pad, self._of_documents = bos, pad, of_documents

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: slice | np.ndarray) -> np.ndarray:
        """Rows of BOS, text and padding."""
        start, size = self._start[index], self._size[index].astype(np.int64)
        ends, separator = self._text.ends, self._text.separator
        # A row is of one document or, where they are strung together, of several in turn: a run for each.
        first, last = (np.searchsorted(ends, place, side="right") for place in (start, start + size - 1))
        runs = last - first + 1
        row = np.repeat(np.arange(len(start)), runs)
        place = np.arange(len(row)) - np.repeat(np.cumsum(runs) - runs - first, runs)
        begin = np.where(place > 0, ends[place - 1], 0)
        low, high = np.maximum(start[row], begin), np.minimum((start + size)[row], ends[place])
        ended = (high == ends[place]) & (separator is not None)
        is_text = np.ones(int(size.sum()), bool)
        is_text[(np.cumsum(high - low) - 1)[ended]] = False
        if self._of_documents:
            found = np.where(is_text, np.repeat(self._text.order[place], high - low), -1)
        else:
            found = np.full(len(is_text), separator or 0, np.int32)
            found[is_text] = self._text.tokens.runs(self._text.source[place] + low - begin, high - low - ended)
        cells = np.full((len(start), self.shape[1]), -1 if self._of_documents else self._pad, np.int32)
        room = cells[:, len(self._bos) :]
        room[np.arange(room.shape[1]) < size[:, None]] = found
        if not self._of_documents:
            cells[:, : len(self._bos)] = self._bos
        return cells


def _fingerprint(tokens: Rows, lengths: np.ndarray) -> str:
    """sha256 of tokens and lengths."""
    hasher, progress = hashlib.sha256(), Progress("cut into contexts", len(tokens), "contexts")
    for part in polled(parts(*tokens.shape)):
        hasher.update(tokens[part].data)
        progress.update(part.stop)
    hasher.update(lengths.data)
    return hasher.hexdigest()
