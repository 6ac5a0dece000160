"""`tsae features`: one HTML page with all latents of a run, which needs no network, no server and nothing beside it.

features.html       table of latents, their histograms and examples
features.png/.json  firing rates and smoothness by split
"""

from __future__ import annotations

import base64
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import numpy as np
from torch import Tensor

from tsae import pages
from tsae.checkpoint import load_dictionary
from tsae.config.experiments import FeaturesConfig
from tsae.experiments.features import data
from tsae.experiments.features.figure import draw
from tsae.experiments.shared.firings import Firings, LatentStatistics, collect, latent_statistics, token_texts
from tsae.experiments.shared.subject import Subject
from tsae.interop.explanations import find_explanations, read_explanations
from tsae.interop.settings import find_beside
from tsae.lm.unembedding import unembedding
from tsae.runtime import files, metadata
from tsae.runtime.errors import TsaeError
from tsae.runtime.metadata import NATURAL
from tsae.runtime.progress import Progress
from tsae.store.rolling import open_store

__all__ = ["draw", "measure"]

log = logging.getLogger(__name__)

RATE_EDGES = [10 ** (power / 4) for power in range(-24, 1)]
"""Bins of firing rates: four to a factor of ten, from a millionth to 1."""
HIGH_LEVEL, LOW_LEVEL, ALL = "high-level", "low-level", "all"


def measure(subject: Subject, settings: FeaturesConfig) -> dict[str, Any]:
    """Write the page; the figures of the latents, binned by firing rate.

    Raises TsaeError for a synthetic world, settings that cannot work, and a store without text.
    """
    _check(subject, settings)
    store = open_store(subject.config)
    # The order of the store is random: its beginning is a sample of all documents.
    firings = collect(subject, store, range(min(settings.sequences, store.n_sequences)), "features")
    statistics = latent_statistics(firings)
    labels = data.spread_over_labels(firings, store.label, store.label_names)
    page = write_page(subject, settings, firings, statistics, labels)
    return {
        "page": page.name,
        "tokens": firings.n_tokens,
        "sequences": len(firings.tokens),
        "explained": len(subject.explanations),
        "rate_edges": RATE_EDGES,
        "splits": {name: _split(statistics, part) for name, part in _splits(subject).items()},
        **_headline(subject, statistics),
    }


def write_page(
    subject: Subject,
    settings: FeaturesConfig,
    firings: Firings,
    statistics: LatentStatistics,
    labels: data.Labels | None,
) -> Path:
    """Write the page of latents; its path."""
    rows, beside = subject.dictionary.W_dec.detach(), _beside(subject, settings.beside)
    spoken = _spoken(subject, rows) if settings.logits else None
    used = np.unique(
        np.concatenate([firings.tokens.reshape(-1), np.zeros(0, int) if spoken is None else spoken.reshape(-1)])
    )
    types = np.searchsorted(used, firings.tokens.reshape(-1))
    strings = token_texts(subject.tokenizer, used.tolist())
    progress = Progress(f"features {subject.name}: examples", firings.dict_size, "latents", subject.run.progress)
    largest = np.nan_to_num(statistics.largest, nan=1.0)
    examples = data.find_examples(firings, largest, settings, progress)
    explanations = subject.explanations
    about = subject.description() | {
        "tokens": firings.n_tokens,
        "groups": list(subject.dictionary.group_sizes),
        "strings": [strings[token] for token in used.tolist()],
        "explanations": [explanations.get(latent) for latent in range(firings.dict_size)],
        "rate_edges": RATE_EDGES,
        **({} if beside is None else {"beside": beside.about}),
        **({} if labels is None else {"labels": labels.names, "label_base": labels.base}),
    }
    arrays = {
        **data.columns(statistics, subject.dictionary.group_sizes, _detection(subject, explanations)),
        "histogram": data.histograms(firings, largest),
        "top_tokens": data.top_tokens(firings, types),
        "text": types.astype(np.uint16 if len(used) <= 1 << 16 else np.uint32),
        **({} if spoken is None else {"spoken": np.searchsorted(used, spoken).astype(np.uint32)}),
        **({} if labels is None else {"label_share": labels.share}),
        **_neighbours(subject, writing=(rows, None), reading=(subject.dictionary.W_enc.detach().T, None)),
        **({} if beside is None else _neighbours(subject, beside=(rows, beside.rows))),
        **{f"example_{name}": array for name, array in examples._asdict().items()},
    }
    suffix = "" if subject.checkpoint is None else f"_step{subject.checkpoint}"
    path = subject.run.result(f"features{suffix}", "html")
    packed = base64.b64encode(data.pack(about, arrays)).decode()
    title = f"{subject.name}: latents"
    files.write_text(path, pages.render("experiments/features/page.html", title=title, name=subject.name, data=packed))
    return path


def _spoken(subject: Subject, rows: Tensor) -> np.ndarray | None:
    """The tokens that `data.spoken` gives; None, said once, where no final norm and output layer are found."""
    head = unembedding(subject.language_model)
    if head is None:
        log.warning(
            "%s: its output layer is not one that latents can be read through; none is", subject.config.model.name
        )
        return None
    progress = Progress(f"features {subject.name}: logits", len(rows), "latents", subject.run.progress)
    return data.spoken(rows.to(head.weight.device), head, progress)[0]


