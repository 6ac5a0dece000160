"""Everything the page of latents shows, packed into one compressed block of typed arrays.

The block is zlib data of: the length of a JSON text (uint32, little endian), the JSON text, padding to 4 bytes, and the
arrays one after the other, each padded to 4 bytes; the JSON's "arrays" says where each begins (after the padding of the
JSON text), its type and its number of elements. Tokens are stored once; an example is a range of them, and the
activations in it are bytes in units of 1/255 of the latent's largest.
"""

from __future__ import annotations

import base64
import json
import re
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tsae.config.experiments import FeaturesConfig
from tsae.experiments.shared.firings import Firings, LatentStatistics, spread, texts
from tsae.lm.unembedding import Unembedding
from tsae.runtime import preemption
from tsae.runtime.errors import TsaeError
from tsae.runtime.progress import Progress

HISTOGRAM_BINS = 16
MOST_LABELS = 16
"""Labels with a share of their own, the most frequent; the others are one more."""
TOP_TOKENS = 3
NEIGHBOURS, SPOKEN_TOKENS = 5, 8
AT_ONCE = 256
"""Latents whose products with all others, or with all tokens, exist at a time: 270 MB for 262,144 tokens."""
LONGEST = 255
"""Tokens of an example at most; positions in it are bytes."""


class Examples(NamedTuple):
    """Texts of all latents."""

    offsets: np.ndarray
    """Where each latent's examples begin [F + 1]."""
    strong: np.ndarray
    """How many of each latent's examples are its strongest ones [F]; the others are spread over weaker ones."""
    start: np.ndarray
    """Place of the first token of each example."""
    length: np.ndarray
    """Tokens of each example."""
    fired: np.ndarray
    """Where each example's activations begin among all."""
    position: np.ndarray
    """Position in its example of each activation."""
    value: np.ndarray
    """Each activation in 255ths of the latent's largest, at least 1."""


