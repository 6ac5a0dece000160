"""Rows of a table to documents: which column holds the text, which the label."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from tsae.config.sections import DataConfig
from tsae.runtime.errors import TsaeError, suggestion


class Document(NamedTuple):
    """One text and, where the source has labels, its label."""

    text: str
    label: str | None


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
