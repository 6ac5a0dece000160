"""The tokens that probes are trained and scored on: which, with which label, and how they are split."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from tsae.config.experiments import ProbeConfig
from tsae.experiments.shared.subject import Subject
from tsae.experiments.shared.tags import Tagger, Tags, last_tags, tags_of
from tsae.experiments.shared.texts import TextActivations, harvest_texts, sample_texts
from tsae.runtime.errors import TsaeError

FEWEST_TEXTS = 4
"""Texts of a class without which no split leaves some on both sides; rarer classes are left out."""
FEWEST_TOKENS = 20
"""Tokens of a syntactic class; rarer classes are left out."""
REFERENCE_TEXTS, REFERENCE_LAST = 160, 25
"""Texts, and last tokens of each, of the released code's context task."""
LONGEST_TOKEN = 20
"""Characters; a text is cut behind as many tokens of this length as are read of it."""


def reference_texts(subject: Subject, probe: ProbeConfig) -> TextActivations:
    """The released code's texts: whole, without BOS, with the dataset's shares of classes; their last tokens."""
    sampled = sample_texts(
        probe.dataset,
        subject.config.experiments.texts,
        probe.reference_texts,
        LONGEST_TOKEN * probe.reference_length,
    )
    return harvest_texts(subject, sampled, reference_length(subject, probe), REFERENCE_LAST)


def reference_length(subject: Subject, probe: ProbeConfig) -> int:
    """Tokens of a text that the language model reads, at most."""
    return min(probe.reference_length, subject.language_model.max_length or probe.reference_length)


class Samples(NamedTuple):
    """N labelled tokens of one task."""

    rows: np.ndarray
    """[N] text of each token."""
    positions: np.ndarray
    """[N] place of each token in its text."""
    label: np.ndarray
    """[N] int: index into `names`."""
    group: np.ndarray
    """[N] int: tokens of one group stay on one side of a split by documents."""
    names: tuple[str, ...]
    left_out: tuple[str, ...]
    """Classes that are too rare to be probed."""
    labels_from: str
    """What the labels are, in words."""


def choose_samples(
    texts: TextActivations,
    probe: ProbeConfig,
    task: str,
    tagger: Tagger | None,
    decode: Callable[[list[int]], str],
) -> Samples:
    """The tokens of `task`, the same for every run and seed; that of syntax needs a tagger.

    `decode` gives the text of tokens.

    Raises TsaeError if fewer than two classes are left.
    """
    random = np.random.default_rng(0)
    if task == "context":
        return _context(texts, probe, random)
    if task == "semantics":
        tags = Tags(np.broadcast_to(texts.label[:, None], texts.valid.shape), texts.label_names, "label of the text")
    else:
        assert tagger is not None
        tags = _syntax(texts, probe, tagger, decode)
    valid = texts.valid & (tags.of_token >= 0)
    if probe.protocol == "disjoint":
        rows, positions = _random_tokens(valid, tags, probe, random)
    else:
        rows, positions = _last_tokens(valid)
    group = texts.group if probe.protocol == "reference" else texts.group_of_copies
    samples = Samples(rows, positions, tags.of_token[rows, positions], group[rows], tags.names, (), tags.tagger)
    return samples if probe.protocol == "reference" else _without_rare(samples, task)


