"""Syntactic classes of tokens: the whole text is tagged, and the tags are brought to tokens by their characters.

A tagger is named in the settings:

    spacy, spacy:PIPELINE   part-of-speech tags (universal) of an installed spaCy pipeline
    surface                 word classes by surface form alone, no part of speech: see `surface_spans`
    module:function         anything that gives for a text an iterable of (first character, end, tag)
    auto                    spaCy; without a pipeline, `surface` for the embedded corpus alone
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from tsae.data.labelled import EMBEDDED, LabelledText
from tsae.runtime.errors import TsaeError
from tsae.runtime.preemption import polled
from tsae.runtime.progress import Progress

if TYPE_CHECKING:
    from spacy.language import Language

PREFERRED = ("en_core_web_sm", "en_core_web_md", "en_core_web_lg", "en_core_web_trf")
INSTALL = "pip install 'tsae[pos]' && python -m spacy download en_core_web_sm"

BLANK = "SPACE"
MARGIN = 500
"""Characters behind the last token that was read which a tagger sees as well; what comes later does not change tags."""

Spans = Iterable[tuple[int, int, str]]
"""(first character, end, tag) of the words of a text."""


class Tags(NamedTuple):
    """A class for each token, and who gave it."""

    of_token: np.ndarray
    """[S, L] int32: index into `names`; -1 where a token has none."""
    names: tuple[str, ...]
    tagger: str
    """What the classes are, in words for a figure."""


class Tagger(NamedTuple):
    """Spans of texts, and what they are."""

    name: str
    spans: Callable[[list[str]], Iterator[Spans]]


SURFACE = {
    "determiner": "a an the this these those each every some any no all both another such",
    "pronoun": """i you he she it we they me him her us them my your his its our their mine yours who whom whose which what
        itself themselves yourself one""",
    "preposition": """of in to for with on at from by about as into like through after over between out against during
        without before under around among within along across behind beyond than per via upon""",
    "conjunction": "and or but if because while whereas although though unless whether when where since so that",
    "auxiliary": """is are was were be been being am has have had having do does did will would can could shall should may
        might must cannot not n't""",
}
"""Closed classes of English; a word in several stands where it is most often found."""

_CLASS_OF = {word: name for name, words in SURFACE.items() for word in words.split()}
_WORD = re.compile(r"[A-Za-z]+(?:['’][A-Za-z]+)?|\d+(?:[.,]\d+)*|[^\sA-Za-z\d]+")


def tags_of(texts: tuple[LabelledText, ...], offsets: np.ndarray, tagger: Tagger) -> Tags:
    """The tag of each token of S texts by its characters `offsets` [S, L, 2].

    A token takes the tag of the span that covers most of its characters, blanks aside. Raises TsaeError for spans
    that do not lie in their text and if no token gets a tag.
    """
    of_token = np.full(offsets.shape[:2], -1, np.int32)
    numbers: dict[str, int] = {}
    progress = Progress(f"tagging ({tagger.name})", len(texts), "texts")
    ends = offsets[..., 1].max(1) + MARGIN
    strings = [text.text[:end] for text, end in zip(texts, ends, strict=True)]
    for row, (text, spans) in enumerate(zip(strings, polled(tagger.spans(strings)), strict=True)):
        owner = _owners(text, spans, numbers, tagger.name)
        for position, (first, end) in enumerate(offsets[row]):
            if end > first:
                covering = owner[first:end]
                covering = covering[covering >= 0]
                if len(covering):
                    of_token[row, position] = np.bincount(covering).argmax()
        progress.update(row + 1)
    if not numbers:
        raise TsaeError(f"tagger: {tagger.name} gives no tag to any of {len(texts)} texts")
    return _sorted(of_token, numbers, tagger.name)


def last_tags(strings: list[str], tagger: Tagger) -> list[str]:
    """The tag of the last word of each string; `SPACE` where it has none, as spaCy calls what is blank."""
    progress, found = Progress(f"tagging ({tagger.name})", len(strings), "tokens"), []
    for spans in polled(tagger.spans(strings)):
        *_, (_, _, tag) = [(0, 0, BLANK), *spans]
        found.append(str(tag))
        progress.update(len(found))
    return found


