"""Documents to token ids, in files: they need not fit into memory, and a killed process goes on where it was.

<folder>/
    tokens          the ids of all documents in reading order, int32, without special tokens
    documents       for each document its size, label and hash
    done.json       how far both are whole
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import google_crc32c
import numpy as np

from tsae.data.documents import Document
from tsae.runtime import files, metadata
from tsae.runtime.checksums import checksum_of
from tsae.runtime.errors import TsaeError
from tsae.runtime.metadata import NATURAL
from tsae.runtime.progress import Progress
from tsae.runtime.rows import RowsOnDisk

BATCH_CHARACTERS = 1_000_000  # of text, given to the tokenizer at a time
SAVED_EVERY = 2**22
"""Tokens after which what there is survives a kill."""
ID = np.dtype("<i4")
ABOUT = np.dtype([("size", "<i8"), ("label", "<i4"), ("text", "<u8")])
DONE = {
    "documents": NATURAL,
    "tokens": NATURAL,
    "counted": NATURAL,
    "labels": [str],
    "whole": bool,
    "crc32c": [NATURAL, 2],
}
REMEDY = "give the same command again"

log = logging.getLogger("tsae")


class TokenizedDocuments(NamedTuple):
    """The ids of all documents in reading order, without special tokens."""

    tokens: RowsOnDisk
    """[tokens] int32."""
    sizes: np.ndarray
    """[documents] int64: tokens per document."""
    label: np.ndarray
    """[documents] int32: index into `label_names`, -1 for none."""
    label_names: tuple[str, ...]
    text: np.ndarray
    """[documents] uint64: hash of each text, blanks apart."""

    @property
    def told(self) -> str:
        """In words, how much there is."""
        return (
            f"{len(self.sizes)} documents were read, {int(self.sizes.sum())} tokens, "
            f"the longest has {int(self.sizes.max(initial=0))}"
        )


def tokenize(
    documents: Iterable[Document],
    tokenizer: Any,
    folder: Path,
    enough: int | None = None,
    counted: Callable[[np.ndarray], np.ndarray] = lambda sizes: sizes,
) -> TokenizedDocuments:
    """The ids of `documents`, read in batches until `enough` tokens count; labels are numbered in sorted order.

    `counted` says how many tokens of documents of given sizes will be of use: [documents] to [documents].
    A text that spells a special token is split like any other text, unless a chat template wrote it. Of what another
    process left in `folder` the documents are read again, and not tokenised. Raises TsaeError if they are others.
    """
    folder.mkdir(parents=True, exist_ok=True)
    done = _done(folder)
    if not done["whole"]:
        with open(folder / "tokens", "ab") as ids, open(folder / "documents", "ab") as about:
            ids.truncate(done["tokens"] * ID.itemsize)
            about.truncate(done["documents"] * ABOUT.itemsize)
            left = _after(documents, np.fromfile(folder / "documents", ABOUT)["text"])
            for now in _written(left, tokenizer, ids, about, done, enough, counted):
                files.sync_stream(ids)
                files.sync_stream(about)
                metadata.write(folder / "done.json", now)
                done = now
    rows = np.fromfile(folder / "documents", ABOUT)
    order = sorted(range(len(done["labels"])), key=done["labels"].__getitem__)
    sorted_to = np.append(np.argsort(order), -1).astype(np.int32)  # -1, for no label, stays -1
    return TokenizedDocuments(
        tokens=RowsOnDisk((done["tokens"],), "<i4", lambda _: folder / "tokens", max(1, done["tokens"]), remedy=REMEDY),
        sizes=rows["size"].astype(np.int64),
        label=sorted_to[rows["label"]],
        label_names=tuple(sorted(done["labels"])),
        text=rows["text"].astype(np.uint64),
    )


def _done(folder: Path) -> dict[str, Any]:
    """What a process that was killed has left whole."""
    done = metadata.whole(folder / "done.json", DONE)
    lengths = {"tokens": ID.itemsize, "documents": ABOUT.itemsize}
    if done and all((folder / name).is_file() for name in lengths):
        found = [checksum_of(folder / name, size * done[name]) for name, size in lengths.items()]
        if found == done["crc32c"]:
            return done
        log.warning("%s: damaged; the text is tokenised anew", folder)
    return {"documents": 0, "tokens": 0, "counted": 0, "labels": [], "whole": False, "crc32c": [0, 0]}


def _after(documents: Iterable[Document], known: np.ndarray) -> Iterator[Document]:
    """What follows the documents whose hashes are `known`. Raises TsaeError if others stand there."""
    documents, number = iter(documents), -1
    for number, document in enumerate(islice(documents, len(known))):
        if hash_of_text(document.text) != known[number]:
            break
    else:
        if number + 1 == len(known):
            return documents
    raise TsaeError(
        f"data.source: document {number + 1} of {len(known)} is not the one that was read when this text was begun to "
        "be tokenised; give the same command again, which begins anew"
    )


def _written(
    documents: Iterator[Document],
    tokenizer: Any,
    ids: BinaryIO,
    about: BinaryIO,
    done: dict[str, Any],
    enough: int | None,
    counted: Callable[[np.ndarray], np.ndarray],
) -> Iterator[dict[str, Any]]:
    """Write `documents` behind what is `done`; gives what is done then, after every `SAVED_EVERY` tokens and at the end."""
    names = {name: number for number, name in enumerate(done["labels"])}
    read, tokens, total, saved = done["documents"], done["tokens"], done["counted"], done["tokens"]
    sums = done["crc32c"]
    progress = Progress("tokenize", enough, "tokens", start=total)
    for batch in _batches(documents):
        encoded = tokenizer(
            [encodable(document.text) for document in batch],
            add_special_tokens=False,
            split_special_tokens=not batch[0].templated,
            return_attention_mask=False,
            verbose=False,
        )["input_ids"]
        rows = np.zeros(len(batch), ABOUT)
        rows["size"] = [len(sequence) for sequence in encoded]
        rows["text"] = [hash_of_text(document.text) for document in batch]
        labels = [document.label for document in batch]
        rows["label"] = [-1 if label is None else names.setdefault(label, len(names)) for label in labels]
        written = b"".join(np.asarray(sequence, ID).tobytes() for sequence in encoded), rows.tobytes()
        for stream, data in zip((ids, about), written, strict=True):
            stream.write(data)
        sums = [google_crc32c.extend(before, data) for before, data in zip(sums, written, strict=True)]
        read, tokens, total = (
            read + len(batch),
            tokens + int(rows["size"].sum()),
            total + int(counted(rows["size"]).sum()),
        )
        progress.update(total, documents=read)
        whole = enough is not None and total >= enough
        done = {"documents": read, "tokens": tokens, "counted": total, "labels": list(names), "whole": whole}
        done["crc32c"] = sums
        if whole:
            break
        if tokens - saved >= SAVED_EVERY:
            yield done
            saved = tokens
    yield {**done, "whole": True}


def hash_of(content: bytes, seed: int = 0) -> int:
    """64 bits that follow from `content` and the seed alone, on every machine."""
    salt = (seed % 2**64).to_bytes(8, "little")
    return int.from_bytes(hashlib.blake2b(content, digest_size=8, salt=salt).digest(), "little")


def hash_of_text(text: str) -> int:
    """The same of a text, blanks apart."""
    return hash_of(" ".join(encodable(text).split()).encode())


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Documents of about `BATCH_CHARACTERS` together, all of them templated or none."""
    batch: list[Document] = []
    size = 0
    for document in documents:
        if batch and batch[0].templated != document.templated:
            yield batch
            batch, size = [], 0
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
