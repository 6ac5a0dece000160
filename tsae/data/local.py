"""Documents in local files: jsonl, json, parquet, and plain text; the text formats also as .gz and .zst."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from tsae.config.sections import DataConfig
from tsae.data.records import Document, documents_of, missing_column
from tsae.runtime.errors import TsaeError

JSON_LINES = (".jsonl", ".ndjson", ".json")
TABLES = (*JSON_LINES, ".parquet")
TEXTS = (".txt", ".text", ".md", ".rst")
COMPRESSED = (".gz", ".zst")
MAX_DOCUMENT = 20_000  # characters; a longer text file becomes several documents, cut between paragraphs
PARQUET_ROWS = 256
BOOKKEEPING = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")


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


def read_local(data: DataConfig) -> Iterator[Document]:
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
