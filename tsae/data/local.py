"""Files on this machine: which of them belong to a split of a source, and the rows and texts that they hold.

Tables are jsonl, json, parquet, csv, tsv and arrow; texts are txt, md and rst. All but parquet and arrow also as .gz
and .zst. A folder that `datasets` wrote with `save_to_disk` is read by what its own files list.
"""

from __future__ import annotations

import csv
import io
import json
import re
import sys
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

from tsae.runtime.errors import TsaeError, suggestion

JSON_LINES = (".jsonl", ".ndjson", ".json")
TABLES = (*JSON_LINES, ".parquet")
SEPARATORS = {".csv": ",", ".tsv": "\t"}
ARROW = ".arrow"
INDEXED = b"ARROW1"
"""What an arrow file begins with that has its index at the end; a stream of batches has none."""
TEXTS = (".txt", ".text", ".md", ".rst")
COMPRESSED = (".gz", ".zst")
ALLOWED = (
    f"allowed: {', '.join((*TABLES, *SEPARATORS, ARROW, *TEXTS))}, and {' or '.join(COMPRESSED)} of all but parquet "
    "and arrow"
)
MAX_DOCUMENT = 20_000  # characters; a longer text file becomes several documents, cut between paragraphs
PARQUET_ROWS = 256
SAVED_SPLITS, SAVED_STATE = "dataset_dict.json", "state.json"
BOOKKEEPING = ("dataset_info.json", "dataset_infos.json", SAVED_SPLITS, SAVED_STATE)
TRAIN = "train"
SHARDED = re.compile(r"data/([^/]+)-\d{5}-of-\d{5}[^/]*\.[^/]*")
"""The name of a shard as `push_to_hub` gives it, whose split may be called anything."""


def kind_of(path: Path) -> str | None:
    """The suffix that decides how `path` is read, compression aside; None if it cannot be."""
    compressed = path.suffix.lower() in COMPRESSED
    suffix = (path.with_suffix("") if compressed else path).suffix.lower()
    readable = (*JSON_LINES, *SEPARATORS, *TEXTS)
    return suffix if suffix in (readable if compressed else (*readable, ".parquet", ARROW)) else None


def is_saved(folder: Path) -> bool:
    """Whether `datasets` wrote the folder with `save_to_disk`."""
    return (folder / SAVED_SPLITS).is_file() or (folder / SAVED_STATE).is_file()


def files_of(source: str, split: str, setting: str = "data.source") -> list[Path]:
    """The files of one split of a file or folder, sorted. Raises TsaeError, for a split naming those that are there."""
    found, root = splits(source, setting), Path(source).expanduser()
    if split not in found and root.is_file():
        found = {
            **found,
            **_by_name(root.parent, [root]),
        }  # test.jsonl is not only `train`, as any file is, but also `test`
    if split not in found:
        raise TsaeError(
            f"{setting}: {source}: there is no split '{split}'; {suggestion(split, found)}"
            f"by the names of its files it has: {', '.join(found)}"
        )
    return found[split]


def splits(source: str, setting: str = "data.source") -> dict[str, list[Path]]:
    """Split → its files, sorted, as `datasets.load_dataset` shares them out; all are `train` where no name says else.

    Raises TsaeError for what is not there or cannot be read.
    """
    root = Path(source).expanduser()
    if root.is_file():
        if kind_of(root) is None:
            raise TsaeError(f"{setting}: {source}: files of this kind cannot be read; {ALLOWED}")
        return {TRAIN: [root]}
    if not root.is_dir():
        raise TsaeError(f"{setting}: {source}: there is no such file or folder")
    if is_saved(root):
        return _saved(root)
    files = _readable(root)
    if not files:
        raise TsaeError(f"{setting}: {source}: the folder holds no file that can be read; {ALLOWED}")
    return _by_name(root, files)


