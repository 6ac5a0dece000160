"""The first stage of `tsae explain`: texts with true activations, to explain each latent from and to score it on.

Explanations are written from the training part of the store and scored on its held-out part, so no document serves
both. A text counts as inactive after its activations were looked at, never because it was drawn at random.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from tsae.config.experiments import ExplainConfig
from tsae.experiments.explain.explainers import TokenRules
from tsae.experiments.shared.firings import (
    Firings,
    Windows,
    any_per_document,
    collect,
    cut,
    excerpt,
    latent_statistics,
    peaks,
    silent,
    spread,
    strongest_per_document,
    token_texts,
)
from tsae.experiments.shared.subject import Subject
from tsae.runtime import preemption
from tsae.runtime.errors import TsaeError
from tsae.runtime.progress import Progress
from tsae.store.rolling import open_store

LEAST_TEXTS = 4
"""Documents in which a latent must be active to be explained, and active and inactive ones that score it."""
MOST_BY_RULE, MOST_BY_MODEL = 2048, 200
DECADES = (1e-4, 1e-3, 1e-2, 1e-1)
"""Edges of the strata of firing rates."""


class _Part(NamedTuple):
    firings: Firings
    windows: Windows


def wanted_latents(settings: ExplainConfig) -> int:
    """How many latents are explained, if so many can be."""
    return settings.latents or (MOST_BY_RULE if settings.answers.backend == "none" else MOST_BY_MODEL)


def stratum(rate: float) -> int:
    """Which of the strata, from rare to frequent, a firing rate is in."""
    return int(np.searchsorted(DECADES, rate, side="right"))


def collect_examples(subject: Subject, settings: ExplainConfig) -> list[dict[str, Any]]:
    """One record per latent, in the order of the latents: its texts, or the reason why it cannot be explained.

    Raises TsaeError without text, without a held-out part, and if no latent can be explained.
    """
    explaining, scoring, strings = _read(subject, settings)
    statistics = latent_statistics(explaining.firings)
    groups = np.repeat(np.arange(len(subject.dictionary.group_sizes)), subject.dictionary.group_sizes)
    about: list[dict[str, Any]] = [
        {"latent": latent, "group": int(groups[latent]), "rate": float(f"{statistics.rate[latent]:.4g}")}
        for latent in range(len(groups))
    ]
    reasons = [_reason(explaining, scoring, latent) for latent in range(len(groups))]
    testable = [latent for latent, reason in enumerate(reasons) if not reason]
    if not testable:
        most = max(sorted(set(reasons)), key=reasons.count)
        raise TsaeError(f"{subject.run.path}: no latent can be explained; of most: {most}; read more sequences")
    drawn = _drawn(testable, groups, statistics.rate, settings)
    rules = TokenRules(*explaining)
    progress = Progress(f"explain {subject.name}: examples", len(drawn), "latents", subject.run.progress)
    for done, latent in enumerate(preemption.polled(drawn), start=1):
        generator = np.random.default_rng([settings.seed, latent])
        about[latent] |= _texts(explaining, scoring, latent, settings, strings, generator)
        active, _ = peaks(*explaining, latent)
        about[latent]["rule"] = {
            "on": [strings[token] for token in rules.fires_on(latent)],
            "given_away_by": [strings[token] for token in rules.given_away_by(active)],
        }
        progress.update(done)
    for record, reason in zip(about, reasons, strict=True):
        if reason:
            record["failure"] = reason
    return about


def _read(subject: Subject, settings: ExplainConfig) -> tuple[_Part, _Part, dict[int, str]]:
    """The texts to explain from, those to score on, and what tokens look like."""
    if without := subject.config.without_text:
        raise TsaeError(f"{subject.run.path}: was trained on {without}, without text to explain with")
    store = open_store(subject.config)
    if not len(store.heldout_range):
        raise TsaeError(f"{store.path}: nothing is held out to score explanations on; harvest with data.holdout")
    parts = []
    for rows, what in ((store.train, "explain"), (store.heldout_range, "explain, held-out")):
        firings = collect(subject, store, list(rows)[: settings.sequences], what)
        windows = cut(firings, settings.window)
        if not len(windows.first):
            raise TsaeError(
                f"experiments.explain.window: {settings.window} is too long; no text of {store.path} fills half of it"
            )
        parts.append(_Part(firings, windows))
    used = np.unique(np.concatenate([part.firings.tokens.reshape(-1) for part in parts]))
    return parts[0], parts[1], token_texts(subject.tokenizer, used.tolist())


def _reason(explaining: _Part, scoring: _Part, latent: int) -> str:
    """Why a latent cannot be explained and scored; empty if it can."""
    documents = [np.unique(part.windows.document[peaks(*part, latent)[0]]) for part in (explaining, scoring)]
    if not len(explaining.firings.of(latent)[0]):
        return "silent in the texts to explain from"
    if len(documents[0]) < LEAST_TEXTS:
        return f"active in fewer than {LEAST_TEXTS} documents to explain from"
    if len(documents[1]) < LEAST_TEXTS:
        return f"active in fewer than {LEAST_TEXTS} held-out documents"
    if len(scoring.windows.first) - len(peaks(*scoring, latent)[0]) < LEAST_TEXTS:
        return f"inactive in fewer than {LEAST_TEXTS} held-out texts"
    return ""


def _drawn(testable: list[int], groups: np.ndarray, rate: np.ndarray, settings: ExplainConfig) -> list[int]:
    """The latents that are explained: in turn one of each group and stratum, in a random order within them."""
    order = np.random.default_rng(settings.seed).permutation(testable)
    strata: dict[tuple[int, int], list[int]] = {}
    for latent in order.tolist():
        strata.setdefault((int(groups[latent]), stratum(rate[latent])), []).append(latent)
    drawn = [latent for layer in _layers(list(strata.values())) for latent in layer]
    return sorted(drawn[: wanted_latents(settings)])


def _layers(strata: list[list[int]]) -> Iterator[list[int]]:
    """The first latents of all strata, the second ones, ..."""
    for depth in range(max(map(len, strata))):
        yield [stratum[depth] for stratum in strata if depth < len(stratum)]


def _texts(
    explaining: _Part,
    scoring: _Part,
    latent: int,
    settings: ExplainConfig,
    strings: dict[int, str],
    generator: np.random.Generator,
) -> dict[str, Any]:
    """Examples to explain from, and active and inactive held-out texts, none two of one document where possible.

    Held-out texts are spread over all strengths: an explanation that fits only the strongest ones scores less.
    """
    ranked = strongest_per_document(explaining.windows, *peaks(*explaining, latent))
    top = (2 * settings.examples + 2) // 3
    examples = np.concatenate([ranked[:top], spread(ranked[top:], settings.examples - top)])
    active, peak = peaks(*scoring, latent)
    chosen = spread(any_per_document(scoring.windows, active, peak, generator), settings.tests)
    quiet = silent(scoring.windows, active, settings.tests, generator)
    return {
        "examples": [excerpt(*explaining, window, latent, strings) for window in examples.tolist()],
        "active": [excerpt(*scoring, window, latent, strings) for window in chosen.tolist()],
        "inactive": [excerpt(*scoring, window, latent, strings) for window in quiet.tolist()],
    }
