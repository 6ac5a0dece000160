from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import pytest

from tsae.config.sections import DataConfig
from tsae.data import embedded
from tsae.data.documents import fingerprint, read_documents
from tsae.runtime.errors import TsaeError


@pytest.fixture
def small_corpus(monkeypatch: pytest.MonkeyPatch, home: Path) -> Path:
    """Three topics only, from an empty cache; returns the folder of the cache."""
    monkeypatch.setattr(embedded, "PACKAGES", {"hub": ("huggingface_hub",), "storage": ("fsspec",)})
    monkeypatch.setattr(embedded, "STANDARD_LIBRARY", {"stdlib-system": "argparse pathlib logging"})
    monkeypatch.setattr(embedded, "TOPICS", ("hub", "storage", "stdlib-system"))
    return home / "corpus"


def test_the_corpus_is_the_same_read_afresh_and_from_the_cache(small_corpus):
    fresh = list(embedded.extract())
    first, again = (list(embedded.read_corpus()) for _ in range(2))
    assert fresh == first == again
    assert [path.name for path in small_corpus.iterdir()] == [f"{embedded.corpus_fingerprint()}.jsonl.zst"]


@pytest.mark.usefixtures("small_corpus")
def test_documents_are_labelled_prose_and_no_paragraph_comes_twice():
    documents = list(read_documents(DataConfig()))
    assert {document.label for document in documents} == {"hub", "storage", "stdlib-system"}
    paragraphs = [paragraph for document in documents for paragraph in document.text.split("\n\n")]
    assert len(set(paragraphs)) == len(paragraphs) > 500
    assert sum(map(len, paragraphs)) > 300_000
    assert all(" " in paragraph and "\n" not in paragraph for paragraph in paragraphs)
    assert max(len(document.text) for document in documents) < 1.1 * embedded.MAX_DOCUMENT


@pytest.mark.usefixtures("small_corpus")
def test_the_first_documents_are_of_all_topics():
    labels = [document.label for document in read_documents(DataConfig(max_documents=60))]
    assert min(labels.count(label) for label in ("hub", "storage")) >= 3


@pytest.mark.usefixtures("small_corpus")
def test_reading_stops_after_max_documents():
    assert list(read_documents(DataConfig(max_documents=3))) == list(itertools.islice(read_documents(DataConfig()), 3))


def test_a_damaged_cache_is_refused_with_the_remedy(small_corpus):
    list(embedded.read_corpus())
    (path,) = small_corpus.iterdir()
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(TsaeError, match=r"damaged; delete the file"):
        list(embedded.read_corpus())


def test_every_topic_has_files_here_and_the_largest_are_capped():
    sources = embedded._capped(embedded._sources())
    sizes = {
        topic: sum(source.size for source in group)
        for topic, group in itertools.groupby(sources, key=lambda source: source.topic)
    }
    assert set(sizes) == set(embedded.TOPICS)
    assert max(sizes.values()) <= embedded.MAX_SOURCE
    assert not [source.name for source in sources if "/tests/" in source.name]


def test_the_fingerprint_follows_the_versions_of_packages(monkeypatch):
    before = fingerprint(DataConfig())
    assert before == fingerprint(DataConfig(max_documents=3))
    monkeypatch.setattr(embedded, "_version", lambda _: "0")
    assert before != fingerprint(DataConfig())


def test_the_fingerprint_needs_no_heavy_import():
    code = """
import sys
from tsae.config.sections import DataConfig
from tsae.data.documents import fingerprint
assert fingerprint(DataConfig())
print(sorted({"torch", "transformers", "datasets", "pyarrow", "numpy", "zarr"} & set(sys.modules)))
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
