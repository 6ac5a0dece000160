"""The documents of a run, from wherever `data.source` points: the embedded corpus, a hub dataset, or local files.

Local files are jsonl, json, parquet and plain text; the text formats also as .gz and .zst.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from tsae.config import schema
from tsae.config.sections import DataConfig
from tsae.data import embedded, hub
from tsae.runtime import contents
from tsae.runtime.errors import TsaeError, suggestion
from tsae.runtime.preemption import polled

EMBEDDED = "embedded"
JSON_LINES = (".jsonl", ".ndjson", ".json")
TABLES = (*JSON_LINES, ".parquet")
TEXTS = (".txt", ".text", ".md", ".rst")
COMPRESSED = (".gz", ".zst")
MAX_DOCUMENT = 20_000  # characters; a longer text file becomes several documents, cut between paragraphs
PARQUET_ROWS = 256
BOOKKEEPING = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")


class Document(NamedTuple):
    """One text and, where the source has labels, its label."""

    text: str
    label: str | None


def read_documents(data: DataConfig) -> Iterator[Document]:
    """The documents of `data.source` in a fixed order, at most `data.max_documents`. Raises TsaeError."""
    if data.source == EMBEDDED:
        corpus = [Document(text, topic) for topic, text in embedded.read_corpus()]
        # Topics mixed in an order that follows from the texts, so that the first documents are a fair sample.
        documents = iter(sorted(corpus, key=lambda document: hashlib.sha256(document.text.encode()).digest()))
    elif _is_local(data.source):
        documents = _read_local(data)
    else:
        documents = _read_hub(data)
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
    """The local files that `data.source` is made of; none for the embedded corpus and the hub."""
    if data.source == EMBEDDED:
        return []
    if _is_local(data.source):
        return list_files(data.source)
    return sorted(path for path in _root(data).rglob("*.*") if path.is_file()) if _root(data).is_dir() else []


def _root(data: DataConfig) -> Path:
    root = Path(data.source).expanduser()
    return root if root.is_dir() else root.parent


def _is_local(source: str) -> bool:
    """A path rather than a hub id; a folder with a dataset card is a copy of a hub dataset and is read as one."""
    path = Path(source).expanduser()
    if path.is_dir():
        card = path / "README.md"  # begins with a block of metadata where the hub reads it
        return not (card.is_file() and card.read_bytes().startswith(b"---\n"))
    return path.exists() or kind_of(path) is not None or not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", source)


def _read_hub(data: DataConfig) -> Iterator[Document]:
    """The documents of one split of a dataset, streamed in its order. Raises TsaeError.

    `data.source` is a hub id or a local folder in the hub's format. With HF_HUB_OFFLINE=1 the snapshot in the local
    hub cache is read.
    """
    dataset = hub.open_dataset(data.source, data.split, subset=data.subset, revision=data.revision)
    features = getattr(dataset, "features", None) or {}
    names = getattr(features.get(data.label_field), "names", None)
    rows = ((data.source, _with_label_name(row, data.label_field, names)) for row in dataset)
    try:
        yield from documents_of(rows, data)
    except TsaeError:
        raise
    except Exception as error:  # the network, a decoder or a builder: `datasets` has no common class for them
        raise TsaeError(f"data.source: {data.source}: reading stopped: {hub.reason_of(error)}") from error


def _with_label_name(row: Any, field: str | None, names: list[str] | None) -> Any:
    """A ClassLabel column holds indices; its name is the label."""
    if names is None or field is None or not isinstance(row.get(field), int) or row[field] < 0:
        return row
    return {**row, field: names[row[field]]}


def kind_of(path: Path) -> str | None:
    """The suffix that decides how `path` is read, compression aside; None if it cannot be."""
    compressed = path.suffix.lower() in COMPRESSED
    suffix = (path.with_suffix("") if compressed else path).suffix.lower()
    readable = (*JSON_LINES, *TEXTS) if compressed else (*TABLES, *TEXTS)
    return suffix if suffix in readable else None


def list_files(source: str) -> list[Path]:
    """The files of `source`, sorted: itself, or in a folder all tables, or all texts where there are no tables."""
    root = Path(source).expanduser()
    allowed = f"allowed: {', '.join((*TABLES, *TEXTS))}, and {' or '.join(COMPRESSED)} of all but parquet"
    if root.is_file():
        if kind_of(root) is None:
            raise TsaeError(f"data.source: {source}: files of this kind cannot be read; {allowed}")
        return [root]
    if not root.is_dir():
        raise TsaeError(f"data.source: {source}: there is no such file or folder")
    found = [path for path in sorted(root.rglob("*")) if path.is_file() and path.name not in BOOKKEEPING]
    found = [path for path in found if not any(part.startswith(".") for part in path.relative_to(root).parts)]
    for kinds in (TABLES, TEXTS):
        if matching := [path for path in found if kind_of(path) in kinds]:
            return matching
    raise TsaeError(f"data.source: {source}: the folder holds no file that can be read; {allowed}")


def _read_local(data: DataConfig) -> Iterator[Document]:
    """The documents of a local file or folder, in the order of the file names. Raises TsaeError."""
    for path in list_files(data.source):
        try:
            if kind_of(path) in TEXTS:
                if data.label_field is not None:
                    raise TsaeError(f"{path}: data.label_field: plain text has no column '{data.label_field}'")
                yield from (Document(text, None) for text in _texts(path))
            else:
                yield from documents_of(_parquet(path, data) if path.suffix == ".parquet" else _json(path), data)
        # gzip, zstd and parquet each report damage as an OSError or a ValueError of their own
        except (OSError, ValueError) as error:
            raise TsaeError(f"{path}: cannot be read: {error}") from None


def _open(path: Path) -> TextIO:
    """A text stream; pyarrow decompresses, because it reads all frames of a .zst and refuses a truncated one."""
    if path.suffix.lower() not in COMPRESSED:
        return open(path, encoding="utf-8")
    import pyarrow

    return io.TextIOWrapper(pyarrow.input_stream(str(path), compression="detect"), encoding="utf-8")


def _json(path: Path) -> Iterator[tuple[str, Any]]:
    """(where, row) of a file with one object per line, or of a .json file with a list of objects."""
    with _open(path) as stream:
        if kind_of(path) == ".json":
            text = stream.read()
            if text.lstrip().startswith("["):
                yield from ((f"{path}: entry {i}", row) for i, row in enumerate(_decoded(text, str(path)), 1))
                return
            stream = io.StringIO(text)
        for number, line in enumerate(stream, 1):
            if line.strip():
                yield f"{path}: line {number}", _decoded(line, f"{path}: line {number}")


def _decoded(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise TsaeError(f"{where}: not valid JSON: {error.msg} at character {error.pos}") from None
    except RecursionError:
        raise TsaeError(f"{where}: not valid JSON: nested too deeply") from None


def _parquet(path: Path, data: DataConfig) -> Iterator[tuple[str, Any]]:
    import pyarrow.parquet

    table = pyarrow.parquet.ParquetFile(path)
    columns = []
    for setting, name in (("data.text_field", data.text_field), ("data.label_field", data.label_field)):
        if name is None:
            continue
        column = name if name in table.schema_arrow.names else name.partition(".")[0]
        if column not in table.schema_arrow.names:
            raise missing_column(str(path), setting, name, table.schema_arrow.names)
        columns.append(column)
    for batch in table.iter_batches(batch_size=PARQUET_ROWS, columns=columns):
        yield from ((str(path), row) for row in batch.to_pylist())


def _texts(path: Path) -> Iterator[str]:
    """The text of a file, in pieces of at least `MAX_DOCUMENT` characters that end where a paragraph does."""
    lines: list[str] = []
    size = 0
    with _open(path) as stream:
        for line in stream:
            if size >= MAX_DOCUMENT and not line.strip():
                yield "".join(lines)
                lines, size = [], 0
            lines.append(line)
            size += len(line)
    if "".join(lines).strip():
        yield "".join(lines)


def documents_of(rows: Iterable[tuple[str, Any]], data: DataConfig) -> Iterator[Document]:
    """Documents of (where, row) pairs; rows whose text is missing or blank are passed over. Raises TsaeError.

    `where` (a file and a line, or a dataset) goes into errors. A dotted column such as `meta.set` reads inside a
    nested one.
    """
    for where, row in rows:
        if not isinstance(row, Mapping):
            raise TsaeError(f"{where}: an object with the key '{data.text_field}' is expected, found {row!r:.40}")
        text = _field(row, data.text_field, where, "data.text_field")
        if text is not None and not isinstance(text, str):
            raise TsaeError(
                f"{where}: data.text_field: column '{data.text_field}' holds {type(text).__name__}, not text; "
                f"columns found: {', '.join(map(str, row))}"
            )
        if text is None or not text.strip():
            continue
        label = None if data.label_field is None else _field(row, data.label_field, where, "data.label_field")
        yield Document(text, None if label is None else str(label))


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
