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

from tsae import pages
from tsae.config.experiments import TsneConfig
from tsae.evaluation.statistics import over_seeds
from tsae.experiments.shared.subject import Subject
from tsae.experiments.shared.tags import Tags, find_tagger, tags_of
from tsae.experiments.shared.texts import TextActivations, harvest_dataset, texts_read
from tsae.runtime import files
from tsae.runtime.environment import available_cores
from tsae.runtime.errors import TsaeError
from tsae.runtime.preemption import polled
from tsae.runtime.progress import Progress

if TYPE_CHECKING:
    from scipy.sparse import csr_array

    from tsae.experiments.shared.firings import Features

COLOURINGS = ("semantics", "context", "syntax")
RELEASED_SIZE, RELEASED_PERPLEXITY = (200, 30), 30.0
"""Texts, and last tokens of each, on the released code's map; its perplexity, which is scikit-learn's."""
BEFORE = 24
"""Tokens of a text before the first one on the map that the page shows around it."""


def measure(subject: Subject, settings: TsneConfig, chunk: int) -> dict[str, Any]:
    """Purity and silhouette of the three labels, and the map of the first choice of texts."""
    material = _material(subject, settings)
    latents = subject.latents(chunk)
    progress = Progress(f"tsne {subject.name} chunk {chunk}", settings.seeds + 1, "steps")
    numbers = []
    for seed, chosen in enumerate(material.chosen):
        numbers.append(_numbers(material, chosen, latents, settings))
        progress.update(seed + 1, neighbours=settings.neighbours)
    drawn, made = _map(material, latents, settings)
    progress.update(settings.seeds + 1)
    colourings = {}
    for label in COLOURINGS:
        entry: dict[str, Any] = {"labels": _meaning(material, label)}
        for name in ("purity", "chance", "silhouette"):
            found = over_seeds([run[label][name] for run in numbers])
            # The silhouette of one class is no number.
            entry[name], entry[f"{name}_half_width"] = (None, None) if np.isnan(found[0]) else found
        colourings[label] = entry
    return {
        "headline": {label: colourings[label]["purity"] for label in COLOURINGS},
        "half_width_95": {label: colourings[label]["purity_half_width"] for label in COLOURINGS},
        "headline_is": f"share of the {settings.neighbours} nearest neighbours with the same label, by cosine",
        "reduction": f"{made.reduction}, then t-SNE of perplexity {made.perplexity:.3g}",
        "perplexity": made.perplexity,
        "differs_from_released_code": _differences(subject, settings, made),
        "texts": texts_read(subject, material.texts, settings.dataset),
        "tokens": int(np.mean([run["tokens"] for run in numbers])),
        "silent_tokens": float(np.mean([run["silent"] for run in numbers])),
        "colourings": colourings,
        "map": drawn,
    }


def _differences(subject: Subject, settings: TsneConfig, made: Reduced) -> list[str]:
    """What the map does in another way than the released code, which gives feature activations as they are to
    scikit-learn's `TSNE(2, random_state=42)`, in words."""
    read = subject.config.experiments.texts
    found = [
        "feature activations of a token are scaled to length 1; there taken as they are",
        "tokens without an active latent in the split are left out; there they are on the map",
        f"{made.reduction} before t-SNE; there none",
        f"angle {ANGLE} and {MAX_ITERATIONS} steps of t-SNE by seed {MAP_SEED}; there 0.5, 1000 and seed 42",
        f"texts are drawn in equal shares of the classes among {read.count} of at least {read.min_characters} characters, "
        f"each cut at {read.context_length} tokens; there the first of the dataset shuffled by seed 42",
        "syntactic classes are those of the tokens in their text; there of each token alone",
    ]
    if (settings.texts, settings.tokens) != RELEASED_SIZE:
        found.append(
            f"the last {settings.tokens} tokens of {settings.texts} texts; there {RELEASED_SIZE[1]} of {RELEASED_SIZE[0]}"
        )
    if made.perplexity != RELEASED_PERPLEXITY:
        found.append(f"perplexity {made.perplexity:.3g}; there {RELEASED_PERPLEXITY:g}")
    return found


