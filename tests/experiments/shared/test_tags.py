"""Tags of whole texts on tokens: by a real spaCy pipeline, by surface form, by the user's own function."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.experiments.shared.tagged_sentences import train_pipeline
from tsae.data.labelled import LabelledText
from tsae.experiments.shared.tags import MARGIN, find_tagger, last_tags, tags_of
from tsae.runtime.errors import TsaeError

KEY = "experiments.probe.tagger"
TEXT = "The old captain sings in a garden."
PIECES = ["The", " o", "ld", " captain", " sings", " in", " a", " garden", "."]
"""Tokens as a byte-level tokenizer cuts them: with the blank before, and words in parts."""


def offsets_of(pieces: list[str]) -> np.ndarray:
    """[1, L, 2], with a padding position at the end."""
    ends = np.cumsum([len(piece) for piece in pieces])
    return np.array([[*zip(ends - [len(piece) for piece in pieces], ends, strict=True), (0, 0)]], np.int32)


def tags(text: str, pieces: list[str], wanted: str, dataset: str = "embedded") -> list[str | None]:
    found = tags_of((LabelledText(text, "x", 0),), offsets_of(pieces), find_tagger(wanted, dataset, KEY))
    return [found.names[tag] if tag >= 0 else None for tag in found.of_token[0]]


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("spacy", reason="the extra pos is not installed")
    return train_pipeline(tmp_path_factory.mktemp("spacy") / "pipeline")


def test_parts_of_speech_come_from_the_sentence_and_reach_every_part_of_a_word(pipeline):
    found = tags(TEXT, PIECES, f"spacy:{pipeline}")
    assert found == ["DET", "ADJ", "ADJ", "NOUN", "VERB", "ADP", "DET", "NOUN", "PUNCT", None]


def test_the_tag_of_a_string_is_that_of_its_last_word_and_blanks_have_one(pipeline):
    tagger = find_tagger(f"spacy:{pipeline}", "embedded", KEY)
    assert last_tags(["The old captain", "The garden.", "captain\n", "\n", " "], tagger) == [
        *("NOUN", "PUNCT", "SPACE", "SPACE", "SPACE"),
    ]
    # Blanks are no class of tokens in their text.
    assert tags(TEXT[:8] + "\n\n", [*PIECES[:3], "\n\n"], f"spacy:{pipeline}") == ["DET", "ADJ", "ADJ", None, None]
    assert last_tags(["a garden", "the", " ", ""], find_tagger("surface", "embedded", KEY)) == [
        *("other word", "determiner", "SPACE", "SPACE"),
    ]


def test_an_installed_pipeline_is_found_without_being_named(pipeline, tmp_path):
    package = tmp_path / "en_written_for_the_test"
    package.mkdir()
    (package / "__init__.py").write_text(
        f"import spacy\ndef load(**options):\n    return spacy.load({str(pipeline)!r}, **options)\n"
    )
    about = tmp_path / "en_written_for_the_test-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: en_written_for_the_test\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[spacy_models]\nen_written_for_the_test = en_written_for_the_test\n")
    # spaCy looks for pipelines once a process, so another one has to find it.
    script = (
        "from tsae.experiments.shared.tags import find_tagger\n"
        "for dataset in ('embedded', 'mmlu'):\n"
        f"    tagger = find_tagger('auto', dataset, 'tagger'); print(tagger.name, next(tagger.spans([{TEXT!r}]))[2])\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    ended = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=100)
    expected = "parts of speech by spaCy en_written_for_the_test 0.0.0 (8, 15, 'NOUN')"
    assert ended.stdout.splitlines() == [expected, expected], ended.stderr


def pipelines() -> list[str]:
    """What this machine has of spaCy."""
    try:
        from spacy.util import get_installed_models
    except ImportError:
        return []
    return list(get_installed_models())


@pytest.mark.skipif(bool(pipelines()), reason="a spaCy pipeline is installed")
@pytest.mark.parametrize("wanted", ["auto", "spacy", "spacy:en_nowhere"])
def test_without_a_pipeline_the_error_names_the_install_command(wanted):
    with pytest.raises(TsaeError, match=r"pip install 'tsae\[pos\]' && python -m spacy download en_core_web_sm"):
        find_tagger(wanted, "mmlu", KEY)


def test_without_spacy_the_error_names_the_install_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "spacy", None)
    with pytest.raises(TsaeError, match=r"spaCy is not installed; install one: pip install 'tsae\[pos\]'"):
        find_tagger("spacy", "embedded", KEY)


@pytest.mark.skipif(bool(pipelines()), reason="a spaCy pipeline is installed")
def test_the_embedded_corpus_does_without_a_pipeline_and_says_so(capsys):
    tagger = find_tagger("auto", "embedded", KEY)
    assert tagger.name == "word classes by surface form"
    assert "no spaCy pipeline is installed" in capsys.readouterr().err


def test_surface_classes_are_told_by_letters_alone():
    text = "The 2 old Captains' hats, don’t sing in_it"
    pieces = ["The", " 2", " old", " Captains", "'", " hats", ",", " don’t", " sing", " in", "_", "it"]
    assert tags(text, pieces, "surface") == [
        *("determiner", "number", "other word", "capitalised word", "punctuation", "other word", "punctuation"),
        *("other word", "other word", "preposition", "punctuation", "pronoun", None),
    ]


def test_a_function_of_the_users_own_gives_the_tags(tmp_path, monkeypatch):
    (tmp_path / "my_tagger.py").write_text("def tag(text):\n    yield 4, 7, 'adjective'\n    yield 33, 34, 'end'\n")
    (tmp_path / "far_tagger.py").write_text("def tag(text):\n    yield 0, 99, 'far'\n")
    (tmp_path / "no_tagger.py").write_text("def tag(text):\n    return []\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    found = tags(TEXT, PIECES, "my_tagger:tag")
    assert found == [None, "adjective", "adjective", None, None, None, None, None, "end", None]
    with pytest.raises(TsaeError, match="characters 0 to 99 of a text of 34"):
        tags(TEXT, PIECES, "far_tagger:tag")
    with pytest.raises(TsaeError, match="gives no tag to any of 1 texts"):
        tags(TEXT, PIECES, "no_tagger:tag")
    for wrong in ("my_tagger:tags", "nowhere:tag", "spcy"):
        with pytest.raises(TsaeError, match=r"neither auto, spacy, spacy:PIPELINE, surface nor a module:function"):
            find_tagger(wrong, "embedded", KEY)


def test_a_tagger_sees_the_text_before_and_well_behind_the_tokens(tmp_path, monkeypatch):
    (tmp_path / "long_tagger.py").write_text("def tag(text):\n    yield 0, 3, str(len(text))\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert tags(TEXT + " and" * 1000, PIECES, "long_tagger:tag")[0] == str(len(TEXT) + MARGIN)


def test_two_tags_on_one_token_are_settled_by_the_number_of_characters(tmp_path, monkeypatch):
    (tmp_path / "odd_tagger.py").write_text("def tag(text):\n    yield 0, 1, 'a'\n    yield 1, 3, 'b'\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert tags(TEXT, PIECES, "odd_tagger:tag")[0] == "b"


def test_a_tag_on_a_blank_reaches_no_token(tmp_path, monkeypatch):
    (tmp_path / "blank_tagger.py").write_text("def tag(text):\n    yield 0, 3, 'word'\n    yield 3, 4, 'blank'\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert tags(TEXT, PIECES, "blank_tagger:tag")[:3] == ["word", None, None]
