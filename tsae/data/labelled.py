"""Texts with labels for the experiments: known datasets by name, or anything local in one of their schemas.

    finefineweb  m-a-p/FineFineWeb-test           text or content, domain
    wikipedia    vietgpt/wikipedia_en             text, title; the label stands in a CSV table with Article, Category
    mmlu         cais/mmlu (all, test)            question, subject
    hh-rlhf      Anthropic/hh-rlhf (harmless)     chosen, rejected
    pile         monology/pile-uncopyrighted      text, meta.pile_set_name
    pile-10k     NeelNanda/pile-10k               text, meta.pile_set_name
    embedded     documentation on this machine    its topic, in the order opposite to that in which training reads

A hub id, a local table or a folder of tables is read by the first schema whose columns it has; `label`, `topic` and
`category` do for a label too. Preferences may have a `prompt` of their own, and be lists of chat messages.
"""

from __future__ import annotations

import csv
import logging
import os
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from tsae.data import chat, hub, local
from tsae.runtime import contents
from tsae.runtime.errors import TsaeError, suggestion
from tsae.runtime.preemption import polled
from tsae.runtime.progress import Progress

log = logging.getLogger("tsae")


class LabelledText(NamedTuple):
    """One text, its label, and what it belongs to: texts of one group never stand on both sides of a split."""

    text: str
    label: str
    group: int
    templated: bool = False
    """Whether a chat template wrote the text: what spells a special token in it is one."""


class ResponsePair(NamedTuple):
    """Two whole dialogues that differ in what the assistant answers at last."""

    chosen: str
    rejected: str
    start: int | None = None
    """The character at which both answers begin, where the dataset tells."""
    templated: bool = False
    """Whether a chat template wrote them."""


class Schema(NamedTuple):
    """Where a dataset keeps text and label."""

    texts: tuple[str, ...]
    """Columns of which the first that is there holds the text."""
    label: str
    source: str | None = None
    """Hub id of the dataset that is read when it is named."""
    subset: str | None = None
    data_dir: str | None = None
    split: str = "train"
    classes: tuple[str, ...] | None = None
    """The labels that the paper uses, of a dataset with many more."""


DOMAINS = (
    *("christianity", "law", "literature", "economics", "food"),
    *("drama_and_film", "health", "mathematics", "medical", "history"),
)
SUBJECTS = (
    *("high_school_mathematics", "formal_logic", "professional_medicine", "high_school_european_history"),
    *("high_school_chemistry", "high_school_statistics", "college_computer_science", "world_religions"),
    *("high_school_psychology", "college_physics"),
)

SCHEMAS = {
    "hh-rlhf": Schema(("chosen",), "rejected", "Anthropic/hh-rlhf", data_dir="harmless-base"),
    "mmlu": Schema(("question",), "subject", "cais/mmlu", subset="all", split="test", classes=SUBJECTS),
    "finefineweb": Schema(("text", "content"), "domain", "m-a-p/FineFineWeb-test", classes=DOMAINS),
    "pile": Schema(("text",), "meta.pile_set_name", "monology/pile-uncopyrighted"),
    "pile-10k": Schema(("text",), "meta.pile_set_name", "NeelNanda/pile-10k"),
    "label": Schema(("text", "content", "question"), "label"),
    "topic": Schema(("text", "content", "question"), "topic"),
    "category": Schema(("text", "content", "question"), "category"),
    "wikipedia": Schema(("text",), "title", "vietgpt/wikipedia_en"),
}
"""Name → schema, in the order in which they are tried on unknown columns; without a source: columns alone."""

EMBEDDED = "embedded"
NAMES = (EMBEDDED, *(name for name, schema in SCHEMAS.items() if schema.source))
ANSWER = "Assistant:"
"""What an answer follows in dialogues that are one text."""


