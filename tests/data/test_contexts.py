from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest

from tsae.config.sections import DataConfig
from tsae.data import contexts as cutting
from tsae.data.contexts import Contexts
from tsae.data.documents import Document
from tsae.runtime.errors import TsaeError

PACKINGS = ("split", "truncate", "concat")


def corpus(count: int = 40, seed: int = 0) -> list[Document]:
    """Documents of 1 to 60 words, labelled a, b or not at all."""
    random = np.random.default_rng(seed)
    words = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog"]
    return [
        Document(" ".join(random.choice(words, random.integers(1, 60))), (None, "b", "a")[index % 3])
        for index in range(count)
    ]


def settings(**changes: object) -> DataConfig:
    return DataConfig(**{"context_length": 16, "min_length": 4, "holdout": 0.25, "source": "texts.jsonl", **changes})  # type: ignore[arg-type]


def make_contexts(documents: Iterable[Document], tokenizer: object, data: DataConfig) -> Contexts:
    """Contexts in memory."""
    with tempfile.TemporaryDirectory() as folder:
        made = cutting.make_contexts(documents, tokenizer, data, Path(folder))
        return made._replace(tokens=made.tokens[:], document=made.document[:])


def text_tokens(contexts: Contexts, row: int) -> list[int]:
    return contexts.tokens[row][contexts.document[row] >= 0].tolist()


@pytest.mark.parametrize("bos", ["never", "always"])
@pytest.mark.parametrize("packing", PACKINGS)
def test_every_position_holds_the_token_of_its_document(make_tokenizer, packing, bos):
    tokenizer, documents = make_tokenizer(), corpus()
    contexts = make_contexts(documents, tokenizer, settings(packing=packing, bos=bos))
    ids = [tokenizer(document.text, add_special_tokens=False)["input_ids"] for document in documents]
    for row in range(len(contexts.tokens)):
        for index in set(contexts.document[row].tolist()) - {-1}:
            part = contexts.tokens[row][contexts.document[row] == index].tolist()
            starts = range(len(ids[index]) - len(part) + 1)
            assert any(ids[index][start : start + len(part)] == part for start in starts)


@pytest.mark.parametrize("packing", PACKINGS)
def test_held_out_rows_share_no_document_with_training_rows(make_tokenizer, packing):
    contexts = make_contexts(corpus(), make_tokenizer(), settings(packing=packing))
    cut = len(contexts.tokens) - contexts.heldout
    training, heldout = (set(part.ravel().tolist()) - {-1} for part in np.split(contexts.document, [cut]))
    assert training
    assert heldout
    assert not training & heldout


def test_the_share_of_documents_held_out_is_the_one_asked_for(make_tokenizer):
    documents = [Document(f"{index} brown foxes", None) for index in range(200)]
    contexts = make_contexts(documents, make_tokenizer(), settings(min_length=1, holdout=0.1))
    assert len(np.unique(contexts.document[len(contexts.tokens) - contexts.heldout :])) - 1 == 20


def sides(documents: list[Document], tokenizer: object, **changes: object) -> tuple[set[str], set[str]]:
    """The texts of the training and of the held-out rows, blanks apart."""
    contexts = make_contexts(documents, tokenizer, settings(**changes))
    cut = len(contexts.tokens) - contexts.heldout
    first, second = (
        {" ".join(documents[index].text.split()) for index in set(part.ravel().tolist()) - {-1}}
        for part in np.split(contexts.document, [cut])
    )
    return first, second


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("seed", range(4))
def test_copies_of_a_text_are_on_one_side_however_many_and_whatever_their_blanks(make_tokenizer, packing, seed):
    once = corpus(24, seed=7)
    copies = [document._replace(text=document.text.replace(" ", "\n", 1) + " \n") for document in once]
    training, heldout = sides(once + copies * 3, make_tokenizer(), packing=packing, seed=seed, min_length=1)
    assert not training & heldout
    assert (len(training), len(heldout)) == (18, 6)


