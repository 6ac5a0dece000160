"""The contexts that `tsae sequences` reads, and their feature activations.

Shapes: L positions, T of them that count, A latents that fire in a context.
"""

from __future__ import annotations

import logging
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from tsae.config.experiments import SequencesConfig
from tsae.data.contexts import starts_with_bos
from tsae.data.labelled import LabelledText, labelled_texts
from tsae.evaluation.smoothness import context_code
from tsae.experiments.shared.subject import Subject
from tsae.runtime.errors import TsaeError
from tsae.runtime.preemption import polled
from tsae.runtime.progress import Progress

log = logging.getLogger("tsae")

MIN_PASSAGE = 8  # tokens; a mean code of fewer says nothing
MAX_PASSAGE = 200  # tokens, where the model has room for more; the paper's have 150 to 400
TEXTS_PER_LABEL = 60
TEXTS_READ = 20_000
JITTER = 0.3  # relative; drawn passages differ in length, so that a border cannot be guessed from its position


class Splice(NamedTuple):
    """One context."""

    tokens: np.ndarray
    """[L] int64, with BOS if there is one."""
    passage: np.ndarray
    """[L] int64: the passage of each token, -1 for BOS."""
    names: tuple[str, ...]
    """What each passage is called."""


class Pool(NamedTuple):
    """Token ids of texts, by label."""

    texts: dict[str, list[np.ndarray]]
    bos: list[int]

    def longer_than(self, tokens: int) -> dict[str, list[np.ndarray]]:
        """The texts with at least so many tokens; labels without any are left out."""
        found = {label: [text for text in texts if len(text) >= tokens] for label, texts in self.texts.items()}
        return {label: texts for label, texts in found.items() if texts}


def read_pool(texts: Iterable[LabelledText], tokenizer: Any, bos: list[int], labels: Sequence[str]) -> Pool:
    """The first texts of each label, or of each of `labels`. Raises TsaeError for a label that is not there."""
    kept: dict[str, list[str]] = defaultdict(list)
    for number, text in enumerate(texts):
        if number == TEXTS_READ or (labels and all(len(kept[label]) == TEXTS_PER_LABEL for label in labels)):
            break
        if len(kept[text.label]) < TEXTS_PER_LABEL:
            kept[text.label].append(text.text)
    missing = [label for label in labels if not kept.get(label)]
    if missing:
        found = ", ".join(sorted(label for label, own in kept.items() if own))
        raise TsaeError(f"experiments.sequences.labels: no text is labelled '{missing[0]}'; labels found: {found}")
    return Pool({label: _ids(kept[label], tokenizer) for label in labels or sorted(kept)}, bos)


def from_texts(texts: Sequence[str], tokenizer: Any, bos: list[int], room: int, wanted: int | None) -> Splice:
    """The context of a user's texts, in their order: of each the first `wanted` tokens, or an equal share of `room`.

    What a short text leaves free goes to the longer ones. Raises TsaeError for a text shorter than asked for, and where
    passages have no room.
    """
    named = [_named(text) for text in texts]
    ids = _ids([text for _, text in named], tokenizer)
    for (name, _), own in zip(named, ids, strict=True):
        if len(own) < (wanted or MIN_PASSAGE):
            raise TsaeError(
                f"experiments.sequences.texts: '{name}' has {len(own)} tokens; {wanted or MIN_PASSAGE} are asked for"
            )
    lengths = [wanted] * len(ids) if wanted else _shares([len(own) for own in ids], room - len(bos))
    if sum(lengths) + len(bos) > room or min(lengths) < MIN_PASSAGE:
        raise TsaeError(
            f"experiments.sequences: {len(ids)} passages of {min(lengths)} tokens do not fit: the model has {room} "
            f"positions, and a passage needs {MIN_PASSAGE}; give fewer texts or fewer passage_tokens"
        )
    for (name, _), own, length in zip(named, ids, lengths, strict=True):
        if length < len(own):
            log.warning("sequences: of '%s' the first %d of %d tokens are read", name, length, len(own))
    pieces = [own[:length] for own, length in zip(ids, lengths, strict=True)]
    return _splice(pieces, bos, tuple(name for name, _ in named))