def labelled_texts(
    dataset: str, *, categories: str | None = None, subset: str | None = None, split: str | None = None
) -> Iterator[LabelledText]:
    """The texts of `dataset` with their labels, in its order; rows without text or label are passed over.

    `subset` and `split` replace those that the paper takes. `categories` is the CSV table (Article, Category) that gives titles a label; reading ends when each article is
    found. Of pairs, both dialogues are given, labelled `chosen` and `rejected`. Raises TsaeError for a dataset that
    cannot be read and for missing columns, naming those that are there.
    """
    if dataset == EMBEDDED:
        yield from _embedded()
        return
    rows = _Rows(dataset, subset, split)
    schema = rows.schema
    if schema.label == "rejected":
        for group, pair in enumerate(_pairs(rows, None)):
            yield LabelledText(pair.chosen, "chosen", group)
            yield LabelledText(pair.rejected, "rejected", group)
        return
    if schema.label == "title":
        yield from _articles(rows, _categories(categories, dataset))
        return
    for group, (where, row) in enumerate(rows):
        text, label = rows.text(where, row), rows.label(where, row)
        if text and label:
            yield LabelledText(text, label, group)


def response_pairs(
    dataset: str, tokenizer: Any, *, subset: str | None = None, split: str | None = None
) -> Iterator[ResponsePair]:
    """The pairs of a dataset with columns chosen and rejected, and perhaps prompt, in its order.

    Chat messages are written as text by the chat template of `tokenizer`. Raises TsaeError without those columns.
    """
    yield from _pairs(_Rows(dataset, subset, split), tokenizer)


def _articles(rows: _Rows, labels: dict[str, str]) -> Iterator[LabelledText]:
    """The articles with a label; a whole encyclopedia may have to be read for the last of them."""
    progress, left = Progress(f"articles of {rows.dataset}", None, "articles"), set(labels)
    for group, (where, row) in enumerate(rows):
        text, title = rows.text(where, row), rows.label(where, row) or ""
        left.discard(title)
        if text and title in labels:
            yield LabelledText(text, labels[title], group)
        if not left:
            return
        progress.update(group + 1, found=len(labels) - len(left), wanted=len(labels))
    log.warning("%s: %d articles of the table are not there, such as '%s'", rows.dataset, len(left), min(left))


def _pairs(rows: _Rows, tokenizer: Any) -> Iterator[ResponsePair]:
    for where, row in rows:
        prompt, chosen, rejected = (row.get(column) for column in ("prompt", "chosen", "rejected"))
        if chat.is_dialogue(prompt):
            chosen, rejected = _said(chosen, "assistant"), _said(rejected, "assistant")
        if chat.is_dialogue(chosen) and chat.is_dialogue(rejected):
            yield _pair_of_dialogues(chosen, rejected, prompt, tokenizer, where)
        elif isinstance(chosen, str) and isinstance(rejected, str):
            yield _pair_of_texts(chosen, rejected, prompt if isinstance(prompt, str) else "")
        else:
            raise _missing(where, "chosen and rejected, both text or both lists of messages", row)


def _pair_of_texts(chosen: str, rejected: str, prompt: str) -> ResponsePair:
    """Of two answers and their prompt, or of two dialogues that begin with it."""
    shared = chosen[: chat.shared_length(chosen, rejected)]
    if not prompt.strip() or (prompt.strip() in shared and ANSWER in shared):
        return ResponsePair(chosen, rejected)
    if not shared.startswith(prompt):
        chosen, rejected = prompt + chosen, prompt + rejected
    return ResponsePair(chosen, rejected, len(prompt))


def _pair_of_dialogues(chosen: Any, rejected: Any, prompt: Any, tokenizer: Any, where: str) -> ResponsePair:
    """Of two lists of messages: the prompt is what they begin with in common, or is kept apart from them, or both."""
    sides = [chat.messages_of(side, where) for side in (chosen, rejected)]
    before = chat.messages_of(_said(prompt, "user") or [], where)
    apart = isinstance(prompt, list) or sides[0][0] != sides[1][0]
    if apart and sides[0][: len(before)] != before:
        sides = [[*before, *side] for side in sides]
    first, second = (chat.render(side, tokenizer, where) for side in sides)
    common = sides[0][: chat.shared_length(*sides)]
    if not common:
        return ResponsePair(first, second, templated=True)
    opening = chat.render(common, tokenizer, where, answer_follows=True)
    return ResponsePair(first, second, chat.shared_length(opening, first, second), templated=True)