def draw(results: dict[str, Any], path: Path) -> None:
    """The map in three colourings, and beside it the page that shows each token in its text."""
    from tsae.experiments.tsne.figure import draw_panels

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
    tagger = find_tagger(settings.tagger, settings.dataset, "experiments.tsne.tagger")
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
    tags = tags_of(texts.texts, texts.offsets, tagger)
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


def _map(material: _Material, latents: slice, settings: TsneConfig) -> tuple[dict[str, Any], Reduced]:
    """The points of the first choice with their labels and texts."""
    texts, chosen = material.texts, material.chosen[0]
    x, kept = _space(material, chosen, latents, settings)
    made = draw_map(x, settings.dimensions, settings.perplexity, MAP_SEED)
    shown = np.unique(chosen.rows)
    first = {row: max(0, int(chosen.positions[chosen.rows == row].min()) - BEFORE) for row in shown}
    rows, positions = chosen.rows[kept], chosen.positions[kept]
    drawn = {
        "x": np.round(made.points[:, 0].astype(float), 2).tolist(),
        "y": np.round(made.points[:, 1].astype(float), 2).tolist(),
        "text": np.searchsorted(shown, rows).tolist(),
        "token": [int(position - first[row]) for row, position in zip(rows, positions, strict=True)],
        "semantics": texts.label[rows].tolist(),
        "syntax": material.tags.of_token[rows, positions].tolist(),
        "semantics_names": list(texts.label_names),
        "syntax_names": list(material.tags.names),
        "tokens": [_pieces(texts, row, first[row]) for row in shown.tolist()],
    }
    return drawn, made


def _pieces(texts: TextActivations, row: int, first: int) -> list[str]:
    """The text from token `first` on, token by token, with what lies between them."""
    end = int(texts.lengths[row])
    text, offsets = texts.texts[row].text, texts.offsets[row]
    starts = [int(offsets[position, 0]) for position in range(first, end)] + [int(offsets[end - 1, 1])]
    return [text[start:stop] for start, stop in pairwise(starts)]


ROWS_AT_ONCE = 1000
MAP_SEED = 0
MAX_ITERATIONS = 500
"""Steps of t-SNE; twice as many change its loss by a hundredth."""
ANGLE = 0.8
"""Coarseness of the Barnes-Hut sums; a quarter less time than scikit-learn's 0.5, and the same loss."""


class Reduced(NamedTuple):
    """Points of the map [N, 2]."""

    points: np.ndarray
    reduction: str
    """What was done before t-SNE."""
    perplexity: float
    """The wanted one, or a third of the neighbours that a token has, if that is less."""


def unit_rows(features: csr_array | np.ndarray) -> tuple[Any, np.ndarray]:
    """The rows that are not zero, at length 1, and which those are."""
    from sklearn.preprocessing import normalize

    kept = np.flatnonzero(np.asarray(abs(features).sum(1)).ravel() > 0)
    return normalize(features.astype(np.float32))[kept], kept


