"""The contexts that `tsae sequences` reads, and their feature activations.

Shapes: L positions, T of them that count, A latents that fire in a context.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch

from tsae.config.experiments import SequencesConfig
from tsae.data.labelled import labelled_texts
from tsae.data.tokens import starts_with_bos
from tsae.evaluation.codes import context_code
from tsae.experiments.sequences.splices import (
    Pool,
    Splice,
    draw_lengths,
    draw_splice,
    from_texts,
    read_pool,
    total_tokens,
)
from tsae.experiments.shared.subject import Subject
from tsae.runtime.errors import TsaeError
from tsae.runtime.preemption import polled
from tsae.runtime.progress import Progress

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
    """The code of activations x [L, D]."""
    first = max(int((splice.passage < 0).sum()), subject.config.data.skip_positions)
    code = context_code(subject.codes(x[first:]), slice(0, len(x) - first))
    if not len(code.latents):
        raise TsaeError(
            f"{subject.run.path}: no latent fires on the spliced texts; the dictionary is dead or has another input"
        )
    return Coded(splice, first, code.latents.numpy(), code.values.numpy().T.astype(np.float64))
