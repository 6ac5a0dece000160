"""Latents that tell rejected from chosen responses, and which of them only tell their lengths (paper section 4.5).

Per pair and latent the difference of the mean activations over response tokens, rejected minus chosen; a paired t-test
for each latent with Benjamini and Hochberg's correction; and for those found, what is left at equal length: a regression
on the length difference and its square, pairs matched for length, and the responses' beginnings.
"""

from __future__ import annotations

import textwrap
from collections import Counter
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tsae.config.experiments import AlignConfig
from tsae.evaluation.statistics import bootstrap_means
from tsae.experiments.align.differences import (
    Differences,
    LengthTest,
    PairedTest,
    differences,
    false_discovery,
    length_test,
    paired_test,
)
from tsae.experiments.align.figure import draw_figure, write_table
from tsae.experiments.align.pairs import Pairs, as_texts, read_pairs
from tsae.experiments.shared.subject import Subject
from tsae.experiments.shared.texts import TextActivations, harvest_texts
from tsae.runtime.errors import TsaeError

MIN_PAIRS = 20
EXCERPT = 240  # characters
CONCEPT, LENGTH = "beyond length", "length-driven"
UNDECIDED, NOTHING = "undecided", "not significant"


class Tests(NamedTuple):
    """Everything that is tested of the F latents of a split."""

    tested: np.ndarray
    """[F] bool: active in enough pairs."""
    paired: PairedTest
    q: np.ndarray
    length: LengthTest
    intercept_q: np.ndarray
    """Over the significant latents, as is the next one."""
    correlation_q: np.ndarray
    matched: PairedTest
    matched_q: np.ndarray
    matched_pairs: int
    beginning: np.ndarray
    """[F] mean difference over equally many tokens."""
    dialogue: np.ndarray
    """[F] mean difference over whole dialogues."""

    def label(self, latent: int, level: float) -> str:
        """What the difference of a latent is put down to.

        One that does not outlast the correction for length is length-driven if it goes with length, else undecided.
        """
        if not self.q[latent] < level:
            return NOTHING
        if self.intercept_q[latent] < level:
            return CONCEPT
        return LENGTH if self.correlation_q[latent] < level else UNDECIDED


def measure(subject: Subject, settings: AlignConfig, chunk: int) -> dict[str, Any]:
    """The differences of one split's latents. Raises TsaeError for too few pairs."""
    pairs, texts = _material(subject, settings)
    split = subject.latents(chunk)
    found = differences(subject, texts, pairs, split)
    if len(found.kept) < MIN_PAIRS:
        raise TsaeError(
            f"--dataset {settings.dataset}: {len(found.kept)} pairs with two responses are too few to test; "
            f"at least {MIN_PAIRS} are needed"
        )
    tests = run_tests(found, settings)
    chosen = _ranked(tests)[: settings.table]
    if not len(chosen):
        raise TsaeError(
            f"{subject.run.path}: no latent of the split is active in {settings.min_pairs} pairs "
            "(experiments.align.min_pairs); they are dead or about something else"
        )
    table = _table(subject, pairs, found, tests, chosen, split.start, settings)
    labels = Counter(tests.label(latent, settings.level) for latent in np.flatnonzero(tests.tested).tolist())
    return {
        **_headline(labels, table[0]),
        "pairs": len(found.kept),
        "pairs_without_response": pairs.skipped + len(pairs.chosen) - len(found.kept),
        "dialogues_cut": pairs.cut,
        "about_the_pairs": pairs.note,
        "response_tokens": _length_summary(found.lengths),
        "latents": {
            "tested": labels.total(),
            "significant": labels.total() - labels[NOTHING],
            **{label: labels[label] for label in (CONCEPT, LENGTH, UNDECIDED)},
        },
        "matched_pairs": tests.matched_pairs,
        "table": table,
        "scatter": _scatter(found, tests, split.start, settings.level),
        "all_tested": _all_tested(tests, split.start, settings.level),
    }


@lru_cache(maxsize=1)
def _material(subject: Subject, settings: AlignConfig) -> tuple[Pairs, TextActivations]:
    """The pairs and their activations, for all splits of a run."""
    lm, read = subject.language_model, subject.config.experiments.texts
    room = min(settings.max_tokens, lm.max_length or settings.max_tokens)
    pairs = read_pairs(settings, read.subset, read.split, lm.tokenizer, room - 1)  # one for BOS
    return pairs, harvest_texts(subject, as_texts(pairs), room)


def draw(results: dict[str, Any], path: Path) -> None:
    """The figure, and beside it the table as CSV."""
    draw_figure(results, path)
    write_table(results, path.with_suffix(".csv"))


def _headline(labels: Counter[str], largest: dict[str, Any]) -> dict[str, Any]:
    """Shares of latents, and the largest difference of all."""
    significant = labels.total() - labels[NOTHING]
    headline = {
        "significant_share": significant / labels.total(),
        "largest_difference": abs(largest["mean_difference"]),
    }
    if significant:
        headline["beyond_length_share"] = labels[CONCEPT] / significant
    return {"headline": headline, "half_width_95": {"largest_difference": (largest["high"] - largest["low"]) / 2}}


