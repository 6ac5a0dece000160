"""Labelled texts: which are taken, that they are harvested once, and that tokens, characters and codes belong together."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from tsae.checkpoint import RunFolder, load_dictionary
from tsae.config import run as configuration
from tsae.config.experiments import TextsConfig
from tsae.config.run import RunConfig
from tsae.data.labelled import LabelledText
from tsae.experiments.shared.subject import Subject
from tsae.experiments.shared.texts import draw_texts, harvest_dataset, harvest_texts, sample_texts, texts_read
from tsae.lm import model
from tsae.runtime.errors import TsaeError
from tsae.runtime.preemption import Preempted

TEXTS = [LabelledText(text, label, group) for group, (text, label) in enumerate([("kaba lodo mife", "a"), ("ru", "b")])]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty TSAE_HOME."""
    monkeypatch.setenv("TSAE_HOME", str(tmp_path))
    return tmp_path


@pytest.fixture
def config(run_config: RunConfig) -> RunConfig:
    texts = TextsConfig(count=30, context_length=24, min_characters=50)
    return configuration.replace(run_config, experiments={"texts": texts})


@pytest.fixture
def subject(config: RunConfig, checkpoints: Path) -> Subject:
    return Subject(config, RunFolder.of(checkpoints, "temporal"))


def rows(path: Path, sizes: dict[str, int]) -> str:
    """Texts of 60 characters, class after class."""
    texts = [
        {"text": f"{name} {index} ".ljust(60, "x"), "label": name}
        for name, size in sizes.items()
        for index in range(size)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in texts))
    return str(path)


def labels(texts: list[LabelledText]) -> dict[str, int]:
    names = [text.label for text in texts]
    return {name: names.count(name) for name in sorted(set(names))}


def test_classes_get_equal_shares_and_rare_ones_are_left_out(tmp_path):
    dataset = rows(tmp_path / "t.jsonl", {"a": 40, "b": 10, "c": 3})
    assert labels(draw_texts(dataset, TextsConfig(count=26, min_characters=50))) == {"a": 16, "b": 10}
    named = TextsConfig(count=30, min_characters=50, classes=("c", "a"))
    assert labels(draw_texts(dataset, named)) == {"a": 15, "c": 3}


def test_a_sample_has_the_datasets_shares_of_classes_whatever_its_order(tmp_path):
    dataset = rows(tmp_path / "t.jsonl", {"a": 300, "b": 90, "c": 9, "d": 1})
    found = sample_texts(dataset, TextsConfig(), 100, 50)
    assert found == sample_texts(dataset, TextsConfig(), 100, 50)
    assert len({text.text for text in found}) == 100
    assert [text.group for text in found] == sorted(text.group for text in found)
    assert 65 <= labels(found)["a"] <= 85
    assert 13 <= labels(found)["b"] <= 32
    assert labels(sample_texts(dataset, TextsConfig(), 4000, 50)) == {"a": 300, "b": 90, "c": 9, "d": 1}
    assert labels(sample_texts(dataset, TextsConfig(classes=("b", "d")), 4000, 50)) == {"b": 90, "d": 1}
    assert {len(text.text) for text in found} == {50}
    with pytest.raises(TsaeError, match=r"in class 'e'; .*classes found: a, b, c, d"):
        sample_texts(dataset, TextsConfig(classes=("e",)), 4000, 50)


@pytest.mark.parametrize("bos", ["never", "always"])
def test_the_ends_of_whole_texts_are_kept_without_bos(subject, config, checkpoints, bos):
    longer = LabelledText(" ".join(["kaba", "lodo", "mife", "senu"] * 4), "a", 2)
    subject = Subject(configuration.replace(config, data={"bos": bos}), RunFolder.of(checkpoints, "temporal"))
    texts = harvest_texts(subject, [*TEXTS, longer], 14, last=5)
    assert texts.lengths.tolist() == [3, 1, 5]
    assert texts.valid.sum(1).tolist() == [3, 1, 5]
    assert [texts.token(2, position) for position in range(5)] == ["lodo", "mife", "senu", "kaba", "lodo"]
    lm = subject.language_model
    for row, (text, first) in enumerate([(TEXTS[0], 0), (TEXTS[1], 0), (longer, 9)]):
        tokens = torch.tensor(lm.tokenizer(text.text, add_special_tokens=False)["input_ids"])[None, :14]
        expected = lm.read(tokens, torch.tensor([tokens.shape[1]]))[0, first:]
        torch.testing.assert_close(texts.read([row])[0, : len(expected)], expected.float(), rtol=1e-2, atol=1e-2)
        assert texts.tokens[row, : len(expected)].tolist() == tokens[0, first:].tolist()


def test_reading_ends_when_the_named_classes_have_their_shares(tmp_path):
    dataset = rows(tmp_path / "t.jsonl", {"a": 9, "b": 9})
    with open(dataset, "a") as stream:
        stream.write('{"text": 5, "label": "b"}\n')
    wanted = TextsConfig(count=8, min_characters=50, classes=("a", "b"))
    assert labels(draw_texts(dataset, wanted)) == {"a": 4, "b": 4}


