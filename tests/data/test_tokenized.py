"""The ids of a text are the same however often their making was broken off."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.data.test_contexts import corpus, make_contexts, settings
from tsae.data import tokenized
from tsae.data.contexts import make_contexts as make_on_disk
from tsae.data.documents import Document
from tsae.data.tokenized import tokenize
from tsae.runtime.errors import TsaeError

DIGESTS = {
    ("split", "always", None): "354fda65f40c",
    ("split", "always", 3000): "922712822a65",
    ("split", "never", None): "56fda7033d9c",
    ("split", "never", 3000): "fb167284e460",
    ("truncate", "always", None): "e0bc883ac42c",
    ("truncate", "always", 3000): "f2933ccd4bf2",
    ("truncate", "never", None): "0a621e31864e",
    ("truncate", "never", 3000): "c01614d545cb",
    ("concat", "always", None): "3847d7399b1f",
    ("concat", "always", 3000): "ea715b4be442",
    ("concat", "never", None): "daffa7f7bfda",
    ("concat", "never", 3000): "9b2d00eb0d3f",
}
"""Of contexts as they were when all of a text was in memory (version 7236849)."""


class Killed(Exception):
    """The process is gone."""


def dying(documents: list[Document], after: int) -> Iterator[Document]:
    yield from documents[:after]
    raise Killed


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenized, "BATCH_CHARACTERS", 300)
    monkeypatch.setattr(tokenized, "SAVED_EVERY", 100)


@pytest.mark.usefixtures("often")
def test_a_text_whose_reading_is_killed_again_and_again_has_the_same_ids(make_tokenizer, tmp_path: Path) -> None:
    documents, counts = corpus(120), []

    def counting(texts: list[str], **options: object) -> object:
        counts.append(len(texts))
        return tokenizer(texts, **options)

    tokenizer = make_tokenizer()
    for after in (5, 31, 31, 60, 119):
        with pytest.raises(Killed):
            tokenize(dying(documents, after), counting, tmp_path / "killed")
    killed = tokenize(documents, counting, tmp_path / "killed")
    whole = tokenize(documents, tokenizer, tmp_path / "whole")
    for name in ("tokens", "documents"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    for found, expected in zip(killed[1:], whole[1:], strict=True):
        np.testing.assert_array_equal(found, expected)
    ids = [tokenizer(document.text, add_special_tokens=False)["input_ids"] for document in documents]
    assert whole.tokens[:].tolist() == [each for row in ids for each in row]
    assert whole.sizes.tolist() == [len(row) for row in ids]
    assert sum(counts) < 150  # of 120 documents, and 246 that were read before a kill
    counts.clear()
    tokenize(iter([]), counting, tmp_path / "killed")  # all is there: the text is not asked for
    assert not counts


@pytest.mark.usefixtures("often")
def test_ids_end_where_there_is_enough_also_after_a_kill(make_tokenizer, tmp_path: Path) -> None:
    documents = corpus(120)
    with pytest.raises(Killed):
        tokenize(dying(documents, 40), make_tokenizer(), tmp_path / "killed", 2000)
    killed, whole = (tokenize(documents, make_tokenizer(), tmp_path / name, 2000) for name in ("killed", "whole"))
    np.testing.assert_array_equal(killed.tokens[:], whole.tokens[:])
    assert 2000 <= len(whole.tokens) < 2200


@pytest.mark.usefixtures("often")
@pytest.mark.parametrize("changed", ["another", "fewer"])
def test_a_text_that_changed_meanwhile_is_not_mixed(make_tokenizer, tmp_path: Path, changed: str) -> None:
    documents = corpus(60)
    with pytest.raises(Killed):
        tokenize(dying(documents, 50), make_tokenizer(), tmp_path)
    now = {"another": corpus(60, seed=1), "fewer": documents[:10]}[changed]
    with pytest.raises(TsaeError, match="is not the one that was read when this text was begun to be tokenised"):
        tokenize(now, make_tokenizer(), tmp_path)


@pytest.mark.usefixtures("often")
@pytest.mark.parametrize("name", ["tokens", "documents"])
@pytest.mark.parametrize("cut", [True, False])
def test_damaged_files_are_made_anew(make_tokenizer, tmp_path: Path, caplog, name: str, cut: bool) -> None:
    documents = corpus(60)
    with pytest.raises(Killed):
        tokenize(dying(documents, 50), make_tokenizer(), tmp_path / "hurt")
    data = bytearray((tmp_path / "hurt" / name).read_bytes())
    data[40] ^= 1
    (tmp_path / "hurt" / name).write_bytes(data[:100] if cut else data)
    again, whole = (tokenize(documents, make_tokenizer(), tmp_path / folder) for folder in ("hurt", "whole"))
    assert caplog.messages == [f"{tmp_path / 'hurt'}: damaged; the text is tokenised anew"]
    np.testing.assert_array_equal(again.tokens[:], whole.tokens[:])
    np.testing.assert_array_equal(again.sizes, whole.sizes)


@pytest.mark.parametrize("packing", ["split", "truncate", "concat"])
@pytest.mark.parametrize("bos", ["always", "never"])
@pytest.mark.parametrize("max_tokens", [None, 3000])
def test_contexts_are_those_of_a_text_in_memory(make_tokenizer, packing: str, bos: str, max_tokens: int | None) -> None:
    data = settings(packing=packing, bos=bos, max_tokens=max_tokens, seed=3, holdout=0.2)
    made = make_contexts(corpus(400, seed=7), make_tokenizer(), data)
    hasher = hashlib.sha256()
    for array in (made.tokens, made.lengths, made.document, made.label):
        hasher.update(f"{array.dtype}{array.shape}".encode() + np.ascontiguousarray(array).tobytes())
    assert hasher.hexdigest()[:12] == DIGESTS[packing, bos, max_tokens]


@pytest.mark.parametrize("packing", ["split", "concat"])
def test_rows_are_the_same_in_whatever_order_they_are_asked_for(make_tokenizer, tmp_path: Path, packing: str) -> None:
    made = make_on_disk(corpus(), make_tokenizer(), settings(packing=packing), tmp_path)
    for cells in (made.tokens, made.document):
        whole, order = cells[:], np.random.default_rng(0).permutation(len(cells))
        np.testing.assert_array_equal(cells[order], whole[order])
        np.testing.assert_array_equal(np.concatenate([cells[i : i + 3] for i in range(0, len(cells), 3)]), whole)