def draw_splice(pool: Pool, lengths: np.ndarray, random: np.random.Generator, one_text: bool = False) -> Splice:
    """A context of passages of `lengths` [P] from texts of different labels; or, the null, all of one text in one piece.

    Raises TsaeError if texts are too short or labels too few.
    """
    longest = int(lengths.sum() if one_text else lengths.max())
    found = pool.longer_than(longest)
    needed = 1 if one_text else len(lengths)
    if len(found) < needed:
        raise TsaeError(
            f"experiments.sequences: {needed} labels with a text of {longest} tokens are needed, {len(found)} of "
            f"{len(pool.texts)} have one; ask for fewer passages or passage_tokens, or name a dataset with longer texts"
        )
    labels = [str(label) for label in random.choice(sorted(found), size=needed, replace=False)]
    chosen = [found[label][random.integers(len(found[label]))] for label in labels]
    if one_text:
        start = random.integers(len(chosen[0]) - longest + 1)
        pieces = np.split(chosen[0][start : start + longest], np.cumsum(lengths)[:-1])
        return _splice(pieces, pool.bos, (labels[0],) * len(lengths))
    starts = [random.integers(len(text) - length + 1) for text, length in zip(chosen, lengths, strict=True)]
    pieces = [text[at : at + length] for text, at, length in zip(chosen, starts, lengths, strict=True)]
    return _splice(pieces, pool.bos, tuple(labels))


def draw_lengths(passages: int, total: int, random: np.random.Generator) -> np.ndarray:
    """[P] lengths of passages that sum to `total`, each within a third of the mean."""
    weights = random.uniform(1 - JITTER, 1 + JITTER, passages)
    borders = np.round(weights.cumsum() / weights.sum() * total).astype(np.int64)
    return np.diff(borders, prepend=0)


