from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest
import zstandard

from tsae.config.sections import DataConfig
from tsae.data.documents import Document, fingerprint, read_documents
from tsae.data.local import SEPARATORS, kind_of
from tsae.runtime.errors import TsaeError

ROWS = [{"text": f"document {i} · naïve", "meta": {"set": "ab"[i % 2]}, "score": i} for i in range(5)]
DOCUMENTS = [Document(row["text"], row["meta"]["set"]) for row in ROWS]


def read(source: Path, **changes: str | None) -> list[Document]:
    settings = {"label_field": "meta.set", **changes}
    return list(read_documents(DataConfig(source=str(source), **settings)))  # type: ignore[arg-type]


def json_lines(rows: list[dict]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def write(path: Path, rows: list[dict] = ROWS) -> Path:
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".arrow":
        with pyarrow.ipc.new_file(path, (table := pyarrow.Table.from_pylist(rows)).schema) as writer:
            writer.write_table(table)
    elif kind_of(path) in SEPARATORS:
        cells = [["text", "meta.set"], *([row["text"], row["meta"]["set"]] for row in rows)]
        lines = "".join(SEPARATORS[kind_of(path)].join(row) + "\n" for row in cells).encode()
        path.write_bytes(gzip.compress(lines) if path.suffix == ".gz" else lines)
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(json_lines(rows[:2])) + gzip.compress(json_lines(rows[2:])))
    elif path.suffix == ".zst":
        pack = zstandard.ZstdCompressor().compress
        path.write_bytes(pack(json_lines(rows[:2])) + pack(json_lines(rows[2:])))
    else:
        path.write_bytes(json.dumps(rows).encode() if path.name == "list.json" else json_lines(rows))
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "list.json", "a.parquet", "a.jsonl.gz", "a.jsonl.zst",
                                  "a.csv", "a.csv.gz", "a.tsv", "a.arrow"])  # fmt: skip
def test_a_table_gives_its_texts_and_labels_in_order(tmp_path, name):
    assert read(write(tmp_path / name)) == DOCUMENTS


def test_a_folder_gives_its_tables_by_name_and_nothing_else(tmp_path):
    (tmp_path / "deeper").mkdir()
    write(tmp_path / "b.parquet", ROWS[2:4])
    write(tmp_path / "a.jsonl.gz", ROWS[:2])
    write(tmp_path / "deeper" / "c.jsonl", ROWS[4:])
    (tmp_path / "README.md").write_text("What this folder is.")
    (tmp_path / "dataset_info.json").write_text("{}")
    (tmp_path / ".hidden.jsonl").write_text("{}")
    assert read(tmp_path) == DOCUMENTS


def test_csv_stands_for_a_folder_unless_it_holds_other_tables_or_more_texts(tmp_path):
    write(tmp_path / "b.csv")
    (tmp_path / "README.md").write_text("What this folder is.")
    (tmp_path / "LICENSE.txt").write_text("What may be done with it.")
    assert read(tmp_path) == DOCUMENTS
    (tmp_path / "a.txt").write_text("A text.")
    texts = ["What may be done with it.", "What this folder is.", "A text."]
    assert [document.text for document in read(tmp_path, label_field=None)] == texts
    write(tmp_path / "a.jsonl", ROWS[:1])
    assert read(tmp_path) == DOCUMENTS[:1]


def test_text_files_are_one_document_each_and_long_ones_are_cut_between_paragraphs(tmp_path):
    paragraph = "One sentence after another. " * 100 + "\n\n"
    (tmp_path / "a.txt").write_text("Short.")
    (tmp_path / "b.md").write_text(paragraph * 20)
    (tmp_path / "empty.txt").write_text("\n")
    documents = read(tmp_path, label_field=None)
    assert documents[0] == Document("Short.", None)
    assert "".join(document.text for document in documents[1:]) == paragraph * 20
    assert len(documents) == 4
    assert all(document.text.lstrip("\n").startswith("One") for document in documents[1:])


BOM = b"\xef\xbb\xbf"


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "list.json", "a.jsonl.gz", "a.csv", "a.csv.gz", "a.tsv"])
def test_a_byte_order_mark_is_no_part_of_a_table(tmp_path, name):
    path = write(tmp_path / name)
    packed = path.suffix == ".gz"
    content = BOM + (gzip.decompress(path.read_bytes()) if packed else path.read_bytes())
    path.write_bytes(gzip.compress(content) if packed else content)
    assert read(path) == DOCUMENTS


def test_a_byte_order_mark_is_no_part_of_a_text_or_of_a_file_that_was_appended(tmp_path):
    (tmp_path / "a.txt").write_bytes(BOM + "Naïve words.".encode())
    assert read(tmp_path / "a.txt", label_field=None) == [Document("Naïve words.", None)]
    (tmp_path / "b.jsonl").write_bytes((BOM + json_lines(ROWS[:2])) + (BOM + json_lines(ROWS[2:])))
    assert read(tmp_path / "b.jsonl") == DOCUMENTS