def _said(text: Any, role: str) -> Any:
    """A text as a dialogue of one message; anything else as it is."""
    return [{"role": role, "content": text}] if isinstance(text, str) and text.strip() else text


def default_classes(dataset: str) -> tuple[str, ...] | None:
    """The labels that the paper takes from a dataset, None for all of them."""
    named = _named(dataset)
    return None if named is None else SCHEMAS[named].classes


def _named(dataset: str) -> str | None:
    """The schema that goes by a name or by the hub id of its dataset."""
    known = {name.lower(): name for name, schema in SCHEMAS.items() if schema.source}
    known |= {str(schema.source).lower(): name for name, schema in SCHEMAS.items() if schema.source}
    return known.get(dataset.lower())


class _Rows:
    """The rows of a dataset, each with where it is, and the schema that they have."""

    def __init__(self, dataset: str, subset: str | None, split: str | None) -> None:
        self.dataset = dataset
        self._files, self._stream = _open(dataset, subset, split)
        self._names: dict[str, list[str]] = {
            column: names
            for column, feature in (getattr(self._stream, "features", None) or {}).items()
            if (names := getattr(feature, "names", None)) is not None
        }

    @cached_property
    def schema(self) -> Schema:
        """That of the dataset's name, or else of the columns of its first row, which are checked."""
        where, first = next(iter(self), ("", None))
        if first is None:
            raise TsaeError(f"--dataset {self.dataset}: holds no rows")
        named = _named(self.dataset)
        return SCHEMAS[named] if named else _schema_of(where, first)

    def __iter__(self) -> Iterator[tuple[str, Mapping[str, Any]]]:
        try:
            for where, row in polled(self._all()):
                if not isinstance(row, Mapping):
                    raise TsaeError(f"{where}: an object with the columns of a row is expected, found {row!r:.40}")
                yield where, row
        except TsaeError:
            raise
        except Exception as error:  # the network, a decoder or a builder: `datasets` has no common class for them
            raise TsaeError(f"--dataset {self.dataset}: reading stopped: {hub.reason_of(error)}") from error

    def _all(self) -> Iterator[tuple[str, Any]]:
        for path in self._files:
            yield from local.rows(path)
        for row in self._stream:
            yield f"--dataset {self.dataset}", row

    def text(self, where: str, row: Mapping[str, Any]) -> str | None:
        """The text of a row, None if it is blank. Raises TsaeError if the column is not there or holds no text."""
        for column in self.schema.texts:
            if column in row:
                if row[column] is not None and not isinstance(row[column], str):
                    raise TsaeError(f"{where}: column '{column}' holds {type(row[column]).__name__}, not text")
                return row[column] if row[column] and row[column].strip() else None
        raise _missing(where, " or ".join(self.schema.texts), row)

    def label(self, where: str, row: Mapping[str, Any]) -> str | None:
        """The label of a row; a ClassLabel by its name. Raises TsaeError if the column is not there."""
        value: Any = row
        for part in self.schema.label.split("."):
            if not isinstance(value, Mapping) or part not in value:
                raise _missing(where, self.schema.label, row)
            value = value[part]
        names = self._names.get(self.schema.label)
        if names is not None and isinstance(value, int):
            return names[value] if value >= 0 else None
        return None if value is None else str(value)


def _schema_of(where: str, row: Mapping[str, Any]) -> Schema:
    for schema in SCHEMAS.values():
        top = schema.label.partition(".")[0]
        if top in row and any(column in row for column in schema.texts):
            return schema
    wanted = dict.fromkeys(f"{' or '.join(schema.texts)} with {schema.label}" for schema in SCHEMAS.values())
    raise _missing(where, "; ".join(wanted), row)


def _missing(where: str, wanted: str, row: Mapping[str, Any]) -> TsaeError:
    return TsaeError(f"{where}: expected columns: {wanted}; columns found: {', '.join(map(str, row))}")