def total_tokens(passages: int, wanted: int | None, room: int) -> int:
    """Tokens of a drawn context without BOS. Raises TsaeError if the model has not the room."""
    each = wanted or min(room // passages, MAX_PASSAGE)
    if passages < 2 or each < MIN_PASSAGE or each * passages > room:
        raise TsaeError(
            f"experiments.sequences: {passages} passages of {each} tokens are impossible: at least 2 passages of at "
            f"least {MIN_PASSAGE} tokens are expected, and the model has room for {room} tokens"
        )
    return each * passages


def _named(text: str) -> tuple[str, str]:
    """Name and content of one of the user's texts: a file, or the text itself."""
    if any(character.isspace() for character in text) and not os.path.isfile(
        text
    ):  # Path.is_file raises for a long text
        words = text.split()
        return " ".join(words[:4]) + (" …" if len(words) > 4 else ""), text
    try:
        return Path(text).stem, Path(os.path.expanduser(text)).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise TsaeError(f"experiments.sequences.texts: {text}: cannot be read: {reason}") from None


def _ids(texts: Sequence[str], tokenizer: Any) -> list[np.ndarray]:
    if not texts:
        return []
    found = tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
    return [np.asarray(ids, np.int64) for ids in found]


def _shares(lengths: Sequence[int], room: int) -> list[int]:
    """Each text's tokens, at most `lengths`, with the room shared as evenly as they allow."""
    shares = [0] * len(lengths)
    left = room
    for place, index in enumerate(sorted(range(len(lengths)), key=lambda index: lengths[index])):
        shares[index] = min(lengths[index], left // (len(lengths) - place))
        left -= shares[index]
    return shares


def _splice(pieces: Sequence[np.ndarray], bos: list[int], names: tuple[str, ...]) -> Splice:
    passage = np.repeat(np.arange(len(pieces)), [len(piece) for piece in pieces])
    tokens = np.concatenate([np.asarray(bos, np.int64), *pieces])
    return Splice(tokens, np.concatenate([np.full(len(bos), -1), passage]), names)


log = logging.getLogger("tsae")


class Contexts(NamedTuple):
    """What is read, by use."""

    calibration: list[Splice]
    """Splices that tell which latents are smooth."""
    spliced: list[Splice]
    """Splices that are scored; none of the calibration."""
    one_text: list[Splice]
    """Contexts of one text, cut at borders of the same kind; empty if no text is as long."""
    own: list[Splice]
    """The user's."""

    @property
    def total(self) -> int:
        """How many there are."""
        return sum(map(len, self))


class Coded(NamedTuple):
    """A context's feature activations at the positions that count."""

    splice: Splice
    first: int
    """Positions left out at the beginning: BOS or the attention sink."""
    latents: np.ndarray
    """[A] the latents that fire, ascending."""
    z: np.ndarray
    """[T, A]."""

    @property
    def passage(self) -> np.ndarray:
        """[T] the passage of each token."""
        return self.splice.passage[self.first :]


@lru_cache(maxsize=1)
def draw_contexts(subject: Subject, settings: SequencesConfig) -> Contexts:
    """Every context, the same for all dictionaries on one language model. Raises TsaeError."""
    lm = subject.language_model
    data = subject.config.data
    with_bos = data.bos == "always" or (data.bos == "auto" and starts_with_bos(lm.tokenizer))
    bos = [lm.tokenizer.bos_token_id] if with_bos else []
    positions = lm.max_length or data.context_length
    read = subject.config.experiments.texts
    labelled = labelled_texts(settings.dataset, categories=read.categories, subset=read.subset, split=read.split)
    pool = read_pool(labelled, lm.tokenizer, bos, settings.labels)
    tokens = total_tokens(settings.passages, settings.passage_tokens, positions - len(bos))
    random = np.random.default_rng(settings.seed)

    def drawn(one_text: bool = False) -> list[Splice]:
        lengths = [draw_lengths(settings.passages, tokens, random) for _ in range(settings.splices)]
        return [draw_splice(pool, part, random, one_text) for part in lengths]

    own = []
    if settings.texts:
        own = [from_texts(settings.texts, lm.tokenizer, bos, positions, settings.passage_tokens)]
    return Contexts(drawn(), drawn(), drawn(one_text=True) if _has_long_texts(pool, tokens) else [], own)


def _has_long_texts(pool: Pool, tokens: int) -> bool:
    if pool.longer_than(tokens):
        return True
    log.warning("sequences: no text has %d tokens, so there is no control without a change of text", tokens)
    return False


def encode_contexts(subject: Subject, splices: Sequence[Splice], progress: Progress, done: int) -> Iterator[Coded]:
    """The contexts with their feature activations, a batch of the language model at a time; `done` came before."""
    lm, batch = subject.language_model, subject.config.model.batch_size
    for start in polled(range(0, len(splices), batch)):
        part = splices[start : start + batch]
        lengths = torch.tensor([len(splice.tokens) for splice in part])
        tokens = torch.zeros(len(part), int(lengths.max()), dtype=torch.int64)
        for row, splice in zip(tokens, part, strict=True):
            row[: len(splice.tokens)] = torch.from_numpy(splice.tokens)
        activations = lm.read(tokens, lengths)
        for number, splice in enumerate(part):
            yield _coded(subject, splice, activations[number, : len(splice.tokens)])
        progress.update(done + start + len(part))


def _coded(subject: Subject, splice: Splice, x: torch.Tensor) -> Coded:
    """The code of activations x [L, D]; where a token does not count, nothing fires."""
    first = max(int((splice.passage < 0).sum()), subject.config.data.skip_positions)
    code = context_code(subject.codes(x[first:]), slice(0, len(x) - first))
    values = np.where(subject.counts(splice.tokens[first:], x[first:]), code.values.numpy(), 0)
    fires = values.any(1)
    if not fires.any():
        raise TsaeError(
            f"{subject.run.path}: no latent fires on the spliced texts; the dictionary is dead or has another input"
        )
    return Coded(splice, first, code.latents.numpy()[fires], values[fires].T.astype(np.float64))
