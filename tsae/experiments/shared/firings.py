"""All feature activations in some stored sequences, latent by latent, in one pass and without a dense [N, F] matrix.

Positions are counted over the sequences read: place = row · L + position. Skipped positions, pads and special tokens are
no places of a text and hold no activations.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from tsae.runtime import preemption
from tsae.runtime.errors import TsaeError
from tsae.runtime.progress import Progress

if TYPE_CHECKING:
    from typing import TypeAlias

    from scipy.sparse import csr_array
    from transformers import PreTrainedTokenizerFast

    from tsae.experiments.shared.subject import Subject
    from tsae.store.reader import Store

    Features: TypeAlias = csr_array | np.ndarray
    """Feature activations of tokens [N, F], sparse; dense ones are those of the residual stream."""

log = logging.getLogger("tsae")

TOKENS_AT_ONCE = 4096
MOST_DENSE = 1 << 26
"""Values of a dense code, which classes without a single threshold compute for the tokens of a batch."""
MOST_ENTRIES = 1 << 25
"""Activations that are held at most: 0.3 GB, and four times as much while they are sorted."""


class Firings(NamedTuple):
    """Nonzero feature activations of S sequences of L positions, sorted by latent and then by place."""

    offsets: np.ndarray
    """Where each latent's entries begin [F + 1], int64."""
    places: np.ndarray
    """Place of each entry [n], int32."""
    values: np.ndarray
    """Feature activation of each entry [n], float32."""
    tokens: np.ndarray
    """[S, L] int32."""
    document: np.ndarray
    """[S, L] int32: document of each position, -1 where there is no text to look at."""
    distance: np.ndarray
    """[S, L] float32: how far the activation vector moved since the position before; NaN where no text goes on."""

    @property
    def dict_size(self) -> int:
        """F."""
        return len(self.offsets) - 1

    @property
    def n_tokens(self) -> int:
        """Positions of a text."""
        return int((self.document >= 0).sum())

    @property
    def counts(self) -> np.ndarray:
        """Positions at which each latent fires [F]."""
        return np.diff(self.offsets)

    @property
    def latents(self) -> np.ndarray:
        """Latent of each entry [n]."""
        return np.repeat(np.arange(self.dict_size, dtype=np.int32), self.counts)

    def of(self, latent: int) -> tuple[np.ndarray, np.ndarray]:
        """Places and values of one latent."""
        part = slice(self.offsets[latent], self.offsets[latent + 1])
        return self.places[part], self.values[part]


def collect(subject: Subject, store: Store, rows: Sequence[int], what: str) -> Firings:
    """The feature activations in the sequences `rows` of a store; fewer of them if a dense code would not fit.

    Raises TsaeError if the store was made for activations of another width, or the rows hold no text.
    """
    if subject.dictionary.activation_dim != store.activation_dim:
        raise TsaeError(
            f"{subject.run.path}: reads activations of {subject.dictionary.activation_dim} dimensions, "
            f"the store {store.path} holds {store.activation_dim}"
        )
    taken = np.asarray(rows, dtype=np.int64)
    valid = store.valid(subject.config.counted, taken)
    if not valid.any():
        raise TsaeError(f"{store.path}: the {len(rows)} sequences to read hold no text beyond the skipped positions")
    progress = Progress(f"{what} {subject.name}: activations", len(taken), "sequences", subject.run.progress)
    distance = np.full(valid.shape, np.nan, np.float32)
    pieces, held, done = [], 0, 0
    for done, batch in _batches(subject, store, taken, valid, distance):
        pieces.append(batch)
        held += len(batch[0])
        progress.update(done)
        if held > MOST_ENTRIES:
            log.warning("%s: %d activations are enough; only %d of %d sequences are read", what, held, done, len(taken))
            break
    taken, valid = taken[:done], valid[:done]
    document = np.where(valid, store.document[taken], -1)
    offsets, places, values = _by_latent(pieces, subject.dictionary.dict_size)
    return Firings(offsets, places, values, np.asarray(store.tokens[taken]), document, distance[:done])


