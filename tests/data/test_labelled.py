from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from tsae.data.labelled import LabelledText, ResponsePair, labelled_texts, response_pairs
from tsae.runtime.errors import TsaeError


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    """Rows as jsonl, csv or parquet, by the suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".csv":
        lines = [",".join(rows[0])] + [",".join(map(str, row.values())) for row in rows]
        path.write_text("\n".join(lines) + "\n")
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize(
    ("row", "text", "label"),
    [
        ({"question": "how?", "subject": "physics", "choices": ["a", "b"], "answer": 1}, "how?", "physics"),
        ({"text": "a trial", "domain": "law"}, "a trial", "law"),
        ({"content": "a trial", "domain": "law"}, "a trial", "law"),
        ({"text": "code", "meta": {"pile_set_name": "Github"}}, "code", "Github"),
        ({"text": "a poem", "title": "x", "topic": "letters"}, "a poem", "letters"),
    ],
)
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_the_columns_tell_the_schema_of_a_local_file(tmp_path, row, text, label, suffix):
    assert list(labelled_texts(write(tmp_path / f"a{suffix}", [row]))) == [LabelledText(text, label, 0)]


def test_a_folder_in_the_format_of_the_hub_is_read_by_its_card(tmp_path):
    write(tmp_path / "all" / "test-0.parquet", [{"question": "how?", "subject": "physics"}])
    write(tmp_path / "other" / "test-0.parquet", [{"question": "why?", "subject": "logic"}])
    configs = "".join(f"- config_name: {name}\n  data_files: {name}/test*.parquet\n" for name in ("all", "other"))
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    assert [text.label for text in labelled_texts(str(tmp_path), subset="other")] == ["logic"]
    with pytest.raises(TsaeError, match=r"all.*other"):
        list(labelled_texts(str(tmp_path)))


def test_a_local_folder_is_read_by_split_the_first_where_none_is_named(tmp_path):
    for split in ("test", "validation"):
        write(tmp_path / f"{split}.csv", [{"text": f"a {split}", "label": "x"}])
    (tmp_path / "test.csv").write_bytes(b"\xef\xbb\xbf" + (tmp_path / "test.csv").read_bytes())
    assert [text.text for text in labelled_texts(str(tmp_path))] == ["a validation"]
    assert [text.text for text in labelled_texts(str(tmp_path), split="test")] == ["a test"]
    with pytest.raises(TsaeError, match=r"there is no split 'train'; .*it has: validation, test"):
        list(labelled_texts(str(tmp_path), split="train"))


def test_a_dataset_of_save_to_disk_and_a_table_that_it_wrote_name_their_classes(tmp_path):
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["x", "y"])})
    dataset = datasets.Dataset.from_dict({"text": ["a", "b", "c"], "label": [1, 0, -1]}, features)
    datasets.DatasetDict(train=dataset).save_to_disk(tmp_path / "saved")
    dataset.to_parquet(tmp_path / "a.parquet")
    for place in ("saved", "a.parquet"):
        found = list(labelled_texts(str(tmp_path / place)))
        assert found == [LabelledText("a", "y", 0), LabelledText("b", "x", 1)]


def test_a_named_dataset_is_found_in_the_hub_cache_of_an_offline_machine(tmp_path, monkeypatch):
    from huggingface_hub import constants

    snapshot = tmp_path / "datasets--cais--mmlu" / "snapshots" / ("0" * 40)
    write(snapshot / "all" / "test-00000-of-00001.parquet", [{"question": "how?", "subject": "physics"}])
    (snapshot / "README.md").write_text(
        "---\nconfigs:\n- config_name: all\n  data_files:\n  - split: test\n    path: all/test-*\n---\n"
    )
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    for name in ("mmlu", "cais/MMLU"):
        assert list(labelled_texts(name)) == [LabelledText("how?", "physics", 0)]


def test_articles_get_the_category_of_their_title_and_reading_ends_with_the_last(tmp_path):
    rows = [{"id": str(i), "title": title, "text": f"about {title}"} for i, title in enumerate("ABCD")]
    # The row after the last article that is sought would fail to be read as text.
    articles = write(tmp_path / "wiki.jsonl", [*rows, {"id": "4", "title": "E", "text": 5}])
    table = write(tmp_path / "t.csv", [{"Article": "B", "Category": "People"}, {"Article": "D", "Category": "Science"}])
    found = list(labelled_texts(articles, categories=table))
    assert found == [LabelledText("about B", "People", 1), LabelledText("about D", "Science", 3)]
    with pytest.raises(TsaeError, match=r"experiments\.texts\.categories"):
        list(labelled_texts(articles))
    wrong = write(tmp_path / "w.csv", [{"Title": "B", "Category": "People"}])
    with pytest.raises(TsaeError, match="no column 'Article'; columns found: Title, Category"):
        list(labelled_texts(articles, categories=wrong))


def test_articles_of_the_table_that_are_not_there_are_named(tmp_path, caplog):
    articles = write(tmp_path / "wiki.jsonl", [{"title": "A", "text": "about A"}, {"title": "B", "text": "about B"}])
    table = write(tmp_path / "t.csv", [{"Article": "B", "Category": "People"}, {"Article": "Z", "Category": "Science"}])
    assert [text.label for text in labelled_texts(articles, categories=table)] == ["People"]
    assert "1 articles of the table are not there, such as 'Z'" in caplog.text


def test_both_sides_of_a_pair_are_one_group(tmp_path):
    pairs = write(tmp_path / "p.jsonl", [{"chosen": "yes", "rejected": "no"}, {"chosen": "oui", "rejected": "non"}])
    assert list(response_pairs(pairs, None))[1] == ResponsePair("oui", "non")
    assert [text.group for text in labelled_texts(pairs)] == [0, 0, 1, 1]
    assert [text.label for text in labelled_texts(pairs)] == ["chosen", "rejected"] * 2


def test_labels_that_are_class_indices_are_named(tmp_path):
    write(tmp_path / "a.jsonl", [{"text": "one", "label": 1}, {"text": "two", "label": 0}, {"text": " ", "label": 0}])
    (tmp_path / "README.md").write_text(
        "---\ndataset_info:\n  features:\n  - name: text\n    dtype: string\n  - name: label\n    dtype:\n"
        "      class_label:\n        names:\n          '0': physics\n          '1': letters\n---\n"
    )
    assert [text.label for text in labelled_texts(str(tmp_path))] == ["letters", "physics"]


def test_a_missing_column_is_named_with_those_found(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"txt": "one", "domain": "x"}])
    with pytest.raises(TsaeError, match=r"text or content with domain.*columns found: txt, domain"):
        list(labelled_texts(path))
    with pytest.raises(TsaeError, match=r"chosen and rejected.*columns found: txt, domain"):
        list(response_pairs(path, None))


@pytest.mark.parametrize("name", ["finewebb", "./nowhere.jsonl", "~nobody/a.jsonl"])
def test_what_is_not_there_is_refused_with_the_known_names(name):
    with pytest.raises(TsaeError, match="finefineweb, pile"):
        list(labelled_texts(name))


def test_a_file_of_another_kind_or_damaged_is_one_line(tmp_path, capfd):
    (tmp_path / "a.xml").write_text("<a/>")
    with pytest.raises(TsaeError, match="cannot be read"):
        list(labelled_texts(str(tmp_path / "a.xml")))
    for empty in ("a.json", "a.jsonl"):
        (tmp_path / empty).touch()
        with pytest.raises(TsaeError, match=rf"{empty}: holds no rows"):
            list(labelled_texts(str(tmp_path / empty)))
    (tmp_path / "a.txt").write_text("words")
    with pytest.raises(TsaeError, match=r"a\.txt: plain text has no columns"):
        list(labelled_texts(str(tmp_path / "a.txt")))
    (tmp_path / "odd.jsonl").write_text('{"text": "a", "label": "b"}\n\n[1]\n')
    with pytest.raises(TsaeError, match=r"odd\.jsonl: line 3: an object .* is expected"):
        list(labelled_texts(str(tmp_path / "odd.jsonl")))
    (tmp_path / "a.parquet").write_bytes(b"not parquet")
    with pytest.raises(TsaeError, match=r"a\.parquet"):
        list(labelled_texts(str(tmp_path / "a.parquet")))
    (tmp_path / "half.jsonl").write_text('{"text": "a", "domain": "b"}\n{"text": "a')
    with pytest.raises(TsaeError, match=r"half\.jsonl: line 2: not valid JSON"):
        list(labelled_texts(str(tmp_path / "half.jsonl")))
    assert capfd.readouterr() == ("", "")