def test_cells_of_a_csv_hold_separators_quotes_and_lines_and_may_be_empty_or_long(tmp_path):
    long = "word " * 40_000
    cells = f'text,meta.set\n"one, ""two""\nthree",a\n,b\n\n{long},\nfew\n'
    (tmp_path / "a.csv").write_text(cells)
    expected = [Document('one, "two"\nthree', "a"), Document(long, None), Document("few", None)]
    assert read(tmp_path / "a.csv") == expected


def test_rows_without_text_are_passed_over(tmp_path):
    rows = [{"text": None}, {"text": " \n"}, {"text": "words"}]
    assert read(write(tmp_path / "a.jsonl", rows), label_field=None) == [Document("words", None)]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"txt": "words", "id": 1}\n', r"a.jsonl: line 1: data.text_field: no column 'text'; did you mean 'txt'\? columns found: txt, id"),
        ("a.jsonl", b'{"text": "words"}\n', r"line 1: data.label_field: no column 'meta.set'"),
        ("a.jsonl", b'{"text": ["words"]}\n', r"column 'text' holds list, not text"),
        ("a.jsonl", b'{"text": "words", "meta": {"set": 1}}\n{"text": \n', r"a.jsonl: line 2: not valid JSON"),
        ("a.jsonl", b"[1]\n", r"line 1: an object with the key 'text' is expected"),
        ("a.jsonl", b'{"text": "\xff"}\n', r"a.jsonl: cannot be read: .*utf-8"),
        ("a.jsonl", b'{"text": "", "meta": {"set": 1}}\n', r"no text in it; the column 'text' is empty throughout"),
        ("a.jsonl.zst", zstandard.ZstdCompressor().compress(json_lines(ROWS))[:-20], r"cannot be read: Truncated"),
        ("a.jsonl.gz", gzip.compress(json_lines(ROWS), mtime=0)[:-20], r"cannot be read: Truncated"),
        ("a.jsonl.gz", json_lines(ROWS), r"a.jsonl.gz: cannot be read"),
        ("a.parquet", b"PAR1 and something else", r"a.parquet: cannot be read"),
        ("a.jsonl", b'{"text": "words", "meta": {"set": 1}}\nnull\n', r"a.jsonl: line 2: an object with the key 'text' is expected, found None"),
        ("a.csv", b"text;meta.set\nwords;x\n", r"a.csv: line 2: data.text_field: no column 'text'; .*found: text;meta.set"),
        ("a.csv", b"text,meta.set\nwords,a\nmore, words,b\n", r"a.csv: line 3: has more cells than the first line, which names 2"),
        ("a.csv", b'text,meta.set\n"words,a\n', r"a.csv: line [23]: cannot be read: unexpected end of data"),
        ("a.csv.gz", gzip.compress(b"text,meta.set\nwords,a\n", mtime=0)[:-9], r"a.csv.gz: cannot be read: Truncated"),
        ("a.tsv", b"text\tmeta.set\n\xff\ta\n", r"a.tsv: cannot be read: .*utf-8"),
        ("a.arrow", b"ARROW1 and something else", r"a.arrow: cannot be read"),
        ("a.xml", b"<text>words</text>", r"a.xml: files of this kind cannot be read; allowed: .jsonl, .*.csv"),
        ("a.parquet.gz", b"", r"cannot be read; allowed"),
        ("a.txt", b"words", r"data.label_field: plain text has no column"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_one_line_that_says_why(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TsaeError, match=message) as raised:
        read(tmp_path / name)
    assert "\n" not in str(raised.value)


def test_a_missing_parquet_column_is_named_with_those_found(tmp_path):
    with pytest.raises(TsaeError, match="no column 'body'; columns found: text, meta, score"):
        read(write(tmp_path / "a.parquet"), text_field="body")


@pytest.mark.parametrize("name", ["nothing.jsonl", "no/such/folder", "./nowhere"])
def test_a_missing_path_is_not_taken_for_a_hub_id(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TsaeError, match="there is no such file or folder"):
        list(read_documents(DataConfig(source=name)))


def test_a_folder_without_text_is_refused(tmp_path):
    (tmp_path / "a.bin").write_bytes(b"")
    with pytest.raises(TsaeError, match="the folder holds no file that can be read; allowed"):
        read(tmp_path)


def test_the_fingerprint_of_local_files_follows_names_and_sizes(tmp_path):
    data = DataConfig(source=str(write(tmp_path / "a.jsonl")))
    before = fingerprint(data)
    write(tmp_path / "a.jsonl")
    assert fingerprint(data) == before
    write(tmp_path / "a.jsonl", ROWS[:3])
    assert fingerprint(data) != before
