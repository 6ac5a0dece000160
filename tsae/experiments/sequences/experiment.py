"""Latents over the tokens of passages spliced into one context, and scores of how well they follow the passages.

Paper figures 1 and 4, which show two hand-picked contexts. Here the scores are means over random splices of labelled
texts, beside two controls: the smoothest latents of the whole dictionary in place of the split (what a split made after
training gives), and contexts of one text cut at borders of the same kind (what the scores are where nothing changes).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from tsae import pages
from tsae.config.experiments import SequencesConfig
from tsae.evaluation.statistics import Interval, bootstrap_mean
from tsae.experiments.sequences.contexts import Coded, draw_contexts, encode_contexts
from tsae.experiments.sequences.figure import draw_figure
from tsae.experiments.sequences.scores import Scores, SmoothnessCounts, score, top_latents
from tsae.experiments.shared.firings import token_texts
from tsae.experiments.shared.subject import Subject
from tsae.runtime import files
from tsae.runtime.progress import Progress

SHOWN = 3
"""Contexts in the page; the first is drawn."""
HEADLINE = ("phase_auc", "top_persistence", "boundary_lag", "leakage", "change_point_f1")


def measure(subject: Subject, settings: SequencesConfig, chunk: int) -> dict[str, Any]:
    """The scores of one split and its controls, and the contexts that the figure and the page show. Raises TsaeError."""
    settings.require_possible("sequences", subject.dictionary.dict_size)
    contexts, split = draw_contexts(subject, settings), subject.latents(chunk)
    progress, done = Progress("sequences", contexts.total, "contexts"), 0
    counts = SmoothnessCounts(subject.dictionary.dict_size)
    for coded in encode_contexts(subject, contexts.calibration, progress, done):
        counts.add(coded.z, coded.latents, coded.passage)
    smooth, done = counts.smoothest(settings.smoothest), done + len(contexts.calibration)
    table = _Table(settings, split, smooth)
    shown = []
    for number, coded in enumerate(encode_contexts(subject, contexts.spliced, progress, done)):
        table.add(coded)
        if number < SHOWN - len(contexts.own):
            shown.append(_shown(subject, coded, split, settings))
    done += len(contexts.spliced)
    for coded in encode_contexts(subject, contexts.one_text, progress, done):
        table.add_one_text(coded)
    done += len(contexts.one_text)
    own = [_shown(subject, coded, split, settings) for coded in encode_contexts(subject, contexts.own, progress, done)]
    return {
        **table.results(),
        "splices": len(contexts.spliced),
        "tokens": len(contexts.spliced[0].tokens),
        "contexts": own + shown,
    }


def draw(results: dict[str, Any], path: Path) -> None:
    """The figure, and beside it a page in which any latent of the split colours the tokens."""
    draw_figure(results, path)
    write_page(results, path.with_suffix(".html"))


class _Table:
    """Scores of all contexts: of the split, of the smoothest latents instead, and of the split where no text changes."""

    def __init__(self, settings: SequencesConfig, split: slice, smooth: np.ndarray) -> None:
        self._settings, self._split, self._smooth = settings, split, smooth
        self._own: list[Scores] = []
        self._smoothest: list[Scores] = []
        self._one_text: list[Scores] = []

    def add(self, coded: Coded) -> None:
        """Score a splice."""
        self._own.append(self._score(coded, _inside(coded.latents, self._split)))
        self._smoothest.append(self._score(coded, np.isin(coded.latents, self._smooth)))

    def add_one_text(self, coded: Coded) -> None:
        """Score a context without a change of text."""
        self._one_text.append(self._score(coded, _inside(coded.latents, self._split)))

    def results(self) -> dict[str, Any]:
        """Means with intervals."""
        own, smoothest = np.array(self._own), np.array(self._smoothest)
        scores = self._intervals(own)
        known = [name for name in HEADLINE if not np.isnan(scores[name].half_width)]
        one_text = None
        if self._one_text:
            one_text = {
                "contexts": len(self._one_text),
                "scores": _plain(self._intervals(np.array(self._one_text))),
            }
        return {
            "headline": {name: scores[name].mean for name in known},
            "half_width_95": {name: scores[name].half_width for name in known},
            "scores": _plain(scores),
            "smoothest_latents": {
                "latents": len(self._smooth),
                "share_in_split": float(_inside(self._smooth, self._split).mean()),
                "scores": _plain(self._intervals(smoothest)),
                "split_minus_smoothest": _plain(self._intervals(own - smoothest)),
            },
            "one_text": one_text,
        }

    def _score(self, coded: Coded, columns: np.ndarray) -> Scores:
        settings = self._settings
        z = coded.z[:, columns]
        if not z.shape[1]:
            return Scores(*[np.nan] * len(Scores._fields))
        return score(z, coded.passage, settings.top, settings.rank, settings.window, settings.tolerance)

    def _intervals(self, scores: np.ndarray) -> dict[str, Interval]:
        draws, seed = self._settings.bootstrap, self._settings.seed
        return {name: bootstrap_mean(scores[:, i], draws, seed) for i, name in enumerate(Scores._fields)}


def _plain(intervals: dict[str, Interval]) -> dict[str, Any]:
    return {name: interval.plain() for name, interval in intervals.items()}


def _inside(latents: np.ndarray, split: slice) -> np.ndarray:
    return (latents >= split.start) & (latents < split.stop)


def _shown(subject: Subject, coded: Coded, split: slice, settings: SequencesConfig) -> dict[str, Any]:
    """One context for the figure and the page: tokens, borders, the latents to draw, and every latent's activations."""
    inside = _inside(coded.latents, split) | np.isin(coded.latents, settings.latents)
    latents, z = coded.latents[inside], coded.z[:, inside]
    if settings.latents:
        top = [int(latent) for latent in settings.latents]
    else:
        top = [int(latents[column]) for column in top_latents(z, settings.top, settings.rank)]
    texts = token_texts(subject.language_model.tokenizer, set(coded.splice.tokens.tolist()))
    return {
        "passages": list(coded.splice.names),
        "starts": [int(np.argmax(coded.splice.passage == index)) for index in range(len(coded.splice.names))],
        "tokens": [texts[token] for token in coded.splice.tokens.tolist()],
        "top": top,
        "explanations": {
            str(latent): subject.explanations[latent] for latent in latents.tolist() if latent in subject.explanations
        },
        "activations": {str(latent): _packed(z[:, i], coded.first) for i, latent in enumerate(latents.tolist())},
    }


def _packed(values: np.ndarray, first: int) -> str:
    """A latent's activations as `position:value` words, which keep thousands of latents on a line each."""
    return " ".join(f"{first + at}:{values[at]:.3g}" for at in np.flatnonzero(values).tolist())


def write_page(results: dict[str, Any], path: Path) -> None:
    """Write the page on which any latent that fires colours the tokens of the contexts."""
    firing = len({latent for context in results["contexts"] for latent in context["activations"]})
    page = pages.render(
        "experiments/sequences/page.html",
        title=f"{results['subject']['run']}: {results['split']} over spliced passages",
        summary=f"{firing} latents ({results['split']})",
        data=results["contexts"],
    )
    files.write_text(path, page)