def test_a_text_that_fills_most_of_a_source_leaves_both_sides_a_document(make_tokenizer):
    documents = [Document("the quick brown fox jumps over", None)] * 30 + [
        Document("a lazy dog over a brown fox", None)
    ]
    for seed in range(6):
        training, heldout = sides(documents, make_tokenizer(), seed=seed)
        assert len(training) == len(heldout) == 1


def test_which_texts_are_held_out_follows_from_them_and_the_seed_and_not_from_their_order(make_tokenizer):
    documents = corpus(60)
    first, backwards, other = (
        sides(texts, make_tokenizer(), seed=seed, min_length=1)[1]
        for texts, seed in ((documents, 0), (documents[::-1], 0), (documents, 1))
    )
    assert first == backwards != other


def test_split_keeps_every_token_once_and_never_crosses_a_document(make_tokenizer):
    tokenizer, documents = make_tokenizer(), corpus()
    contexts = make_contexts(documents, tokenizer, settings(min_length=1, bos="never"))
    kept = sorted(token for row in range(len(contexts.tokens)) for token in text_tokens(contexts, row))
    assert kept == sorted(
        token for document in documents for token in tokenizer(document.text, add_special_tokens=False)["input_ids"]
    )
    assert all(len(set(row[row >= 0].tolist())) == 1 for row in contexts.document)


def test_truncate_keeps_the_beginning_of_each_document_that_is_long_enough(make_tokenizer):
    tokenizer, documents = make_tokenizer(), corpus()
    contexts = make_contexts(documents, tokenizer, settings(packing="truncate", bos="always"))
    found = {int(contexts.document[row].max()): text_tokens(contexts, row) for row in range(len(contexts.tokens))}
    ids = [tokenizer(document.text, add_special_tokens=False)["input_ids"] for document in documents]
    assert found == {index: row[:15] for index, row in enumerate(ids) if len(row) + 1 >= 4}
    assert len(found) == len(contexts.tokens)


def test_concat_leaves_no_padding_but_in_the_last_row_of_each_part_and_separates_with_eos(make_tokenizer):
    tokenizer = make_tokenizer()
    contexts = make_contexts(corpus(), tokenizer, settings(packing="concat", bos="never"))
    assert (contexts.lengths < 16).sum() <= 2
    within = np.arange(16) < contexts.lengths[:, None]
    assert ((contexts.tokens == tokenizer.eos_token_id) == (contexts.document == -1))[within].all()
    ends = contexts.document[:, :-1] != contexts.document[:, 1:]
    assert (ends <= ((contexts.document[:, :-1] == -1) | (contexts.document[:, 1:] == -1))).all()


@pytest.mark.parametrize("packing", PACKINGS)
def test_rows_are_right_padded_and_lengths_count_bos(make_tokenizer, packing):
    tokenizer = make_tokenizer(pad="<pad>")
    contexts = make_contexts(corpus(), tokenizer, settings(packing=packing, bos="always"))
    within = np.arange(16) < contexts.lengths[:, None]
    assert (contexts.tokens[~within] == tokenizer.pad_token_id).all()
    assert (contexts.document[~within] == -1).all()
    assert (contexts.tokens[:, 0] == tokenizer.bos_token_id).all()
    assert (contexts.document[:, 0] == -1).all()
    assert (contexts.lengths >= 4).all()
    assert contexts.tokens.dtype == contexts.lengths.dtype == contexts.document.dtype == np.int32


@pytest.mark.parametrize(("adds_bos", "expected"), [(True, 1), (False, 0)])
def test_bos_auto_does_what_the_tokenizer_does(make_tokenizer, adds_bos, expected):
    tokenizer = make_tokenizer(adds_bos=adds_bos)
    contexts = make_contexts(corpus(), tokenizer, settings())
    assert (contexts.tokens == tokenizer.bos_token_id).sum(axis=1).tolist() == [expected] * len(contexts.tokens)