def _context(texts: TextActivations, probe: ProbeConfig, random: np.random.Generator) -> Samples:
    """Tokens of some texts, each text being a class; rows come text by text, positions ascend."""
    sizes = texts.valid.sum(1)
    reference = probe.protocol == "reference"
    shortest = REFERENCE_LAST if reference else int((2 * probe.gap + 4) / (1 - probe.test_share))
    usable = np.flatnonzero(sizes >= shortest)
    if not reference:  # of copies one is a class; which of them a token is from, nothing could tell
        usable = usable[np.sort(np.unique(texts.same_text[usable], return_index=True)[1])]
    count = REFERENCE_TEXTS if reference else probe.context_texts
    if len(usable) < 2:
        raise TsaeError(
            f"probe context: only {len(usable)} texts have the {shortest} tokens that a split with a gap of {probe.gap} "
            f"needs; the longest has {sizes.max()}; give longer texts or a smaller experiments.probe.gap"
        )
    chosen = np.sort(random.choice(usable, min(count, len(usable)), replace=False))
    longest = REFERENCE_LAST if reference else max(shortest, probe.tokens // len(chosen))
    found = [np.flatnonzero(texts.valid[row])[-longest:] for row in chosen]
    label = np.repeat(np.arange(len(chosen)), [len(positions) for positions in found])
    names = tuple(f"text {row}" for row in chosen)
    return Samples(chosen[label], np.concatenate(found), label, label, names, (), "which text a token is from")


def _syntax(texts: TextActivations, probe: ProbeConfig, tagger: Tagger, decode: Callable[[list[int]], str]) -> Tags:
    if probe.protocol == "disjoint":
        return tags_of(texts.texts, texts.offsets, tagger)
    # What the released code does: each last token is tagged by itself, out of its context, blanks included.
    rows, positions = _last_tokens(texts.valid)
    found = last_tags([decode([int(token)]) for token in texts.tokens[rows, positions]], tagger)
    names = tuple(sorted(set(found)))
    of_token = np.full(texts.valid.shape, -1, np.int32)
    of_token[rows, positions] = [names.index(tag) for tag in found]
    return Tags(of_token, names, f"{tagger.name}, each token alone")


def _last_tokens(valid: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    rows = np.flatnonzero(valid.any(1))
    return rows, valid.shape[1] - 1 - valid[rows, ::-1].argmax(1)


def _random_tokens(
    valid: np.ndarray, tags: Tags, probe: ProbeConfig, random: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """About equally many tokens of each class, as far as there are; sorted by text and position."""
    rows, positions = np.nonzero(valid)
    label = tags.of_token[rows, positions]
    order = random.permutation(len(label))
    share = -(-probe.tokens // max(len(tags.names), 1))
    chosen = np.concatenate([order[label[order] == name][:share] for name in range(len(tags.names))])
    chosen = np.sort(random.permutation(chosen)[: probe.tokens])
    return rows[chosen], positions[chosen]


def _without_rare(samples: Samples, task: str) -> Samples:
    """Only the classes with enough tokens, of enough texts; renumbered."""
    enough = []
    for name in range(len(samples.names)):
        here = samples.label == name
        if len(np.unique(samples.group[here])) >= FEWEST_TEXTS and here.sum() >= min(FEWEST_TOKENS, 2 * FEWEST_TEXTS):
            enough.append(name)
    if len(samples.names) < 2:
        only = f"one label, {samples.names[0]}" if samples.names else "no label"
        raise TsaeError(f"probe {task}: the texts have {only}; two or more are needed to tell apart")
    if len(enough) < 2:
        found = ", ".join(f"{name} {int((samples.label == i).sum())}" for i, name in enumerate(samples.names))
        raise TsaeError(
            f"probe {task}: fewer than two classes have tokens in {FEWEST_TEXTS} texts or more, which a split needs "
            f"(tokens found: {found or 'none'}); raise experiments.texts.count, or name experiments.texts.classes"
        )
    number = np.full(len(samples.names), -1)
    number[enough] = np.arange(len(enough))
    kept = np.flatnonzero(number[samples.label] >= 0)
    left_out = tuple(name for i, name in enumerate(samples.names) if i not in enough)
    return samples._replace(
        rows=samples.rows[kept],
        positions=samples.positions[kept],
        label=number[samples.label[kept]],
        group=samples.group[kept],
        names=tuple(samples.names[i] for i in enough),
        left_out=left_out,
    )


def split(samples: Samples, probe: ProbeConfig, task: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the training and of the test tokens for one seed."""
    random = np.random.default_rng([seed, 1])
    if probe.protocol == "reference":
        order = random.permutation(len(samples.label))
        tested = round(len(order) * probe.test_share)
        return np.sort(order[tested:]), np.sort(order[:tested])
    test = _test_blocks(samples, probe, random) if task == "context" else _test_groups(samples, probe, random)
    return np.flatnonzero(test == 0), np.flatnonzero(test == 1)


def _test_groups(samples: Samples, probe: ProbeConfig, random: np.random.Generator) -> np.ndarray:
    """[N]: 1 for the tokens of test groups, else 0; a share of the groups of each class in turn."""
    first = {int(group): int(label) for group, label in zip(samples.group[::-1], samples.label[::-1], strict=True)}
    groups, label = np.array(list(first)), np.array(list(first.values()))
    tested = set()
    for name in np.unique(label):
        mine = random.permutation(groups[label == name])
        tested |= set(mine[: max(1, round(len(mine) * probe.test_share))].tolist())
    return np.isin(samples.group, list(tested)).astype(int)


def _test_blocks(samples: Samples, probe: ProbeConfig, random: np.random.Generator) -> np.ndarray:
    """[N]: 1 for a run of tokens of each text, -1 for those nearer than `gap` to it, else 0."""
    test = np.zeros(len(samples.label), int)
    for name in range(len(samples.names)):
        mine = np.flatnonzero(samples.label == name)
        size = max(1, round(len(mine) * probe.test_share))
        start = int(random.integers(0, len(mine) - size + 1))
        distance = np.maximum(mine[start] - mine, mine - mine[start + size - 1])
        test[mine[distance <= 0]] = 1
        test[mine[(distance > 0) & (distance < probe.gap)]] = -1
    return test