class _Beside(NamedTuple):
    """Another dictionary, whose latents are matched with those of the page."""

    rows: Tensor
    """[G, D] its decoder's."""
    about: dict[str, Any]
    """Its name, its own page from here (empty: it has none), and what its latents are said to be."""


def _beside(subject: Subject, name: str | None) -> _Beside | None:
    """The run `name`. Raises TsaeError for what cannot be compared."""
    if name is None:
        return None
    other = find_beside(subject.run, name)
    dictionary, _ = load_dictionary(other.path, calibrated=False)
    if dictionary.activation_dim != subject.dictionary.activation_dim:
        raise TsaeError(
            f"experiments.features.beside: {name} reads activations of {dictionary.activation_dim} dimensions, "
            f"{subject.name} those of {subject.dictionary.activation_dim}"
        )
    found, page = find_explanations(other), other.result("features", "html")
    about = {
        "name": other.path.parent.name,
        "page": quote(os.path.relpath(page, subject.run.measured)) if page.exists() else "",
        "explanations": {} if found is None else read_explanations(found),
    }
    return _Beside(dictionary.W_dec.detach(), about)


def _neighbours(subject: Subject, **sides: tuple[Tensor, Tensor | None]) -> dict[str, np.ndarray]:
    found = {}
    for side, (rows, others) in sides.items():
        progress = Progress(f"features {subject.name}: nearest, {side}", len(rows), "latents", subject.run.progress)
        found[f"near_{side}"], found[f"near_{side}_cosine"] = data.neighbours(rows, others, progress)
    return found


def _check(subject: Subject, settings: FeaturesConfig) -> None:
    if without := subject.config.without_text:
        raise TsaeError(f"{subject.run.path}: was trained on {without}, without text to show")
    if settings.before + settings.after >= data.LONGEST:
        raise TsaeError(
            f"experiments.features.before and after: {settings.before} and {settings.after} are impossible; "
            f"an example has at most {data.LONGEST} tokens"
        )


def _detection(subject: Subject, explanations: Mapping[int, str]) -> dict[int, float]:
    """Latent → detection score, of those explanations on the page that `tsae explain` made and scored."""
    suffix = "" if subject.checkpoint is None else f"_step{subject.checkpoint}"
    made, scored = (
        metadata.records(subject.run.result(f"autointerp{suffix}_{stage}", "jsonl"), {"latent": NATURAL, key: told})[0]
        for stage, key, told in (("explanations", "explanation", str), ("scores", "detection", {"score": float}))
    )
    texts = {line["latent"]: line["explanation"] for line in made}
    return {
        line["latent"]: line["detection"]["score"]
        for line in scored
        if line["latent"] in explanations and texts.get(line["latent"]) == explanations[line["latent"]]
    }


def _splits(subject: Subject) -> dict[str, slice]:
    groups = subject.dictionary.group_slices
    if len(groups) < 2:
        return {ALL: groups[0]}
    return {HIGH_LEVEL: groups[0], LOW_LEVEL: slice(groups[0].stop, subject.dictionary.dict_size)}


def _split(statistics: LatentStatistics, part: slice) -> dict[str, Any]:
    """Latents of a split by firing rate: how many, and the quartiles of their smoothness and persistence."""
    rate = statistics.rate[part]
    level = np.searchsorted(RATE_EDGES, rate, side="right") - 1
    count = np.bincount(level[(level >= 0) & (rate > 0)].clip(0, len(RATE_EDGES) - 2), minlength=len(RATE_EDGES) - 1)
    quartiles = {
        name: [_quartiles(getattr(statistics, name)[part][level == bin_]) for bin_ in range(len(RATE_EDGES) - 1)]
        for name in ("smoothness", "persistence")
    }
    return {"latents": len(rate), "silent": int((rate == 0).sum()), "count": count.tolist(), **quartiles}


def _quartiles(values: np.ndarray) -> list[float] | None:
    """Quartiles of a few latents; None of fewer than five."""
    values = values[~np.isnan(values)]
    return np.quantile(values, [0.25, 0.5, 0.75]).tolist() if len(values) >= 5 else None


def _headline(subject: Subject, statistics: LatentStatistics) -> dict[str, Any]:
    """Means over the latents that fire, with half-widths over latents."""
    from tsae.evaluation.statistics import mean_interval

    shown, half = {}, {}
    for split, part in {ALL: slice(None), **_splits(subject)}.items():
        fires = np.flatnonzero(statistics.rate[part] > 0)
        for name in ("persistence", "smoothness"):
            column = getattr(statistics, name)[part][fires]
            mean, width = mean_interval(column, np.arange(len(column)))
            if not np.isnan(mean):
                key = name if split == ALL else f"{name}_{split.removesuffix('-level')}"
                shown[key], half[key] = mean, width
    return {"headline": shown, "half_width_95": {key: width for key, width in half.items() if not np.isnan(width)}}
