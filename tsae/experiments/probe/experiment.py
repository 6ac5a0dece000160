"""Sparse and dense linear probes for semantics, context and syntax (paper section 4.2, figures 3 and 6 to 8).

A sparse probe sees k features, chosen on the training tokens by the difference of their means on a class and on the
rest. Texts of test tokens are never trained on; where the text itself is the label (`context`), test tokens lie some
way off. Every number is a mean over splits, beside that of the same probes on shuffled labels and of the majority.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from tsae.config.experiments import ProbeConfig
from tsae.evaluation.statistics import over_seeds
from tsae.experiments.probe import fit as probe_fit
from tsae.experiments.probe.samples import (
    REFERENCE_LAST,
    REFERENCE_TEXTS,
    Samples,
    choose_samples,
    reference_length,
    reference_texts,
    split,
)
from tsae.experiments.shared.subject import Subject
from tsae.experiments.shared.tags import find_tagger
from tsae.experiments.shared.texts import MAX_READ, TextActivations, harvest_dataset, texts_read
from tsae.runtime.errors import TsaeError
from tsae.runtime.progress import Progress

if TYPE_CHECKING:
    from tsae.experiments.probe.fit import Scores
    from tsae.experiments.shared.firings import Features

HEADLINE = 5
"""Features of the probes whose balanced accuracy stands for a task."""
REFERENCE_FEATURES = 10
"""Features a class of the released code's one probe."""
RELEASED_TEXTS, RELEASED_LENGTH, RELEASED_TAGGER = 4000, 2048, "parts of speech by spaCy en_core_web_sm"


def measure(subject: Subject, settings: ProbeConfig, chunk: int) -> dict[str, Any]:
    """Accuracies of the probes of each task on the latents of one split. Raises TsaeError for unusable samples."""
    material = _material(subject, settings)
    latents = subject.latents(chunk)
    progress = Progress(f"probe {subject.name} chunk {chunk}", len(settings.tasks) * settings.seeds, "splits")
    tasks = {}
    for number, (task, samples) in enumerate(material.samples.items()):
        features = material.features[task][:, latents]
        if not abs(features).sum():
            raise TsaeError(
                f"probe {task}: no latent of this split is active on any of {len(samples.label)} tokens; its latents "
                "are dead, or the dictionary was trained on another model"
            )
        found = []
        for seed in range(settings.seeds):
            found.append(_one_split(features, samples, settings, task, seed))
            progress.update(number * settings.seeds + seed + 1, task=task)
        tasks[task] = _summary(found, samples, settings)
    reference = settings.protocol == "reference"
    headline = {task: _at_headline(tasks[task]["probes"], settings) for task in tasks}
    return {
        "headline": {task: entry["balanced_accuracy"] for task, entry in headline.items()},
        "half_width_95": {task: entry["balanced_accuracy_half_width"] for task, entry in headline.items()},
        "headline_is": f"balanced accuracy with {_headline_k(settings)} features a class, over {settings.seeds} splits",
        "candidate_features": latents.stop - latents.start,
        "texts": texts_read(subject, material.texts, settings.dataset),
        **({"differs_from_released_code": _differences(subject, material, settings)} if reference else {}),
        "tasks": tasks,
    }


def _differences(subject: Subject, material: _Material, settings: ProbeConfig) -> list[str]:
    """What protocol `reference` still does in another way than the released code, in words."""
    texts, length = material.texts, reference_length(subject, settings)
    found = [
        f"texts are a sample, by a fixed seed, of the first {MAX_READ} of the classes; blank ones are passed over",
        f"mean over {settings.seeds} random splits by fixed seeds; there, one without a seed",
        "feature activations are multiplied by the norms of their decoder rows, which are 1 for the authors' SAEs",
    ]
    if len(texts.texts) != RELEASED_TEXTS:
        found.append(f"{len(texts.texts)} texts; there {RELEASED_TEXTS}")
    if length != RELEASED_LENGTH:
        found.append(f"texts are cut at {length} tokens; there at {RELEASED_LENGTH}")
    if "context" in material.samples:
        count = len(material.samples["context"].names)
        found.append(
            "context: labels and tokens are split alike; there, tokens are taken by the indices of another array"
        )
        found.append(
            f"context: texts of fewer than {REFERENCE_LAST} tokens are passed over"
            + (f", and {count} are left; there {REFERENCE_TEXTS}" if count != REFERENCE_TEXTS else "")
        )
    if "syntax" in material.samples and not material.samples["syntax"].labels_from.startswith(RELEASED_TAGGER):
        found.append(f"syntax: {material.samples['syntax'].labels_from}; there {RELEASED_TAGGER}")
    return found


