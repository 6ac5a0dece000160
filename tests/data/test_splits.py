"""Which files of a folder belong to a split: what `datasets.load_dataset` says, of whom the expectations are asked."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from tsae.config.sections import DataConfig
from tsae.data.documents import Document, fingerprint, fingerprint_before, read_documents
from tsae.runtime.errors import TsaeError


def write(root: Path, *names: str) -> Path:
    """Files with one row each, whose text is the file's name."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".parquet":
            pyarrow.parquet.write_table(pyarrow.table({"text": [name]}), path)
        elif path.suffix == ".csv":
            path.write_text(f"text\n{name}\n")
        else:
            path.write_text(json.dumps({"text": name}) + "\n")
    return root


def read(source: Path, split: str = "train", **more: str) -> list[str]:
    return [document.text for document in read_documents(DataConfig(source=str(source), split=split, **more))]


@pytest.mark.parametrize(
    "names",
    [
        ("train.jsonl", "test.jsonl"),
        ("train-a.jsonl", "train-b.jsonl", "validation.jsonl", "notes.jsonl"),
        ("x-train.csv", "x-test.csv"),
        ("my_dev_set.jsonl", "my_training_set.jsonl"),
        ("train/a.jsonl", "train/deeper/b.jsonl", "validation/c.jsonl"),
        ("all/a-train-1/x.jsonl", "all/eval/y.jsonl"),
        ("data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet", "data/held-00000-of-00001.parquet"),
        ("data/train.jsonl", "data/test.jsonl", "other.jsonl"),
        ("train/a.jsonl", "test.jsonl"),
        ("trainers.jsonl", "latest.jsonl", "a.jsonl"),
    ],
)
def test_a_folder_is_shared_out_as_load_dataset_shares_it(tmp_path, names):
    write(tmp_path / "texts", *names)
    expected = datasets.load_dataset(str(tmp_path / "texts"), cache_dir=str(tmp_path / "cache"))
    for split, rows in expected.items():
        assert sorted(read(tmp_path / "texts", split)) == sorted(rows["text"]), split
    with pytest.raises(TsaeError) as raised:
        read(tmp_path / "texts", "other")
    named = str(raised.value).partition("by the names of its files it has: ")[2]
    assert set(named.split(", ")) == set(expected)


def test_only_files_that_are_read_have_a_say(tmp_path):
    write(tmp_path, "train.jsonl", "test.jsonl")
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "curve.png").touch()
    (tmp_path / "test_loader.py").touch()
    assert read(tmp_path) == ["train.jsonl"]


def test_a_split_that_is_not_there_is_refused_with_those_that_are(tmp_path):
    write(tmp_path, "train.jsonl", "val.jsonl")
    with pytest.raises(TsaeError, match=r"there is no split 'validatio'; did you mean 'validation'\? .*: train, valid"):
        read(tmp_path, "validatio")
    with pytest.raises(TsaeError, match=r"there is no split 'train'; .*it has: validation"):
        read(write(tmp_path / "other", "val.jsonl"))


def test_a_file_that_is_named_is_read_whatever_its_name_says(tmp_path):
    path = write(tmp_path, "x-test.jsonl", "train.jsonl") / "x-test.jsonl"
    assert read(path) == read(path, "test") == ["x-test.jsonl"]
    with pytest.raises(TsaeError, match="there is no split 'validation'"):
        read(path, "validation")


def test_the_fingerprint_is_that_of_the_split_and_of_a_folder_without_splits_that_of_all(tmp_path):
    data = DataConfig(source=str(write(tmp_path / "a", "train.jsonl", "test.jsonl")))
    before = fingerprint(data)
    write(tmp_path / "a", "test-2.jsonl")
    assert fingerprint(data) == before
    write(tmp_path / "a", "train-2.jsonl")
    assert fingerprint(data) != before
    plain = DataConfig(source=str(write(tmp_path / "b", "one.jsonl", "deeper/two.jsonl")))
    assert fingerprint_before(plain) == "aa99c5f182cf"  # as version 3195aa1 computed it


def test_which_split_is_read_is_said_where_there_are_several(tmp_path, caplog):
    with caplog.at_level(logging.INFO, "tsae"):
        read(write(tmp_path, "train.jsonl", "test.jsonl"))
    assert "has splits: train, test; data.split: train is read" in caplog.text


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What save_to_disk makes of a DatasetDict (`both`), of one of its splits (`held`) and of a Dataset alone (`one`)."""
    folder = tmp_path_factory.mktemp("saved")
    features = datasets.Features({"text": datasets.Value("string"), "topic": datasets.ClassLabel(names=["a", "b"])})
    parts = {
        name: datasets.Dataset.from_dict(
            {"text": [f"{name} {i}" for i in range(5)], "topic": [0, 1, 1, -1, None]}, features, split=name
        )
        for name in ("train", "test")
    }
    datasets.DatasetDict(parts).save_to_disk(folder / "both", num_shards={"train": 2, "test": 1})
    parts["test"].save_to_disk(folder / "held")
    datasets.Dataset.from_dict({"text": ["alone"]}).save_to_disk(folder / "one")
    return folder


def test_a_folder_of_save_to_disk_is_read_by_split_with_the_names_of_its_classes(saved):
    labelled = read_documents(DataConfig(source=str(saved / "both"), label_field="topic"))
    assert list(labelled) == [Document(f"train {i}", label) for i, label in enumerate(["a", "b", "b", None, None])]
    assert read(saved / "both", "test") == [f"test {i}" for i in range(5)]
    assert read(saved / "one") == ["alone"]
    assert read(saved / "held", "test") == [f"test {i}" for i in range(5)]
    with pytest.raises(TsaeError, match=r"there is no split 'train'; .*it has: test"):
        read(saved / "held")


def test_a_damaged_folder_of_save_to_disk_is_one_line(tmp_path):
    (tmp_path / "state.json").write_text("{")
    with pytest.raises(TsaeError, match="a folder of save_to_disk that cannot be read"):
        read(tmp_path)
    (tmp_path / "state.json").write_text('{"_data_files": [{"filename": "data-0.arrow"}]}')
    with pytest.raises(TsaeError, match=r"data-0.arrow"):
        read(tmp_path)


@pytest.mark.parametrize("start", ["---\n", "---\r\n", "\n---\n"])
def test_a_card_decides_before_the_names(tmp_path, start):
    write(tmp_path, "test.jsonl", "part/train.jsonl", "part/b.jsonl")
    card = "configs:\n- config_name: default\n  data_files:\n  - split: train\n    path: part/*\n---\n"
    (tmp_path / "README.md").write_bytes((start + card).encode())
    assert sorted(read(tmp_path)) == ["part/b.jsonl", "part/train.jsonl"]
    with pytest.raises(TsaeError, match=r"test.*train"):
        read(tmp_path, "test")