def _batches(
    subject: Subject, store: Store, rows: np.ndarray, valid: np.ndarray, distance: np.ndarray
) -> Iterator[tuple[int, tuple[np.ndarray, np.ndarray, np.ndarray]]]:
    """Rows done so far, and (latents, places, values) of a batch; fills `distance` on the way."""
    length = store.context_length
    size = max(1, min(TOKENS_AT_ONCE, MOST_DENSE // subject.dictionary.dict_size) // length)
    for start in preemption.polled(range(0, len(rows), size)):
        stop = min(start + size, len(rows))
        x = store.read(rows[start:stop]).float()
        there = valid[start:stop]
        moved = torch.linalg.vector_norm(x.diff(dim=1), dim=2).numpy()
        distance[start:stop, 1:] = np.where(there[:, 1:] & there[:, :-1], moved, np.nan)
        code = subject.codes(x[torch.from_numpy(there)])
        places = (start * length + np.flatnonzero(there)).astype(np.int32)
        latents = code.latents.numpy().astype(np.uint16 if code.dict_size <= 1 << 16 else np.int32)
        yield stop, (latents, places[code.rows.numpy()], code.values.float().numpy())


def _by_latent(
    pieces: list[tuple[np.ndarray, np.ndarray, np.ndarray]], dict_size: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Offsets, places and values of all batches in the order of their latents; empties `pieces`."""
    latents, places, values = (np.concatenate(column) for column in zip(*pieces, strict=True))
    pieces.clear()
    order = np.argsort(latents, kind="stable")  # a radix sort, where latents fit into 16 bits
    counts = np.bincount(latents, minlength=dict_size)
    return np.concatenate([[0], np.cumsum(counts)]), places[order], values[order]


class LatentStatistics(NamedTuple):
    """Each [F]; NaN where a latent never fires."""

    rate: np.ndarray
    """Share of the tokens at which it fires."""
    largest: np.ndarray
    """Largest activation."""
    mean: np.ndarray
    """Mean activation where it fires."""
    smoothness: np.ndarray
    """Largest step of the activation over the step of x, mean over the texts in which it fires (paper section 4.3)."""
    persistence: np.ndarray
    """Share of its firings after which it fires at the next token too, among those that have a next token."""


def latent_statistics(firings: Firings) -> LatentStatistics:
    """The figures of every latent; lower smoothness is smoother."""
    counts = firings.counts.astype(np.float64)
    fires = counts > 0
    sums = np.add.reduceat(np.append(firings.values, 0.0), firings.offsets[:-1])
    tops = np.maximum.reduceat(np.append(firings.values, 0.0), firings.offsets[:-1])
    undefined = np.full(len(counts), np.nan)
    return LatentStatistics(
        rate=counts / firings.n_tokens,
        largest=np.where(fires, tops, np.nan),
        mean=np.divide(sums, counts, out=undefined.copy(), where=fires),
        smoothness=_smoothness(firings),
        persistence=_persistence(firings),
    )


def texts(firings: Firings) -> np.ndarray:
    """[S, L] int32: number of the text that each position belongs to, a run of one document in one sequence; -1: none."""
    document = firings.document
    begins = np.ones(document.shape, bool)
    begins[:, 1:] = document[:, 1:] != document[:, :-1]
    begins &= document >= 0
    return np.where(document >= 0, np.cumsum(begins).reshape(document.shape) - 1, -1).astype(np.int32)


def _continues(firings: Firings) -> np.ndarray:
    """[S · L + 1] bool: whether a position goes on with the text of the position before it."""
    return np.append(~np.isnan(firings.distance.reshape(-1)), False)


def _persistence(firings: Firings) -> np.ndarray:
    places, latents = firings.places, firings.latents
    has_next = _continues(firings)[places + 1]
    again = np.zeros(len(places), bool)
    again[:-1] = (places[1:] == places[:-1] + 1) & (latents[1:] == latents[:-1])
    possible = np.bincount(latents[has_next], minlength=firings.dict_size).astype(np.float64)
    repeated = np.bincount(latents[has_next & again], minlength=firings.dict_size)
    return np.divide(repeated, possible, out=np.full(firings.dict_size, np.nan), where=possible > 0)


def _smoothness(firings: Firings) -> np.ndarray:
    """Every firing is a step up from the value before it and, unless it goes on, a step down to the value after it."""
    places, values, latents = firings.places, firings.values, firings.latents
    follows = np.zeros(len(places), bool)
    follows[1:] = (places[1:] == places[:-1] + 1) & (latents[1:] == latents[:-1])
    before = np.where(follows, np.append(np.float32(0), values[:-1]), 0)
    ends = ~np.append(follows[1:], False)
    steepness = np.maximum(
        _slope(firings, places, np.abs(values - before)), np.where(ends, _slope(firings, places + 1, values), 0)
    )
    text = texts(firings).reshape(-1)[places]
    first = np.ones(len(places), bool)
    first[1:] = (text[1:] != text[:-1]) | (latents[1:] != latents[:-1])
    starts = np.flatnonzero(first)
    if not len(starts):
        return np.full(firings.dict_size, np.nan)
    steepest = np.maximum.reduceat(steepness, starts)
    owner = latents[starts]
    number = np.bincount(owner, minlength=firings.dict_size).astype(np.float64)
    total = np.bincount(owner, weights=steepest, minlength=firings.dict_size)
    return np.divide(total, number, out=np.full(firings.dict_size, np.nan), where=number > 0)


def _slope(firings: Firings, places: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """|step of f| over |step of x| at each place; 0 where no text goes on, or x does not move."""
    distance = np.append(firings.distance.reshape(-1), np.nan)[places]
    moves = np.nan_to_num(distance, nan=0.0) > 0
    return np.divide(steps, distance, out=np.zeros(len(places), np.float64), where=moves)


class Windows(NamedTuple):
    """W texts of consecutive positions of one document, none overlapping."""

    first: np.ndarray
    """Place of the first position of each [W]."""
    last: np.ndarray
    """Place of the last position of each [W]."""
    document: np.ndarray
    """Document of each [W]."""
    number: np.ndarray
    """Window of each place [S · L], -1 for none."""


def cut(firings: Firings, length: int) -> Windows:
    """Windows of `length` positions; what remains of a text is one too if it is half as long."""
    text = texts(firings).reshape(-1)
    places = np.flatnonzero(text >= 0)
    owner = text[places]
    begins = np.flatnonzero(np.append(True, owner[1:] != owner[:-1]))
    step = np.arange(len(places)) - np.repeat(begins, np.diff(np.append(begins, len(places))))
    starts = np.flatnonzero(step % length == 0)
    ends = np.append(starts[1:], len(places)) - 1
    long_enough = ends - starts + 1 >= (length + 1) // 2
    starts, ends = starts[long_enough], ends[long_enough]
    number = np.full(text.shape, -1, np.int32)
    for window, (start, end) in enumerate(zip(starts, ends, strict=True)):
        number[places[start : end + 1]] = window
    document = firings.document.reshape(-1)[places[starts]]
    return Windows(places[starts], places[ends], document, number)


def peaks(firings: Firings, windows: Windows, latent: int) -> tuple[np.ndarray, np.ndarray]:
    """The windows in which a latent is active, ascending, and its largest activation in each."""
    places, values = firings.of(latent)
    number = windows.number[places]
    inside = number >= 0
    number, values = number[inside], values[inside]
    starts = np.flatnonzero(np.append(True, number[1:] != number[:-1])) if len(number) else np.empty(0, np.int64)
    return number[starts], np.maximum.reduceat(values, starts) if len(starts) else values


def strongest_per_document(windows: Windows, active: np.ndarray, peak: np.ndarray) -> np.ndarray:
    """Of the windows `active`, the one with the largest peak of each document, strongest first."""
    order = np.lexsort((active, -peak))
    _, first = np.unique(windows.document[active[order]], return_index=True)
    return active[order[np.sort(first)]]


def any_per_document(
    windows: Windows, active: np.ndarray, peak: np.ndarray, generator: np.random.Generator
) -> np.ndarray:
    """Of the windows `active`, a random one of each document, those with the largest peaks first."""
    order = generator.permutation(len(active))
    _, first = np.unique(windows.document[active[order]], return_index=True)
    chosen = np.sort(order[first])
    return active[chosen[np.argsort(-peak[chosen], kind="stable")]]


def spread(ranked: np.ndarray, count: int) -> np.ndarray:
    """`count` of the items, evenly over their ranks, the first and the last among them; all if there are fewer."""
    if len(ranked) <= count:
        return ranked
    return ranked[np.linspace(0, len(ranked) - 1, count).round().astype(np.int64)]


def silent(windows: Windows, active: np.ndarray, count: int, generator: np.random.Generator) -> np.ndarray:
    """Up to `count` windows that are not `active`, of different documents where possible, at random."""
    quiet = np.ones(len(windows.first), bool)
    quiet[active] = False
    order = generator.permutation(np.flatnonzero(quiet))
    document = windows.document[order]
    first = np.empty(windows.document.max(initial=-1) + 1, np.int64)
    first[document[::-1]] = np.arange(len(order))[::-1]  # of equal places the one that is written last stays
    distinct = first[document] == np.arange(len(order))
    return np.concatenate([order[distinct], order[~distinct]])[:count]


def excerpt(firings: Firings, windows: Windows, window: int, latent: int, strings: dict[int, str]) -> dict[str, Any]:
    """A window as `{"document", "tokens": [text of each], "values": {position: activation of the latent}}`."""
    first, last = int(windows.first[window]), int(windows.last[window])
    places, values = firings.of(latent)
    begin, end = np.searchsorted(places, [first, last + 1])
    fired = zip((places[begin:end] - first).tolist(), values[begin:end].tolist(), strict=True)
    tokens = firings.tokens.reshape(-1)[first : last + 1]
    return {
        "document": int(windows.document[window]),
        "tokens": [strings[token] for token in tokens.tolist()],
        "values": {str(position): float(f"{value:.4g}") for position, value in fired},
    }


def token_texts(tokenizer: PreTrainedTokenizerFast, ids: Iterable[int]) -> dict[int, str]:
    """Token → its text inside a sentence; a part of a character is shown as �.

    A token is decoded after another one, since decoders drop the space at the beginning of a text.
    """
    wanted = sorted(set(map(int, ids)))
    anchor = tokenizer("a", add_special_tokens=False)["input_ids"][-1:]

    def decoded(tokens: list[int]) -> str:
        return str(tokenizer.decode(tokens, clean_up_tokenization_spaces=False))

    before = decoded(anchor)
    texts = {}
    for token in wanted:
        after = decoded([*anchor, token])
        texts[token] = after.removeprefix(before) if after.startswith(before) else decoded([token])
    return texts
