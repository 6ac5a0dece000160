"""A map of feature activations, coloured by semantics, context and syntax (paper figures 2 and 9).

What a map shows to the eye is measured in the original space: the share of the nearest neighbours of a token that have
its label, and the silhouette, both by cosine. For the label of the text, tokens of the same text are no neighbours.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from tsae.config.experiments import TsneConfig
from tsae.experiments.shared.intervals import over_seeds
from tsae.experiments.shared.subject import Subject
from tsae.experiments.shared.tags import Tags, find_tagger, tags_of
from tsae.experiments.shared.texts import TextActivations, harvest_dataset, texts_read
from tsae.experiments.tsne.space import draw_map, purity, silhouette, unit_rows
from tsae.runtime.errors import TsaeError
from tsae.runtime.progress import Progress

if TYPE_CHECKING:
    from tsae.experiments.probe.fit import Features

COLOURINGS = ("semantics", "context", "syntax")
BEFORE = 24
"""Tokens of a text before the first one on the map that the page shows around it."""


def measure(subject: Subject, settings: TsneConfig, chunk: int) -> dict[str, Any]:
    """Purity and silhouette of the three labels, and the map of the first choice of texts."""
    _refuse(settings)
    material = _material(subject, settings)
    latents = subject.latents(chunk)
    progress = Progress(f"tsne {subject.name} chunk {chunk}", settings.seeds + 1, "steps")
    numbers = []
    for seed, chosen in enumerate(material.chosen):
        numbers.append(_numbers(material, chosen, latents, settings))
        progress.update(seed + 1, neighbours=settings.neighbours)
    drawn, reduction = _map(material, latents, settings)
    progress.update(settings.seeds + 1)
    colourings = {}
    for label in COLOURINGS:
        entry: dict[str, Any] = {"labels": _meaning(material, label)}
        for name in ("purity", "chance", "silhouette"):
            entry[name], entry[f"{name}_half_width"] = over_seeds([run[label][name] for run in numbers])
        colourings[label] = entry
    return {
        "headline": {label: colourings[label]["purity"] for label in COLOURINGS},
        "half_width_95": {label: colourings[label]["purity_half_width"] for label in COLOURINGS},
        "headline_is": f"share of the {settings.neighbours} nearest neighbours with the same label, by cosine",
        "reduction": reduction,
        "texts": texts_read(subject, material.texts, settings.dataset),
        "tokens": int(np.mean([run["tokens"] for run in numbers])),
        "silent_tokens": float(np.mean([run["silent"] for run in numbers])),
        "colourings": colourings,
        "map": drawn,
    }


def draw(results: dict[str, Any], path: Path) -> None:
    """The map in three colourings, and beside it the page that shows each token in its text."""
    from tsae.experiments.tsne.figure import draw_panels
    from tsae.experiments.tsne.page import write_page

    draw_panels(results, path)
    write_page(results, path.with_suffix(".html"))


class _Choice(NamedTuple):
    """N tokens: where they are, and their places among all that were encoded."""

    rows: np.ndarray
    positions: np.ndarray
    place: np.ndarray


class _Material(NamedTuple):
    """What all splits of one subject share."""

    texts: TextActivations
    tags: Tags
    features: Features
    chosen: list[_Choice]


@lru_cache(maxsize=1)
def _material(subject: Subject, settings: TsneConfig) -> _Material:
    """Texts, tags, the tokens of each choice of texts, and the feature activations of all of them."""
    texts = harvest_dataset(subject, settings.dataset)
    usable = np.flatnonzero(texts.valid.sum(1) >= settings.tokens)
    if not len(usable):
        raise TsaeError(
            f"experiments.tsne.tokens: no text has {settings.tokens} tokens after its first ones; the longest of "
            f"{len(texts.texts)} has {int(texts.valid.sum(1).max())}"
        )
    sites = [
        _last_tokens(texts, _some_texts(texts, usable, settings, seed), settings.tokens)
        for seed in range(settings.seeds)
    ]
    keys = [rows * texts.valid.shape[1] + positions for rows, positions in sites]
    unique, places = np.unique(np.concatenate(keys), return_inverse=True)
    rows, positions = np.divmod(unique, texts.valid.shape[1])
    features = texts.features(subject, rows, positions)
    ends = np.cumsum([len(key) for key in keys])[:-1]
    chosen = [_Choice(*site, place) for site, place in zip(sites, np.split(places, ends), strict=True)]
    tags = tags_of(texts.texts, texts.offsets, find_tagger(settings.tagger, settings.dataset))
    return _Material(texts, tags, features, chosen)


def _some_texts(texts: TextActivations, usable: np.ndarray, settings: TsneConfig, seed: int) -> np.ndarray:
    """Equal shares of the classes, drawn at random; ascending."""
    random = np.random.default_rng(seed)
    share = -(-settings.texts // len(texts.label_names))
    order = random.permutation(usable)
    chosen = [order[texts.label[order] == label][:share] for label in range(len(texts.label_names))]
    return np.sort(random.permutation(np.concatenate(chosen))[: settings.texts])


def _last_tokens(texts: TextActivations, rows: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    positions = np.concatenate([np.flatnonzero(texts.valid[row])[-count:] for row in rows])
    return np.repeat(rows, count), positions


def _labels(material: _Material, chosen: _Choice) -> dict[str, np.ndarray]:
    """The three labels of N tokens."""
    return {
        "semantics": material.texts.label[chosen.rows],
        "context": chosen.rows,
        "syntax": material.tags.of_token[chosen.rows, chosen.positions],
    }


def _meaning(material: _Material, label: str) -> str:
    meanings = {
        "semantics": "label of the text",
        "context": "which text a token is from",
        "syntax": material.tags.tagger,
    }
    return meanings[label]


def _numbers(material: _Material, chosen: _Choice, latents: slice, settings: TsneConfig) -> dict[str, Any]:
    x, kept = _space(material, chosen, latents, settings)
    found: dict[str, Any] = {"tokens": len(kept), "silent": 1 - len(kept) / len(chosen.rows)}
    for name, label in _labels(material, chosen).items():
        text = chosen.rows[kept] if name == "semantics" else None
        share, chance = purity(x, label[kept], settings.neighbours, text)
        if share != share:
            raise TsaeError(
                f"tsne {name}: too few tokens have {settings.neighbours} others to be compared with; give more texts "
                "(experiments.tsne.texts) or ask for fewer neighbours"
            )
        found[name] = {"purity": share, "chance": chance, "silhouette": silhouette(x, label[kept])}
    return found


def _space(material: _Material, chosen: _Choice, latents: slice, settings: TsneConfig) -> tuple[Any, np.ndarray]:
    """Unit rows of the tokens on which some latent of the split is active. Raises TsaeError if hardly any is."""
    x, kept = unit_rows(material.features[chosen.place][:, latents])
    if len(kept) <= 3 * settings.neighbours:
        raise TsaeError(
            f"tsne: only {len(kept)} of {len(chosen.rows)} tokens have an active latent in this split; its latents are "
            "dead, or the dictionary was trained on another model"
        )
    return x, kept


def _map(material: _Material, latents: slice, settings: TsneConfig) -> tuple[dict[str, Any], str]:
    """The points of the first choice with their labels and texts."""
    texts, chosen = material.texts, material.chosen[0]
    x, kept = _space(material, chosen, latents, settings)
    points, reduction = draw_map(x, settings.dimensions, settings.perplexity, 0)
    shown = np.unique(chosen.rows)
    first = {row: max(0, int(chosen.positions[chosen.rows == row].min()) - BEFORE) for row in shown}
    rows, positions = chosen.rows[kept], chosen.positions[kept]
    drawn = {
        "x": np.round(points[:, 0].astype(float), 2).tolist(),
        "y": np.round(points[:, 1].astype(float), 2).tolist(),
        "text": np.searchsorted(shown, rows).tolist(),
        "token": [int(position - first[row]) for row, position in zip(rows, positions, strict=True)],
        "semantics": texts.label[rows].tolist(),
        "syntax": material.tags.of_token[rows, positions].tolist(),
        "semantics_names": list(texts.label_names),
        "syntax_names": list(material.tags.names),
        "tokens": [_pieces(texts, row, first[row]) for row in shown.tolist()],
    }
    return drawn, reduction


def _pieces(texts: TextActivations, row: int, first: int) -> list[str]:
    """The text from token `first` on, token by token, with what lies between them."""
    end = int(texts.lengths[row])
    text, offsets = texts.texts[row].text, texts.offsets[row]
    starts = [int(offsets[position, 0]) for position in range(first, end)] + [int(offsets[end - 1, 1])]
    return [text[start:stop] for start, stop in pairwise(starts)]


def _refuse(settings: TsneConfig) -> None:
    """Raise TsaeError for settings that no map can be made with."""
    fewest = {"texts": 2, "tokens": 1, "dimensions": 2, "perplexity": 1, "neighbours": 1, "seeds": 1}
    for name, least in fewest.items():
        if getattr(settings, name) < least:
            raise TsaeError(f"experiments.tsne.{name}: {getattr(settings, name)} is impossible; at least {least}")
