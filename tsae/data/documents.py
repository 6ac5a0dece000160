"""The documents of a run, from wherever `data.source` points."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from tsae.config import schema
from tsae.config.sections import DataConfig
from tsae.data import embedded, hub, local
from tsae.data.records import Document
from tsae.runtime.errors import TsaeError
from tsae.runtime.preemption import polled

__all__ = ["Document", "fingerprint", "may_stop_early", "read_documents"]

EMBEDDED = "embedded"


def read_documents(data: DataConfig) -> Iterator[Document]:
    """The documents of `data.source` in a fixed order, at most `data.max_documents`. Raises TsaeError."""
    if data.source == EMBEDDED:
        documents: Iterator[Document] = iter(_mixed([Document(text, topic) for topic, text in embedded.read_corpus()]))
    elif _is_local(data.source):
        documents = local.read_local(data)
    else:
        documents = hub.read_hub(data)
    empty = True
    for document in islice(polled(documents), data.max_documents):
        empty = False
        yield document
    if empty:
        raise TsaeError(
            f"data.source: {data.source}: no text in it; the column '{data.text_field}' is empty throughout"
        )


def _mixed(documents: list[Document]) -> list[Document]:
    """The topics mixed in an order that follows from the texts, so that the first documents are a fair sample."""
    return sorted(documents, key=lambda document: hashlib.sha256(document.text.encode()).digest())


def may_stop_early(data: DataConfig) -> bool:
    """Whether the first documents stand for all, so that reading ends once there is enough.

    So it is for the embedded corpus and has to be for a hub dataset, which may be endless; local files are often
    sorted, and are read wholly.
    """
    return data.source == EMBEDDED or not _is_local(data.source)


def fingerprint(data: DataConfig) -> str:
    """What the content depends on beside the settings, without reading any text.

    The versions behind the embedded corpus; names and sizes of local files; empty for the hub, whose `revision` is a
    setting.
    """
    if data.source == EMBEDDED:
        return embedded.corpus_fingerprint()
    root = Path(data.source).expanduser()
    if _is_local(data.source) or root.is_dir():
        files = local.list_files(data.source) if _is_local(data.source) else sorted(root.rglob("*.*"))
        return schema.stable_hash([[path.name, path.stat().st_size] for path in files])
    return ""


def _is_local(source: str) -> bool:
    """A path rather than a hub id; a folder with a dataset card is a copy of a hub dataset and is read as one."""
    path = Path(source).expanduser()
    if path.is_dir():
        return not _has_dataset_card(path)
    return path.exists() or local.kind_of(path) is not None or not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", source)


def _has_dataset_card(folder: Path) -> bool:
    """Whether README.md begins with the block of metadata that the hub reads."""
    card = folder / "README.md"
    return card.is_file() and card.read_bytes().startswith(b"---\n")