def find_examples(firings: Firings, largest: np.ndarray, settings: FeaturesConfig, progress: Progress) -> Examples:
    """The strongest activations of each latent, one per document, and weaker ones, with the text around them."""
    bounds, document = _text_bounds(firings), firings.document.reshape(-1)
    chosen, spans, shown = [], [], []
    strong = np.zeros(firings.dict_size, np.uint8)
    for latent in preemption.polled(range(firings.dict_size)):
        places, activations = firings.of(latent)
        order = np.argsort(-activations, kind="stable")
        _, first = np.unique(document[places[order]], return_index=True)
        ranked = places[order[np.sort(first)]]
        strong[latent] = min(len(ranked), settings.examples)
        weaker = spread(ranked[settings.examples :], settings.examples // 2)
        centres = np.concatenate([ranked[: settings.examples], weaker])
        chosen.append(len(centres))
        start = np.maximum(bounds[centres, 0], centres - settings.before)
        end = np.minimum(bounds[centres, 1], centres + settings.after)
        begin, stop = np.searchsorted(places, start), np.searchsorted(places, end, side="right")
        spans.append(np.stack([start, end + 1 - start, stop - begin]))
        entries = _ranges(begin, stop)
        level = np.ceil(255 * activations[entries] / largest[latent]).clip(1, 255)
        shown.append(np.stack([places[entries] - np.repeat(start, stop - begin), level]).astype(np.uint8))
        progress.update(latent + 1)
    start, length, fired = np.concatenate(spans, axis=1)
    position, value = np.concatenate(shown, axis=1)
    return Examples(
        _running(chosen), strong, start.astype(np.uint32), length.astype(np.uint8), _running(fired), position, value
    )


def histograms(firings: Firings, largest: np.ndarray) -> np.ndarray:
    """Activations of each latent where it fires, in bins up to its largest, the fullest bin as 255: [F, bins] uint8."""
    latents = firings.latents
    bins = (firings.values / largest[latents] * HISTOGRAM_BINS).astype(np.int64).clip(0, HISTOGRAM_BINS - 1)
    counts = np.bincount(
        latents.astype(np.int64) * HISTOGRAM_BINS + bins, minlength=firings.dict_size * HISTOGRAM_BINS
    ).reshape(firings.dict_size, HISTOGRAM_BINS)
    return np.ceil(255 * counts / counts.max(1, keepdims=True).clip(1)).astype(np.uint8)


def top_tokens(firings: Firings, types: np.ndarray) -> np.ndarray:
    """The tokens that carry most of each latent's activation [F, 3], by their number in `types` [S · L]; -1: none."""
    found = np.full((firings.dict_size, TOP_TOKENS), -1, np.int32)
    for latent in range(firings.dict_size):
        places, values = firings.of(latent)
        kinds, which = np.unique(types[places], return_inverse=True)
        mass = np.bincount(which, weights=values, minlength=len(kinds))
        order = np.argsort(-mass, kind="stable")[:TOP_TOKENS]
        found[latent, : len(order)] = kinds[order]
    return found


class Labels(NamedTuple):
    """How the tokens at which latents fire are spread over the labels of their texts."""

    names: list[str]
    """The most frequent labels first [C]; "other labels" is the last of more."""
    base: list[float]
    """Share of all labelled tokens that each label has [C]."""
    share: np.ndarray
    """The same of the labelled tokens at which each latent fires, in 255ths [F, C]; zeros of one that fires on none."""


def spread_over_labels(firings: Firings, label: np.ndarray, names: Sequence[str]) -> Labels | None:
    """`label` [documents] is an index into `names`, -1 for none; None where no token read has a label."""
    document = firings.document.reshape(-1)
    own = np.where(document >= 0, label[document], -1)
    counts = np.bincount(own[own >= 0], minlength=len(names))
    if not counts.any():
        return None
    order = np.argsort(-counts, kind="stable")[: np.count_nonzero(counts)]
    shown = min(len(order), MOST_LABELS)
    column = np.full(len(names) + 1, -1)  # the last one is where -1 leads
    column[order] = np.minimum(np.arange(len(order)), shown)
    kinds = shown + (len(order) > shown)
    fired, latents = column[own[firings.places]], firings.latents
    labelled = fired >= 0
    table = np.bincount(
        latents[labelled].astype(np.int64) * kinds + fired[labelled], minlength=firings.dict_size * kinds
    ).reshape(-1, kinds)
    base = np.bincount(column[order], weights=counts[order], minlength=kinds) / counts.sum()
    share = np.rint(255 * table / table.sum(1, keepdims=True).clip(1)).astype(np.uint8)
    called = [names[index] for index in order[:shown]]
    return Labels(called + ["other labels"] * (kinds - shown), base.tolist(), share)


def neighbours(rows: Tensor, others: Tensor | None, progress: Progress) -> tuple[np.ndarray, np.ndarray]:
    """The nearest other rows of each of [F, D] by cosine, nearest first [F, 5] (-1: none), and the cosines in 255ths, not below 0.

    With `others` [G, D], the nearest of those.
    """
    unit = torch.nn.functional.normalize(rows.float(), dim=1)
    among = unit if others is None else torch.nn.functional.normalize(others.to(rows.device).float(), dim=1)
    count = min(NEIGHBOURS, len(among) - (others is None))
    found = np.full((len(rows), NEIGHBOURS), -1, np.int32)
    cosines = np.zeros((len(rows), NEIGHBOURS), np.uint8)
    for first in preemption.polled(range(0, len(rows), AT_ONCE)):
        part = unit[first : first + AT_ONCE] @ among.T
        if others is None:
            own = torch.arange(len(part), device=part.device)
            part[own, first + own] = -torch.inf
        nearest = part.topk(count)
        found[first : first + AT_ONCE, :count] = nearest.indices.cpu()
        cosines[first : first + AT_ONCE, :count] = (255 * nearest.values).round().clamp(0, 255).cpu()
        progress.update(min(first + AT_ONCE, len(rows)))
    return found, cosines


def spoken(rows: Tensor, head: Unembedding, progress: Progress) -> tuple[np.ndarray, np.ndarray]:
    """The tokens whose scores each decoder row [F, D] raises most, then those it lowers most, the extreme first [F, 16].

    And by how much, up to a factor.
    """
    found = np.zeros((len(rows), 2 * SPOKEN_TOKENS), np.int64)
    by = np.zeros(found.shape, np.float32)
    for first in preemption.polled(range(0, len(rows), AT_ONCE)):
        scores = head.scores(rows[first : first + AT_ONCE])
        ends = [scores.topk(SPOKEN_TOKENS, largest=largest) for largest in (True, False)]
        found[first : first + AT_ONCE] = torch.cat([end.indices for end in ends], 1).cpu()
        by[first : first + AT_ONCE] = torch.cat([end.values for end in ends], 1).cpu()
        progress.update(min(first + AT_ONCE, len(rows)))
    return found, by


def columns(
    statistics: LatentStatistics, group_sizes: tuple[int, ...], scores: Mapping[int, float]
) -> dict[str, np.ndarray]:
    """One array [F] for each column of the table."""
    size = len(statistics.rate)
    detection = np.full(size, np.nan)
    detection[list(scores)] = list(scores.values())
    return {
        "group": np.repeat(np.arange(len(group_sizes)), group_sizes).astype(np.uint8),
        **{name: column.astype(np.float32) for name, column in statistics._asdict().items()},
        "detection": detection.astype(np.float32),
    }


def pack(about: dict[str, Any], arrays: Mapping[str, np.ndarray]) -> bytes:
    """The block: `about` and the arrays, compressed."""
    places, pieces, end = {}, [], 0
    for name, array in arrays.items():
        little = array.astype(array.dtype.newbyteorder("<"))
        data = np.ascontiguousarray(little).tobytes()
        places[name] = [array.dtype.name, end, array.size]
        padded = data + bytes(-len(data) % 4)
        pieces.append(padded)
        end += len(padded)
    text = json.dumps({**about, "arrays": places}, ensure_ascii=False, separators=(",", ":")).encode()
    head = len(text).to_bytes(4, "little") + text
    return zlib.compress(head + bytes(-len(head) % 4) + b"".join(pieces), 6)


def unpack(page: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """What `pack` put into a page. Raises TsaeError for another one."""
    packed = re.search(r'<script type="text/plain" id="data">(.*?)</script>', page.read_text(encoding="utf-8"))
    try:
        block = zlib.decompress(base64.b64decode(packed[1] if packed else ""))
        length = int.from_bytes(block[:4], "little")
        about = json.loads(block[4 : 4 + length])
        base = -(-(4 + length) // 4) * 4
        return about, {
            name: np.frombuffer(block, np.dtype(kind).newbyteorder("<"), count, base + offset)
            for name, (kind, offset, count) in about["arrays"].items()
        }
    except (ValueError, KeyError, zlib.error) as error:
        raise TsaeError(
            f"{page}: is not a page of latents, or damaged ({error}); `tsae features` makes it again"
        ) from None


def _text_bounds(firings: Firings) -> np.ndarray:
    """[S · L, 2]: places of the first and the last position of the text around each place."""
    text = texts(firings).reshape(-1)
    there = np.flatnonzero(text >= 0)
    count = int(text.max()) + 1
    first, last = np.full(count, len(text)), np.zeros(count, np.int64)
    np.minimum.at(first, text[there], there)
    np.maximum.at(last, text[there], there)
    return np.stack([first[text], last[text]], axis=1)


def _ranges(begin: np.ndarray, stop: np.ndarray) -> np.ndarray:
    """begin[0], …, stop[0] - 1, begin[1], …: one range after the other."""
    counts = stop - begin
    before = np.cumsum(counts) - counts
    return np.arange(counts.sum()) + np.repeat(begin - before, counts)


def _running(counts: Sequence[int] | np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.uint32)