def test_an_empty_class_is_named_with_those_found(tmp_path):
    dataset = rows(tmp_path / "t.jsonl", {"physics": 9, "logic": 9})
    with pytest.raises(TsaeError, match=r"class 'phisics'; .*'physics'.*classes found: logic, physics"):
        draw_texts(dataset, TextsConfig(min_characters=50, classes=("phisics",)))
    with pytest.raises(TsaeError, match=r"8 texts of 200 characters or more .*the longest text has 60"):
        draw_texts(dataset, TextsConfig())


def test_tokens_know_their_characters_and_the_first_is_left_out(subject):
    texts = harvest_texts(subject, TEXTS, 8)
    assert [texts.token(0, position) for position in range(3)] == ["kaba", "lodo", "mife"]
    assert texts.lengths.tolist() == [3, 1]
    assert texts.valid.sum(1).tolist() == [2, 0]
    assert texts.label_names == ("a", "b")


def test_groups_that_have_a_text_in_common_are_one_group_of_copies(subject):
    texts = [("kaba lodo mife", 0), ("ru se", 1), ("kaba  lodo mife\n", 2), ("ru se", 2), ("nu ba", 5), ("nu ba di", 6)]
    found = harvest_texts(subject, [LabelledText(text, "a", group) for text, group in texts], 8)
    assert found.group_of_copies.tolist() == [0, 0, 0, 0, 5, 6]
    cut = harvest_texts(subject, [LabelledText(text, "a", group) for text, group in texts], 2)
    assert cut.group_of_copies.tolist() == [0, 0, 0, 0, 5, 5]


def test_the_activations_are_those_of_the_language_model(subject):
    texts = harvest_texts(subject, TEXTS, 8)
    tokens = torch.tensor(subject.language_model.tokenizer("kaba lodo mife")["input_ids"])[None]
    expected = subject.language_model.read(tokens, torch.tensor([3]))
    torch.testing.assert_close(texts.read([1, 0])[1, :3], expected[0], rtol=1e-2, atol=1e-2)  # kept as bfloat16


def test_features_of_tokens_are_the_dictionarys_own_in_any_order(subject, config, checkpoints, labelled_text):
    texts = harvest_dataset(subject, str(labelled_text))
    random = np.random.default_rng(0)
    chosen, positions = random.integers(0, len(texts.texts), 90), random.integers(1, 20, 90)
    found = texts.features(subject, chosen, positions)
    dictionary, _ = load_dictionary(checkpoints / "temporal")
    x = texts.read(chosen)[torch.arange(90), torch.from_numpy(positions)]
    own = dictionary.encode(x) * dictionary.row_norms
    np.testing.assert_allclose(found.toarray(), own.numpy(), rtol=1e-5, atol=1e-6)
    assert found.nnz < 0.5 * 90 * dictionary.dict_size
    dense = Subject(config, RunFolder.of(checkpoints, "baseline_model"))
    np.testing.assert_array_equal(texts.features(dense, chosen, positions), x.numpy())


def test_texts_are_harvested_once_for_all_runs(subject, config, checkpoints, home, labelled_text):
    first = harvest_dataset(subject, str(labelled_text))
    other = Subject(config, RunFolder.of(checkpoints, "batch_topk"))
    again = harvest_dataset(other, str(labelled_text))
    assert again.store.path == first.store.path
    assert "language_model" not in other.__dict__, "the language model was loaded for activations that are kept"
    assert [path.name for path in (home / "stores").iterdir() if path.suffix != ".lock" and path.is_dir()] == [
        first.store.path.name
    ]


def test_a_harvest_that_was_stopped_continues(subject, labelled_text, monkeypatch):
    whole = harvest_dataset(subject, str(labelled_text))
    expected = whole.read(range(30))
    shutil.rmtree(whole.store.path)

    def stop(*_):
        raise Preempted

    with monkeypatch.context() as patched:
        patched.setattr(model, "begin_reading", stop)
        with pytest.raises(Preempted):
            harvest_dataset(subject, str(labelled_text))
    torch.testing.assert_close(harvest_dataset(subject, str(labelled_text)).read(range(30)), expected, rtol=0, atol=0)


def test_a_longer_context_than_the_model_has_is_refused(subject):
    with pytest.raises(TsaeError, match=r"experiments\.texts\.context_length: 100 is impossible; .* has 64 positions"):
        harvest_texts(subject, TEXTS, 100)


def test_a_text_without_tokens_and_a_synthetic_run_are_refused(subject, run_config, checkpoints):
    with pytest.raises(TsaeError, match="has no tokens"):
        harvest_texts(subject, [LabelledText(" ", "a", 0)], 8)
    synthetic = configuration.replace(run_config, data={"source": "synthetic"})
    with pytest.raises(TsaeError, match="synthetic world, without text"):
        harvest_texts(Subject(synthetic, RunFolder.of(checkpoints, "temporal")), TEXTS, 8)


def test_results_say_what_was_read(subject, labelled_text):
    read = texts_read(subject, harvest_dataset(subject, str(labelled_text)), "here")
    assert read["classes"] == {"east": 10, "north": 10, "south": 10}
    assert read["seen_in_training"] is None