def _owners(text: str, spans: Spans, numbers: dict[str, int], name: str) -> np.ndarray:
    """For each character of a text the number of its tag, -1 for blanks and where there is none."""
    owner = np.full(len(text), -1, np.int32)
    for first, end, tag in spans:
        if not 0 <= first < end <= len(text):
            raise TsaeError(f"tagger: {name} gives characters {first} to {end} of a text of {len(text)}")
        if text[first:end].isspace():
            continue
        owner[first:end] = numbers.setdefault(str(tag), len(numbers))
    owner[[character.isspace() for character in text]] = -1
    return owner


def _sorted(of_token: np.ndarray, numbers: dict[str, int], tagger: str) -> Tags:
    """Tags numbered in the order of their names, so that they do not depend on which came first."""
    names = tuple(sorted(numbers))
    renumber = np.full(len(numbers) + 1, -1, np.int32)
    for new, name in enumerate(names):
        renumber[numbers[name]] = new
    return Tags(renumber[of_token], names, tagger)


def find_tagger(wanted: str, dataset: str, key: str) -> Tagger:
    """The tagger that the setting `key` names. Raises TsaeError if it is not here, with how to get it."""
    if wanted == "surface":
        return Tagger("word classes by surface form", lambda texts: map(surface_spans, texts))
    if wanted == "auto" and dataset == EMBEDDED and not _pipelines():
        print(
            "syntax: no spaCy pipeline is installed, so words are classed by their surface form; "
            f"for parts of speech: {INSTALL}",
            file=sys.stderr,
        )
        return find_tagger("surface", dataset, key)
    if wanted == "auto" or wanted.partition(":")[0] == "spacy":
        return _spacy(wanted.partition(":")[2], key)
    return _function(wanted, key)


def _pipelines() -> list[str]:
    """The spaCy pipelines that are installed, the usual English ones first."""
    try:
        from spacy.util import get_installed_models
    except ImportError:
        return []
    return sorted(get_installed_models(), key=lambda name: (name not in PREFERRED, name))


def _spacy(name: str, key: str) -> Tagger:
    remedy = f"install one: {INSTALL}; or set {key}=surface (classes by surface form) or {key}=module:function"
    try:
        import spacy
    except ImportError:
        raise TsaeError(f"{key}: spaCy is not installed; {remedy}") from None
    found = _pipelines()
    if not name and not found:
        raise TsaeError(f"{key}: no spaCy pipeline is installed; {remedy}")
    name = name or found[0]
    try:
        # Parts of speech need none of these, which take most of the time.
        pipeline = spacy.load(name, exclude=["ner", "lemmatizer", "parser", "senter"])
    except OSError:
        raise TsaeError(
            f"{key}: there is no spaCy pipeline '{name}' (installed: {', '.join(found) or 'none'}); {remedy}"
        ) from None
    version = pipeline.meta.get("version", "")
    return Tagger(f"parts of speech by spaCy {name} {version}".rstrip(), lambda texts: _spacy_spans(pipeline, texts))


def _spacy_spans(pipeline: Language, texts: list[str]) -> Iterator[Spans]:
    for document in pipeline.pipe(texts, batch_size=32):
        if not document.has_annotation("POS"):
            raise TsaeError(f"tagger: the spaCy pipeline {pipeline.meta['name']} gives no parts of speech")
        tags = [BLANK if word.is_space else word.pos_ for word in document]
        yield [(word.idx, word.idx + len(word), tag) for word, tag in zip(document, tags, strict=True) if tag]


def _function(wanted: str, key: str) -> Tagger:
    """A tagger of the user's own, given as module:function."""
    module, _, name = wanted.partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise TsaeError(
            f"{key}: '{wanted}' is neither auto, spacy, spacy:PIPELINE, surface nor a "
            f"module:function that can be imported ({error})"
        ) from None
    return Tagger(wanted, lambda texts: map(function, texts))


def surface_spans(text: str) -> Spans:
    """Classes that the letters tell: the closed classes of English by lists, numbers, marks, capitalised and other words.

    Honest but crude: `that` is always a conjunction here, and `other word` holds nouns, verbs and adjectives alike.
    """
    for match in _WORD.finditer(text):
        word = match[0]
        if word[0].isdigit():
            tag = "number"
        elif not word[0].isalpha():
            tag = "punctuation"
        elif word.lower().replace("’", "'") in _CLASS_OF:
            tag = _CLASS_OF[word.lower().replace("’", "'")]
        else:
            tag = "capitalised word" if word[0].isupper() else "other word"
        yield match.start(), match.end(), tag