def draw(results: dict[str, Any], path: Path) -> None:
    """Accuracy against the number of features, a panel for each task."""
    from tsae.experiments.probe.figure import draw_curves

    draw_curves(results, path)


class _Material(NamedTuple):
    """What all splits of one subject share."""

    texts: TextActivations
    samples: dict[str, Samples]
    features: dict[str, Features]


@lru_cache(maxsize=1)
def _material(subject: Subject, settings: ProbeConfig) -> _Material:
    """Texts, samples and the feature activations of all latents."""
    reference, tokenizer = settings.protocol == "reference", subject.tokenizer
    # Looked for before the texts are harvested, which may take long.
    tags = "syntax" in settings.tasks
    tagger = find_tagger(settings.tagger, settings.dataset, "experiments.probe.tagger") if tags else None
    texts = reference_texts(subject, settings) if reference else harvest_dataset(subject, settings.dataset)
    samples: dict[str, Samples] = {
        task: choose_samples(texts, settings, task, tagger, lambda tokens: str(tokenizer.decode(tokens)))
        for task in settings.tasks
    }
    features: dict[str, Features] = {
        task: texts.features(subject, found.rows, found.positions) for task, found in samples.items()
    }
    return _Material(texts, samples, features)


def _one_split(
    features: Features, samples: Samples, settings: ProbeConfig, task: str, seed: int
) -> dict[str, dict[int | None, Scores]]:
    """Scores of the probes by their number of features (None: all), on true and on shuffled labels."""
    train, test = split(samples, settings, task, seed)
    data = probe_fit.take(features, samples.label, train, test)
    if len(np.unique(data.train_label)) < 2 or not len(test):
        raise TsaeError(
            f"probe {task}: split {seed} leaves {len(train)} tokens to train on and {len(test)} to test with, of "
            f"{len(np.unique(data.train_label))} classes; raise experiments.texts.count or experiments.probe.tokens "
            "(of protocol reference: experiments.probe.reference_texts)"
        )
    shuffled = np.random.default_rng([seed, 2]).permutation(data.train_label)
    probes = _reference if settings.protocol == "reference" else _sparse_and_dense
    return {
        "true": probes(data, data.train_label, settings),
        "shuffled": probes(data, shuffled, settings),
        "majority": {0: probe_fit.majority(data)},
    }


def _sparse_and_dense(data: probe_fit.Split, label: np.ndarray, settings: ProbeConfig) -> dict[int | None, Scores]:
    scores: dict[int | None, Scores] = dict(probe_fit.sparse_probes(data, label, settings.features).items())
    return scores | {None: probe_fit.dense_probe(data, label)}


def _reference(data: probe_fit.Split, label: np.ndarray, settings: ProbeConfig) -> dict[int | None, Scores]:
    return {k: probe_fit.reference_probe(data, label, k) for k in _counts(settings) if k is not None}


def _summary(
    found: list[dict[str, dict[int | None, Scores]]], samples: Samples, settings: ProbeConfig
) -> dict[str, Any]:
    """Means over splits with half-widths of their 95 % intervals."""
    majority = [entry["majority"][0] for entry in found]
    probes = []
    for k in _counts(settings):
        entry: dict[str, Any] = {"features": "all" if k is None else k}
        for kind, prefix in (("true", ""), ("shuffled", "shuffled_")):
            scores = [run[kind][k] for run in found]
            for name in ("accuracy", "balanced_accuracy", "one_vs_rest"):
                values = [getattr(score, name) for score in scores]
                if None not in values:
                    entry[prefix + name], entry[f"{prefix}{name}_half_width"] = over_seeds(values)
        probes.append(entry)
    return {
        "labels": samples.labels_from,
        "classes": {name: int((samples.label == i).sum()) for i, name in enumerate(samples.names)},
        "left_out": list(samples.left_out),
        "tokens": len(samples.label),
        "majority_accuracy": over_seeds([score.accuracy for score in majority])[0],
        "majority_balanced_accuracy": over_seeds([score.balanced_accuracy for score in majority])[0],
        "probes": probes,
    }


def _counts(settings: ProbeConfig) -> tuple[int | None, ...]:
    """Features of each probe; None: all."""
    return (REFERENCE_FEATURES,) if settings.protocol == "reference" else (*settings.features, None)


def _headline_k(settings: ProbeConfig) -> int:
    return min((k for k in _counts(settings) if k is not None), key=lambda k: abs(k - HEADLINE))


def _at_headline(probes: list[dict[str, Any]], settings: ProbeConfig) -> dict[str, Any]:
    return next(entry for entry in probes if entry["features"] == _headline_k(settings))
