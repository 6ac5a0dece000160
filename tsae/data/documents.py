"""The documents of a run, from wherever `data.source` points: the embedded corpus, a hub dataset, or local files."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from tsae.config import schema
from tsae.config.sections import DataConfig
from tsae.data import chat, embedded, hub, local
from tsae.runtime import contents
from tsae.runtime.errors import BrokenOff, TsaeError, suggestion
from tsae.runtime.preemption import polled

log = logging.getLogger("tsae")

EMBEDDED = "embedded"


class Document(NamedTuple):
    """One text and, where the source has labels, its label."""

    text: str
    label: str | None
    templated: bool = False
    """Whether a chat template wrote the text: what spells a special token in it is one."""


def read_documents(data: DataConfig, tokenizer: Any = None) -> Iterator[Document]:
    """The documents of `data.source` in a fixed order, at most `data.max_documents`. Raises TsaeError.

    A column of chat messages is written as text by the chat template of `tokenizer`.
    """
    if data.source == EMBEDDED:
        corpus = [Document(text, topic) for topic, text in embedded.read_corpus()]
        # Topics mixed in an order that follows from the texts, so that the first documents are a fair sample.
        documents = iter(sorted(corpus, key=lambda document: hashlib.sha256(document.text.encode()).digest()))
    elif _is_local(data.source):
        documents = _read_local(data, tokenizer)
    else:
        documents = _read_hub(data, tokenizer)
    empty = True
    for document in islice(polled(documents), data.max_documents):
        empty = False
        yield document
    if empty:
        raise TsaeError(
            f"data.source: {data.source}: no text in it; the column '{data.text_field}' is empty throughout"
        )


def may_stop_early(data: DataConfig) -> bool:
    """Whether the first documents stand for all, so that reading ends once there is enough.

    So it is for the embedded corpus and has to be for a hub dataset, which may be endless; local files are often
    sorted, and are read wholly.
    """
    return data.source == EMBEDDED or not _is_local(data.source)


def fingerprint(data: DataConfig) -> str:
    """What the text is, beside the settings: the versions behind the embedded corpus, the content of local files.

    Empty for the hub, whose `revision` is a setting. Raises TsaeError for a path that is not there.
    """
    if data.source == EMBEDDED:
        return embedded.corpus_fingerprint()
    files = source_files(data)
    return contents.sha256_of_all(files, _root(data)) if files else ""


def fingerprint_before(data: DataConfig) -> str:
    """What told local files apart before their content did, and names older stores: names and sizes."""
    if data.source == EMBEDDED:
        return embedded.corpus_fingerprint()
    files = source_files(data)
    return schema.stable_hash([[path.name, path.stat().st_size] for path in files]) if files else ""


def source_files(data: DataConfig) -> list[Path]:
    """The local files that are read of `data.source`; none for the embedded corpus and the hub."""
    if data.source == EMBEDDED:
        return []
    if _is_local(data.source):
        return local.files_of(data.source, data.split)
    return sorted(path for path in _root(data).rglob("*.*") if path.is_file()) if _root(data).is_dir() else []


def _root(data: DataConfig) -> Path:
    root = Path(data.source).expanduser()
    return root if root.is_dir() else root.parent


def _is_local(source: str) -> bool:
    """A path rather than a hub id; a folder with a dataset card is a copy of a hub dataset and is read as one."""
    path = Path(source).expanduser()
    if path.is_dir():
        return not local.has_card(path)
    return path.exists() or local.kind_of(path) is not None or not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", source)


def _read_hub(data: DataConfig, tokenizer: Any) -> Iterator[Document]:
    """The documents of one split of a dataset, streamed in its order. Raises TsaeError.

    `data.source` is a hub id or a local folder in the hub's format. With HF_HUB_OFFLINE=1 the snapshot in the local
    hub cache is read.
    """
    dataset = hub.open_dataset(data.source, data.split, subset=data.subset, revision=data.revision)
    features = getattr(dataset, "features", None) or {}
    names = getattr(features.get(data.label_field), "names", None)
    rows = ((data.source, _with_label_name(row, data.label_field, names)) for row in dataset)
    try:
        yield from documents_of(rows, data, tokenizer)
    except TsaeError:
        raise
    except Exception as error:  # the network, a decoder or a builder: `datasets` has no common class for them
        raise BrokenOff(f"data.source: {data.source}: reading stopped: {hub.reason_of(error)}") from error


def _with_label_name(row: Any, field: str | None, names: list[str] | None) -> Any:
    """A ClassLabel column holds indices; its name is the label."""
    if names is None or field is None or not isinstance(row.get(field), int) or row[field] < 0:
        return row
    return {**row, field: names[row[field]]}


def _read_local(data: DataConfig, tokenizer: Any) -> Iterator[Document]:
    """The documents of a local file or folder, in the order of the file names. Raises TsaeError."""
    found = local.splits(data.source)
    if len(found) > 1:
        log.info("data.source: %s: has splits: %s; data.split: %s is read", data.source, ", ".join(found), data.split)
    columns = [name for name in (data.text_field, data.label_field) if name is not None]
    for path in local.files_of(data.source, data.split):
        if local.kind_of(path) not in local.TEXTS:
            yield from documents_of(local.rows(path, columns), data, tokenizer)
        elif data.label_field is not None:
            raise TsaeError(f"{path}: data.label_field: plain text has no column '{data.label_field}'")
        else:
            yield from (Document(text, None) for text in local.texts(path))


def documents_of(rows: Iterable[tuple[str, Any]], data: DataConfig, tokenizer: Any = None) -> Iterator[Document]:
    """Documents of (where, row) pairs; rows whose text is missing or blank are passed over. Raises TsaeError.

    `where` (a file and a line, or a dataset) goes into errors. A dotted column such as `meta.set` reads inside a
    nested one. Where nobody named a column and there is no `text`, the dialogues of a column `messages` are taken.
    """
    for where, row in rows:
        if not isinstance(row, Mapping):
            raise TsaeError(f"{where}: an object with the key '{data.text_field}' is expected, found {row!r:.40}")
        unnamed = data.text_field == DataConfig.text_field and data.text_field not in row
        column = chat.MESSAGES if unnamed and chat.MESSAGES in row else data.text_field
        text = _field(row, column, where, "data.text_field")
        templated = chat.is_dialogue(text)
        if templated:
            text = chat.render(text, tokenizer, where)
        if text is not None and text != [] and not isinstance(text, str):
            raise TsaeError(
                f"{where}: data.text_field: column '{column}' holds {type(text).__name__}, not text; "
                f"columns found: {', '.join(map(str, row))}"
            )
        if not text or not text.strip():
            continue
        label = None if data.label_field is None else _field(row, data.label_field, where, "data.label_field")
        yield Document(text, None if label is None else str(label), templated)


def missing_column(where: str, setting: str, name: str, found: Iterable[object]) -> TsaeError:
    """The error for a column that is not there; it names those that are."""
    columns = [str(column) for column in found]
    return TsaeError(
        f"{where}: {setting}: no column '{name}'; {suggestion(name, columns)}columns found: {', '.join(columns)}"
    )


def _field(row: Mapping[str, Any], name: str, where: str, setting: str) -> Any:
    if name in row:
        return row[name]
    value: Any = row
    for part in name.split("."):
        if not isinstance(value, Mapping) or part not in value:
            raise missing_column(where, setting, name, row)
        value = value[part]
    return value