def purity(x: Any, label: np.ndarray, neighbours: int, text: np.ndarray | None = None) -> tuple[float, float]:
    """Share of the nearest neighbours of a token that have its label, averaged over tokens; and what chance gives.

    Tokens of one `text` [N], if given, are no neighbours of each other. `label` [N] is -1 for tokens without one,
    which are left out. NaN if no token has enough others.
    """
    known = np.flatnonzero(label >= 0)
    x, label = x[known], label[known]
    text = None if text is None else text[known]
    size = np.bincount(label, minlength=1)
    found, chance = [], []
    for start in polled(range(0, len(label), ROWS_AT_ONCE)):
        mine = np.arange(start, min(start + ROWS_AT_ONCE, len(label)))
        likeness = x[mine] @ x.T
        likeness = likeness if isinstance(likeness, np.ndarray) else likeness.toarray()
        likeness[mine - start, mine] = -np.inf
        alike = size[label[mine]] - 1.0
        others = np.full(len(mine), len(label) - 1.0)
        if text is not None:
            same = text[mine][:, None] == text
            likeness[same] = -np.inf
            others = len(label) - same.sum(1).astype(float)
            alike = size[label[mine]] - (same & (label[mine][:, None] == label)).sum(1)
        enough = others >= neighbours
        if len(label) <= neighbours or not enough.any():
            continue
        nearest = np.argpartition(likeness, -neighbours, axis=1)[:, -neighbours:]
        found.append((label[nearest] == label[mine][:, None]).mean(1)[enough])
        chance.append((alike / np.maximum(others, 1))[enough])
    if not found:
        return float("nan"), float("nan")
    return float(np.concatenate(found).mean()), float(np.concatenate(chance).mean())


def silhouette(x: Any, label: np.ndarray) -> float:
    """Mean silhouette by cosine distance over tokens with a label, as scikit-learn defines it; NaN without two classes.

    The mean cosine to a class is the product with its mean row, so that no distance of two tokens is ever needed.
    """
    known = np.flatnonzero(label >= 0)
    names, label = np.unique(label[known], return_inverse=True)
    if len(names) < 2:
        return float("nan")
    x = x[known]
    member = np.zeros((len(names), len(label)), np.float32)
    member[label, np.arange(len(label))] = 1
    size = member.sum(1)
    sums = np.asarray(x @ np.asarray(member @ x).T, np.float64)  # [N, C] cosines to all tokens of a class, summed
    own = np.arange(len(label)), label
    others = np.maximum(size[label] - 1, 1)
    within = 1 - (sums[own] - 1) / others
    between = 1 - sums / size
    between[own] = np.inf
    nearest = between.min(1)
    values = (nearest - within) / np.maximum(np.maximum(within, nearest), 1e-12)
    return float(np.where(size[label] > 1, values, 0).mean())


def draw_map(x: Any, dimensions: int, perplexity: float, seed: int) -> Reduced:
    """t-SNE of the tokens after a singular value decomposition to `dimensions`."""
    from sklearn.decomposition import PCA, TruncatedSVD
    from sklearn.manifold import TSNE

    sparse = not isinstance(x, np.ndarray)
    dimensions = min(dimensions, x.shape[0] - 1, x.shape[1] - 1)
    kind: Any = TruncatedSVD if sparse else PCA
    decomposition = kind(dimensions, random_state=seed)
    reduced = decomposition.fit_transform(x)
    share = float(decomposition.explained_variance_ratio_.sum())
    perplexity = min(perplexity, (len(reduced) - 1) / 3)
    tsne = TSNE(
        2,
        perplexity=perplexity,
        init="pca",
        random_state=seed,
        max_iter=MAX_ITERATIONS,
        angle=ANGLE,
        n_jobs=available_cores(),
    )
    name = "truncated SVD" if sparse else "PCA"
    reduction = f"{name} to {dimensions} dimensions ({share:.0%} of the variance)"
    return Reduced(tsne.fit_transform(reduced), reduction, perplexity)


def write_page(results: dict[str, Any], path: Path) -> None:
    """Write the page of a map's results, with all it needs inside."""
    subject = results["subject"]
    title = f"{subject['run']}, {results['split']}: {len(results['map']['x'])} tokens"
    about = (
        f"{subject['model']} layer {subject['layer']}, {results['texts']['dataset']}. {results['reduction']}. Purity and "
        f"silhouette are measured by cosine in the original space. Press the name of a class to bring its tokens out."
    )
    shown = {"map": results["map"], "colourings": results["colourings"]}
    files.write_text(path, pages.render("experiments/tsne/page.html", title=title, about=about, data=shown))
