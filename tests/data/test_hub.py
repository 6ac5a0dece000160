from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from tsae.config.sections import DataConfig
from tsae.data.documents import Document, fingerprint, may_stop_early, read_documents
from tsae.runtime.errors import TsaeError

CARD = """---
configs:
- config_name: plain
  data_files:
  - split: train
    path: plain/train*.parquet
  - split: test
    path: plain/test.parquet
- config_name: nested
  data_files: nested/*.parquet
dataset_info:
- config_name: plain
  features:
  - name: text
    dtype: string
  - name: topic
    dtype:
      class_label:
        names:
          '0': physics
          '1': letters
---
# A dataset
"""


def write_dataset(folder: Path) -> Path:
    """A folder as the hub keeps one: a card with two configurations, one with splits and a ClassLabel."""
    (folder / "plain").mkdir(parents=True)
    (folder / "nested").mkdir()
    for name, texts in {"train-0": ["one", "two"], "train-1": ["three"], "test": ["four"]}.items():
        table = pyarrow.table({"text": texts, "topic": [len(text) % 2 for text in texts]})
        pyarrow.parquet.write_table(table, folder / "plain" / f"{name}.parquet")
    nested = pyarrow.Table.from_pylist([{"body": "five", "meta": {"set": "x"}}])
    pyarrow.parquet.write_table(nested, folder / "nested" / "a.parquet")
    (folder / "README.md").write_text(CARD)
    return folder


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_dataset(tmp_path_factory.mktemp("dataset") / "copy"))


def read(source: str, **changes: str | None) -> list[Document]:
    return list(read_documents(DataConfig(source=source, **changes)))  # type: ignore[arg-type]


def test_the_fingerprint_of_a_copy_follows_its_files(tmp_path):
    data = DataConfig(source=str(write_dataset(tmp_path / "copy")))
    before = fingerprint(data)
    assert before
    (tmp_path / "copy" / "plain" / "train-1.parquet").unlink()
    assert fingerprint(data) != before


def test_a_folder_with_a_dataset_card_is_read_by_configuration_and_split(dataset):
    labelled = read(dataset, subset="plain", label_field="topic")
    assert labelled == [Document("one", "letters"), Document("two", "letters"), Document("three", "letters")]
    assert read(dataset, subset="plain", split="test", label_field="topic") == [Document("four", "physics")]
    assert read(dataset, subset="nested", text_field="body", label_field="meta.set") == [Document("five", "x")]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"subset": "plain", "text_field": "txt"},
            r"no column 'txt'; did you mean 'text'\? columns found: text, topic",
        ),
        ({"subset": "plain", "label_field": "kind"}, r"no column 'kind'; columns found: text, topic"),
        ({"subset": "plain", "split": "dev"}, r"dev.*train.*test"),
        ({"subset": "other"}, r"other.*plain.*nested"),
    ],
)
def test_a_wrong_name_is_refused_with_those_found(dataset, changes, message):
    with pytest.raises(TsaeError, match=message):
        read(dataset, **changes)


def test_reading_a_hub_dataset_may_stop_early_and_local_files_are_read_wholly():
    assert may_stop_early(DataConfig(source="monology/pile-uncopyrighted"))
    assert may_stop_early(DataConfig(source="imdb"))
    assert fingerprint(DataConfig(source="monology/pile-uncopyrighted")) == ""
    assert not may_stop_early(DataConfig(source="texts.jsonl"))
    assert may_stop_early(DataConfig())


def test_offline_the_hub_cache_is_read_and_what_is_not_in_it_is_refused_with_the_remedy(tmp_path):
    repository = tmp_path / "hub" / "datasets--org--small"
    commit = "0123456789abcdef0123456789abcdef01234567"
    write_dataset(repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    code = """
from tsae.config.sections import DataConfig
from tsae.data.documents import read_documents
from tsae.runtime.errors import TsaeError
print([d.text for d in read_documents(DataConfig(source="org/small", subset="plain"))])
try:
    list(read_documents(DataConfig(source="org/other")))
except TsaeError as error:
    print(error)
"""
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    first, second = run.stdout.splitlines()
    assert first == "['one', 'two', 'three']"
    assert "org/other" in second
    assert "hf download org/other --repo-type dataset" in second