def run_tests(found: Differences, settings: AlignConfig) -> Tests:
    """All tests of the differences [P, F]."""
    tested = np.bincount(found.response.tocoo().coords[1], minlength=found.response.shape[1]) >= settings.min_pairs
    length = (found.lengths[:, 1] - found.lengths[:, 0]).astype(np.float64)
    paired = paired_test(found.response)
    q = false_discovery(paired.p, tested)
    significant = q < settings.level
    by_length = length_test(found.response, length)
    near = np.flatnonzero(np.abs(length) <= settings.matched_tokens)
    matched = paired_test(found.response[near])
    return Tests(
        tested,
        paired,
        q,
        by_length,
        false_discovery(by_length.p, significant),
        false_discovery(by_length.correlation_p, significant),
        matched,
        false_discovery(matched.p, significant),
        len(near),
        paired_test(found.beginning).mean,
        paired_test(found.dialogue).mean,
    )


def _ranked(tests: Tests) -> np.ndarray:
    """The tested latents, the largest mean difference (the paper's order) first, either sign."""
    order = np.argsort(-np.abs(np.where(tests.tested, tests.paired.mean, 0)), kind="stable")
    return order[tests.tested[order]]


def _table(
    subject: Subject,
    pairs: Pairs,
    found: Differences,
    tests: Tests,
    chosen: np.ndarray,
    first: int,
    settings: AlignConfig,
) -> list[dict[str, Any]]:
    """One row per latent of `chosen`, numbered within the split that begins at `first`."""
    values = found.response[:, chosen].toarray()
    low, high = bootstrap_means(values, settings.bootstrap, settings.seed)
    return [
        {
            "latent": int(latent) + first,
            "explanation": subject.explanations.get(int(latent) + first),
            "label": tests.label(latent, settings.level),
            "mean_difference": float(tests.paired.mean[latent]),
            "low": float(low[column]),
            "high": float(high[column]),
            "effect_size": _number(tests.paired.effect[latent]),
            "q": _number(tests.q[latent]),
            "length_correlation": _number(tests.length.correlation[latent]),
            "length_correlation_q": _number(tests.correlation_q[latent]),
            "at_equal_length": _number(tests.length.intercept[latent]),
            "at_equal_length_q": _number(tests.intercept_q[latent]),
            "matched_mean_difference": _number(tests.matched.mean[latent]),
            "matched_q": _number(tests.matched_q[latent]),
            "beginning_mean_difference": float(tests.beginning[latent]),
            "dialogue_mean_difference": float(tests.dialogue[latent]),
            "examples": [
                _example(pairs, found, int(pair), float(values[pair, column]))
                for pair in np.argsort(-np.abs(values[:, column]), kind="stable")[: settings.examples]
            ],
        }
        for column, latent in enumerate(chosen)
    ]


def _example(pairs: Pairs, found: Differences, pair: int, difference: float) -> dict[str, Any]:
    """A pair as a reader needs it."""
    chosen, rejected = (side[int(found.kept[pair])] for side in (pairs.chosen, pairs.rejected))
    return {
        "pair": int(found.kept[pair]),
        "difference": difference,
        "prompt": "… " + chosen.text[: chosen.start][-EXCERPT:].strip(),
        "chosen": textwrap.shorten(chosen.text[chosen.start :], EXCERPT, placeholder=" …"),
        "rejected": textwrap.shorten(rejected.text[rejected.start :], EXCERPT, placeholder=" …"),
    }


def _length_summary(lengths: np.ndarray) -> dict[str, Any]:
    """The lengths' paired t-test, as in the paper's appendix B.1."""
    from scipy.sparse import csr_array

    result = paired_test(csr_array((lengths[:, 1] - lengths[:, 0]).astype(np.float64)[:, None]))
    return {
        "chosen": float(lengths[:, 0].mean()),
        "rejected": float(lengths[:, 1].mean()),
        "difference": float(result.mean[0]),
        "p": _number(result.p[0]),
    }


def _scatter(found: Differences, tests: Tests, first: int, level: float) -> list[dict[str, Any]]:
    """Each pair's difference against its length difference, for the largest latent of either label, or else of any."""
    length = found.lengths[:, 1] - found.lengths[:, 0]
    largest: dict[str, int] = {}
    for latent in _ranked(tests).tolist():
        largest.setdefault(tests.label(latent, level), latent)
    shown = []
    for label in [label for label in (CONCEPT, LENGTH) if label in largest] or list(largest)[:1]:
        values = found.response[:, [largest[label]]].toarray()[:, 0]
        shown.append(
            {
                "latent": largest[label] + first,
                "label": label,
                "length_difference": " ".join(map(str, length.tolist())),
                "difference": " ".join(f"{value:.4g}" for value in values),
            }
        )
    return shown


def _all_tested(tests: Tests, first: int, level: float) -> dict[str, Any]:
    """Every tested latent on a line of its own."""
    rows = [
        f"{latent + first} {tests.paired.mean[latent]:.4g} {tests.paired.effect[latent]:.4g} {tests.q[latent]:.3g} "
        f"{tests.length.correlation[latent]:.3g} {tests.intercept_q[latent]:.3g} {tests.label(latent, level)}"
        for latent in _ranked(tests).tolist()
    ]
    return {"columns": "latent mean_difference effect_size q length_correlation at_equal_length_q label", "rows": rows}


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
