"""Documents: a text and perhaps a label, from wherever `data.source` points."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple

from tsae.config import DataConfig
from tsae.data import embedded
from tsae.errors import TsaeError

EMBEDDED = "embedded"


class Document(NamedTuple):
    """One text and, where the source has labels, its label."""

    text: str
    label: str | None


def read_documents(data: DataConfig) -> Iterator[Document]:
    """The documents of `data.source` in a fixed order, at most `data.max_documents`. Raises TsaeError."""
    if data.source != EMBEDDED:
        raise TsaeError(f"data.source: {data.source!r} cannot be read yet")
    documents = (Document(text, topic) for topic, text in embedded.read_corpus())
    return islice(documents, data.max_documents)


def fingerprint(data: DataConfig) -> str:
    """What the content of the source depends on beside the settings; reads no text. Empty except for `embedded`."""
    return embedded.corpus_fingerprint() if data.source == EMBEDDED else ""