def test_text_that_spells_a_special_token_stays_text(make_tokenizer):
    tokenizer = make_tokenizer(adds_bos=True)
    documents = [Document("the fox <|endoftext|> jumps over <bos> the dog " * count, None) for count in (2, 3)]
    contexts = make_contexts(documents, tokenizer, settings(context_length=256))
    assert not np.isin(contexts.tokens[:, 1:][contexts.document[:, 1:] >= 0], tokenizer.all_special_ids).any()


def test_order_and_held_out_choice_follow_from_the_seed_alone(make_tokenizer):
    first, again, other = (make_contexts(corpus(), make_tokenizer(), settings(seed=seed)) for seed in (0, 0, 1))
    assert first.fingerprint == again.fingerprint != other.fingerprint
    assert (first.document == again.document).all()
    rows = first.document.max(axis=1)[: len(first.tokens) - first.heldout]
    assert (np.diff(rows) < 0).mean() > 0.3  # not in reading order


def test_max_tokens_is_a_random_sample_of_whole_contexts_of_both_parts(make_tokenizer):
    everything = make_contexts(corpus(400), make_tokenizer(), settings())
    limited = make_contexts(corpus(400), make_tokenizer(), settings(max_tokens=2000))
    assert 2000 <= limited.lengths.sum() < 2000 + 2 * 16
    assert limited.lengths[-limited.heldout :].sum() == pytest.approx(500, abs=16)
    assert limited.document.max() > 350  # from all over the source
    cut = len(limited.tokens) - limited.heldout
    assert (limited.tokens[:cut] == everything.tokens[:cut]).all()


@pytest.mark.parametrize("packing", PACKINGS)
def test_a_streamed_source_is_read_only_until_there_is_enough(make_tokenizer, monkeypatch, packing):
    monkeypatch.setattr("tsae.data.tokenized.BATCH_CHARACTERS", 1000)
    read = []

    def endless():
        for index in range(10_000):
            read.append(index)
            yield corpus(1, seed=index)[0]

    data = settings(source="org/huge", max_tokens=3000, packing=packing, bos="never")
    contexts = make_contexts(endless(), make_tokenizer(), data)
    assert 0.9 * 3000 < contexts.lengths.sum() <= 3000 + 2 * 16
    assert len(read) < 1000


def test_labels_are_numbered_per_document(make_tokenizer):
    documents = corpus()
    contexts = make_contexts(documents, make_tokenizer(), settings())
    assert contexts.label_names == ("a", "b")
    names = [None if label < 0 else contexts.label_names[label] for label in contexts.label]
    assert names == [document.label for document in documents]


@pytest.mark.parametrize(
    ("documents", "changes", "message"),
    [
        (
            [Document("fox", None)] * 5,
            {},
            "at least 2 different documents must give a context of 4 tokens or more, .*; 0 do",
        ),
        ([Document("the quick brown fox jumps", None)] * 3, {}, "1 do: 3 documents were read"),
        (
            [Document("quick fox", None), Document("lazy dog", None)],
            {"packing": "concat", "min_length": 16, "context_length": 16},
            "no .* context of 16 tokens is left",
        ),
    ],
)
def test_too_little_text_is_refused_with_the_counts(make_tokenizer, documents, changes, message):
    with pytest.raises(TsaeError, match=message):
        make_contexts(documents, make_tokenizer(), settings(**changes))


def test_a_tokenizer_without_the_token_that_is_needed_is_refused(make_tokenizer):
    with pytest.raises(TsaeError, match=r"data\.bos"):
        make_contexts(corpus(), make_tokenizer(bos_token=None), settings(bos="always"))
    with pytest.raises(TsaeError, match=r"data\.packing"):
        make_contexts(corpus(), make_tokenizer(eos_token=None), settings(packing="concat"))