def content_of(dataset: str) -> str:
    """What the texts of a dataset are, without reading them as texts: the content of local files, a hub dataset's commit.

    Of a hub dataset that is not in the local cache nothing is known but its name.
    """
    if dataset == EMBEDDED:
        from tsae.data.embedded import corpus_fingerprint

        return corpus_fingerprint()
    path = Path(os.path.expanduser(dataset))
    if path.is_file():
        return contents.sha256_of(path)
    if path.is_dir():
        return contents.sha256_of_all(sorted(found for found in path.rglob("*") if found.is_file()), path)
    named = _named(dataset)
    return hub.cached_commit(str(SCHEMAS[named].source) if named else dataset) or ""


def _open(dataset: str, subset: str | None, split: str | None) -> tuple[list[Path], Any]:
    """The tables of a local file or folder; or a stream of rows, of a known dataset, a copy of one, or a hub id."""
    named = _named(dataset)
    if named is not None:
        schema = SCHEMAS[named]
        options = {"subset": subset or schema.subset, "data_dir": schema.data_dir, "setting": "--dataset"}
        return [], hub.open_dataset(str(schema.source), split or schema.split, **options)  # type: ignore[arg-type]
    path = Path(os.path.expanduser(dataset))
    if path.is_dir() and local.has_card(path):
        return [], hub.open_dataset(str(path), split or _first_split(path, subset), subset=subset, setting="--dataset")
    if path.exists():
        splits = local.splits(dataset, "--dataset")
        files = local.files_of(dataset, split or next(iter(splits)), "--dataset")
        if any(local.kind_of(file) in local.TEXTS for file in files):
            raise TsaeError(f"--dataset {dataset}: plain text has no columns; give a table, such as jsonl or csv")
        return files, ()
    require_there(dataset)
    return [], hub.open_dataset(dataset, split or "train", subset=subset, setting="--dataset")


def require_there(dataset: str, setting: str = "--dataset") -> None:
    """Raise TsaeError for what is no known name, no file or folder, and cannot be a hub id; the network is not asked."""
    path = Path(os.path.expanduser(dataset))
    if dataset in NAMES or _named(dataset) is not None or path.exists():
        return
    if dataset.count("/") != 1 or dataset.startswith((".", "/", "~")) or local.kind_of(path) is not None:
        raise TsaeError(
            f"{setting} {dataset}: no such file or folder; {suggestion(dataset, NAMES)}"
            f"known: {', '.join(NAMES)}, a local file or folder, or a hub id owner/name"
        )


def _first_split(folder: Path, subset: str | None) -> str:
    """`train`, or the first split of a folder in the hub's format that has none of that name."""
    try:
        splits = [str(split) for split in hub.quiet_datasets().get_dataset_split_names(str(folder), subset)]
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise TsaeError(f"--dataset {folder}: no dataset in the hub's format is here: {reason}") from None
    return "train" if "train" in splits else splits[0]


def _categories(path: str | None, dataset: str) -> dict[str, str]:
    """Title → label of a table with the columns Article and Category."""
    if path is None:
        raise TsaeError(
            f"--dataset {dataset}: has titles and no labels; give a CSV table with the columns Article, Category in "
            "experiments.texts.categories"
        )
    try:
        with open(os.path.expanduser(path), encoding="utf-8-sig", newline="") as stream:
            table = csv.DictReader(stream)
            found = table.fieldnames or []
            for column in ("Article", "Category"):
                if column not in found:
                    raise TsaeError(f"{path}: no column '{column}'; columns found: {', '.join(found) or 'none'}")
            labels = {row["Article"]: row["Category"] for row in table if row["Article"] and row["Category"]}
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise TsaeError(f"experiments.texts.categories: {path}: cannot be read: {error}") from None
    if not labels:
        raise TsaeError(f"{path}: the table holds no article with a category")
    return labels


def _embedded() -> Iterator[LabelledText]:
    """The embedded corpus from its end: what a run that stops at `data.max_tokens` has not read comes first."""
    from tsae.config.sections import DataConfig
    from tsae.data.documents import read_documents

    documents = list(read_documents(DataConfig(source=EMBEDDED)))
    for group in polled(range(len(documents) - 1, -1, -1)):
        yield LabelledText(documents[group].text, documents[group].label or "", group)