def _readable(folder: Path) -> list[Path]:
    """All tables in a folder and below; where there are none, all csv, tsv and arrow files, or all texts if those are more."""
    found = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in BOOKKEEPING]
    found = [path for path in found if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    tables, rows, texts = (
        [path for path in found if kind_of(path) in kinds] for kinds in (TABLES, (*SEPARATORS, ARROW), TEXTS)
    )
    described = len(texts) - sum(path.name == "README.md" for path in texts)
    return tables or (rows if rows and len(rows) >= described else texts)


def _by_name(root: Path, files: list[Path]) -> dict[str, list[Path]]:
    """Split → its files, by the rules of `datasets`: shards in data/, else names of folders, else names of files."""
    from datasets import data_files
    from fsspec.utils import glob_translate

    names = {path.relative_to(root).as_posix(): path for path in files}
    shards: dict[str, list[Path]] = {}
    for name, path in names.items():
        if shard := SHARDED.fullmatch(name):
            shards.setdefault(shard[1], []).append(path)
    if shards:
        return shards
    for rules in (data_files.DEFAULT_PATTERNS_SPLIT_IN_DIR_NAME, data_files.DEFAULT_PATTERNS_SPLIT_IN_FILENAME):
        found = {}
        for split, patterns in rules.items():
            matching = re.compile("|".join(map(glob_translate, patterns)))
            found[str(split)] = [path for name, path in names.items() if matching.match(name)]
        if any(found.values()):
            return {split: paths for split, paths in found.items() if paths}
    return {TRAIN: files}


def _saved(root: Path) -> dict[str, list[Path]]:
    """Split → its arrow files, of a saved DatasetDict or of one saved Dataset, which knows the split that it was."""
    try:
        if (root / SAVED_SPLITS).is_file():
            names = json.loads((root / SAVED_SPLITS).read_text())["splits"]
            return {name: _listed(root / name)[1] for name in names}
        split, files = _listed(root)
        return {split: files}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TsaeError(f"{root}: a folder of save_to_disk that cannot be read: {error}") from None


def _listed(folder: Path) -> tuple[str, list[Path]]:
    state = json.loads((folder / SAVED_STATE).read_text())
    part = state.get("_split") or TRAIN  # perhaps of several, or a slice: train[:10%]
    return re.split(r"[\[+]", part)[0], [folder / entry["filename"] for entry in state["_data_files"]]


def rows(path: Path, columns: Collection[str] = ()) -> Iterator[tuple[str, Any]]:
    """(where, row) of each row of a table, `where` being the file and the line or row. Raises TsaeError.

    Of a columnar file only `columns` are read if it has all of them. A class of `datasets` is given by its name.
    """
    kind = kind_of(path)
    try:
        if kind in JSON_LINES:
            yield from _json(path)
        elif kind in SEPARATORS:
            yield from _separated(path, SEPARATORS[kind])
        else:
            yield from _columnar(path, columns)
    # gzip, zstd and parquet each report damage as an OSError or a ValueError of their own
    except (OSError, ValueError) as error:
        raise TsaeError(f"{path}: cannot be read: {error}") from None


def texts(path: Path) -> Iterator[str]:
    """The text of a file, in pieces of at least `MAX_DOCUMENT` characters that end where a paragraph does. Raises TsaeError."""
    lines: list[str] = []
    size = 0
    try:
        with _open(path) as stream:
            for line in stream:
                if size >= MAX_DOCUMENT and not line.strip():
                    yield "".join(lines)
                    lines, size = [], 0
                lines.append(line)
                size += len(line)
    except (OSError, ValueError) as error:
        raise TsaeError(f"{path}: cannot be read: {error}") from None
    if "".join(lines).strip():
        yield "".join(lines)


def _open(path: Path) -> TextIO:
    """A text stream without a byte-order mark; pyarrow decompresses, because it reads all frames of a .zst and refuses a truncated one."""
    if path.suffix.lower() not in COMPRESSED:
        return open(path, encoding="utf-8-sig")
    import pyarrow

    return io.TextIOWrapper(pyarrow.input_stream(str(path), compression="detect"), encoding="utf-8-sig")


def _json(path: Path) -> Iterator[tuple[str, Any]]:
    """Of a file with one object per line, or of a .json file with a list of objects."""
    with _open(path) as stream:
        if kind_of(path) == ".json":
            text = stream.read()
            if text.lstrip().startswith("["):
                yield from ((f"{path}: entry {i}", row) for i, row in enumerate(_decoded(text, str(path)), 1))
                return
            stream = io.StringIO(text)
        for number, line in enumerate(stream, 1):
            line = line.removeprefix("\ufeff")  # of a file that was appended to another
            if line.strip():
                yield f"{path}: line {number}", _decoded(line, f"{path}: line {number}")


def _decoded(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise TsaeError(f"{where}: not valid JSON: {error.msg} at character {error.pos}") from None
    except RecursionError:
        raise TsaeError(f"{where}: not valid JSON: nested too deeply") from None


def _separated(path: Path, separator: str) -> Iterator[tuple[str, Any]]:
    """Of a file whose first row names the columns; an empty cell is None."""
    csv.field_size_limit(sys.maxsize)  # a text may be longer than the module's 128 KiB
    with _open(path) as stream:
        reader = csv.DictReader(stream, delimiter=separator, strict=True)
        try:
            for row in reader:
                where = f"{path}: line {reader.line_num}"
                if None in row:
                    raise TsaeError(f"{where}: has more cells than the first line, which names {len(row) - 1} columns")
                yield where, {column: cell or None for column, cell in row.items()}
        except csv.Error as error:
            raise TsaeError(f"{path}: line {reader.reader.line_num}: cannot be read: {error}") from None


def _columnar(path: Path, columns: Collection[str]) -> Iterator[tuple[str, Any]]:
    import pyarrow.ipc
    import pyarrow.parquet

    batches: Iterable[Any]
    if kind_of(path) == ARROW:
        source = pyarrow.memory_map(str(path))
        indexed = source.read(len(INDEXED)) == INDEXED
        source.seek(0)
        reader = pyarrow.ipc.open_file(source) if indexed else pyarrow.ipc.open_stream(source)
        schema = reader.schema
        batches = map(reader.get_batch, range(reader.num_record_batches)) if indexed else reader
    else:
        table = pyarrow.parquet.ParquetFile(path)
        schema = table.schema_arrow
        top = {name if name in schema.names else name.partition(".")[0] for name in columns}
        chosen = sorted(top) if top and top <= set(schema.names) else None
        batches = table.iter_batches(batch_size=PARQUET_ROWS, columns=chosen)
    classes, number = _classes(schema), 0
    for batch in batches:
        for row in batch.to_pylist():
            number += 1
            for column, names in classes.items():
                if isinstance(row.get(column), int):
                    row[column] = names[row[column]] if row[column] >= 0 else None
            yield f"{path}: row {number}", row


def _classes(schema: Any) -> dict[str, list[str]]:
    """Column → names of its classes, which `datasets` keeps beside their numbers."""
    described = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    features = described.get("info", {}).get("features", {})
    return {name: feature["names"] for name, feature in features.items() if "names" in feature}
