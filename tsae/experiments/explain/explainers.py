"""Who explains latents and judges explanations: a language model, or a rule over tokens that stands in for one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from tsae.experiments.answers.ask import Backend, Cost
from tsae.experiments.answers.prompts import Answer
from tsae.experiments.explain import prompts
from tsae.experiments.shared.firings import Firings, Windows
from tsae.runtime.progress import Progress

MOST_TOKENS = 6
CANDIDATES = 16
SMALLEST_SHARE = 0.05
"""Tokens with less of a latent's activation are not named."""
ENOUGH_SHARE = 0.8
LEAST_GAIN = 0.01
"""What another token must add to the rule's balanced accuracy, twice over."""


class TokenRules:
    """Looks for the tokens that explain latents, in the texts to explain from."""

    def __init__(self, firings: Firings, windows: Windows) -> None:
        self._firings, self._windows = firings, windows
        self._types, types = np.unique(firings.tokens.reshape(-1), return_inverse=True)
        self._type_of_place = types.reshape(-1)
        inside = np.flatnonzero(windows.number >= 0)
        count = len(windows.first)
        pairs = np.unique(self._type_of_place[inside].astype(np.int64) * count + windows.number[inside])
        self._pair_type, self._pair_window = pairs // count, pairs % count
        self._frequency = np.bincount(self._pair_type, minlength=len(self._types))
        self._offsets = np.concatenate([[0], np.cumsum(self._frequency)])

    def fires_on(self, latent: int) -> list[int]:
        """The tokens that carry most of a latent's activation, largest share first."""
        places, values = self._firings.of(latent)
        types, which = np.unique(self._type_of_place[places], return_inverse=True)
        mass = np.bincount(which, weights=values)
        order = np.argsort(-mass, kind="stable")[:MOST_TOKENS]
        shares = mass[order] / max(mass.sum(), 1e-12)
        before = np.concatenate([[0.0], np.cumsum(shares)[:-1]])
        named = (shares >= SMALLEST_SHARE) & (before < ENOUGH_SHARE)
        return self._types[types[order[named]]].tolist()

    def given_away_by(self, active: np.ndarray) -> list[int]:
        """Tokens such that a text with any of them is `active`, chosen one by one for the best balanced accuracy."""
        count = len(self._windows.first)
        is_active = np.zeros(count, bool)
        is_active[active] = True
        # Two more texts than there are keep a handful of texts from proving anything.
        weight = np.where(is_active, 1 / (len(active) + 2), -1 / (count - len(active) + 2))
        gain = np.bincount(self._pair_type, weights=weight[self._pair_window], minlength=len(self._types))
        candidates = np.argsort(-gain, kind="stable")[:CANDIDATES]
        candidates = candidates[gain[candidates] > 0]
        if not len(candidates):
            return []
        bounds = np.concatenate([[0], np.cumsum(self._frequency[candidates])])
        texts = np.concatenate([self._texts_with(token) for token in candidates])
        chosen: list[int] = []
        while len(chosen) < MOST_TOKENS:
            gains = np.add.reduceat(weight[texts], bounds[:-1])
            best = int(gains.argmax())
            if gains[best] < LEAST_GAIN:
                break
            chosen.append(int(candidates[best]))
            weight[texts[bounds[best] : bounds[best + 1]]] = 0.0  # these are found already
        return self._types[chosen].tolist()

    def _texts_with(self, token: int) -> np.ndarray:
        """The windows that hold a token, given by its number among those that occur."""
        return self._pair_window[self._offsets[token] : self._offsets[token + 1]]


def describe(on: Sequence[str], given_away_by: Sequence[str]) -> str:
    """The rule in words."""
    parts = [f"on {_listed(on)}"] if on else []
    if given_away_by and set(given_away_by) != set(on):
        parts.append(f"in text with {_listed(given_away_by)}")
    return "; ".join(parts)


def says_active(rule: dict[str, Any], excerpt: dict[str, Any]) -> bool:
    """Whether a text holds one of the tokens that give the latent away."""
    return not set(rule["given_away_by"]).isdisjoint(excerpt["tokens"])


def says_right(rule: dict[str, Any], marked: Sequence[str]) -> bool:
    """Whether at least half of the marked tokens are among those that the latent fires on."""
    return 2 * sum(token in rule["on"] for token in marked) >= len(marked)


def _listed(tokens: Sequence[str]) -> str:
    return ", ".join(json.dumps(token, ensure_ascii=False) for token in tokens)


DETECTION, FUZZING = "detection", "fuzzing"
MOST_MARKS = 5
TOKENS_ONLY = "a rule over tokens (no language model)"

Record = dict[str, Any]
"""What the first stage knows of a latent."""


class Item(NamedTuple):
    """One text to judge."""

    truth: bool
    """Whether the latent is active in it; of marked texts, whether the marks are where it is."""
    excerpt: Record
    """The text."""
    marks: tuple[int, ...] = ()
    """Positions of marked tokens."""


class Task(NamedTuple):
    """The texts of one latent that an explanation is judged on."""

    record: Record
    explanation: str
    scorer: str
    items: list[Item]


class Verdicts(NamedTuple):
    """One verdict per item, None without; and why some are missing."""

    verdicts: list[bool | None]
    reasons: list[str]


class Explainer(Protocol):
    """Explains many latents, and judges many explanations, at a time."""

    name: str

    def explain(self, records: Sequence[Record]) -> list[tuple[str, str]]:
        """Explanation, and the reason why there is none, of each latent; one of the two is empty."""
        ...

    def judge(self, tasks: Sequence[Task]) -> list[Verdicts]:
        """The verdicts on each task's items."""
        ...


class TokenExplainer:
    """Names the tokens that the first stage found, and judges by them."""

    name = TOKENS_ONLY

    def explain(self, records: Sequence[Record]) -> list[tuple[str, str]]:
        """The rules in words."""
        texts = [describe(**record["rule"]) for record in records]
        return [(text, "" if text else "no token stands out") for text in texts]

    def judge(self, tasks: Sequence[Task]) -> list[Verdicts]:
        """What each latent's rule says of its texts."""
        return [Verdicts([_rule_says(task, item) for item in task.items], []) for task in tasks]


class ModelExplainer:
    """Asks a language model for both, about all latents at once: `concurrency` questions are always under way.

    `subject` and `progress_file` are what progress is said of, and where it is kept.
    """

    def __init__(self, backend: Backend, subject: str, progress_file: Path | None) -> None:
        self.name, self._backend = backend.name, backend
        self._subject, self._progress_file = subject, progress_file

    def explain(self, records: Sequence[Record]) -> list[tuple[str, str]]:
        """What the model makes of each latent's examples."""
        asked = [prompts.explanation_prompt(record["examples"]) for record in records]
        return [prompts.read_explanation(answer) for answer in self._answers("explanations", asked)]

    def judge(self, tasks: Sequence[Task]) -> list[Verdicts]:
        """The model's verdicts, a few texts to a question."""
        asked = [_questions(task) for task in tasks]
        answers = iter(self._answers("verdicts", [prompt for questions in asked for prompt in questions]))
        judged = []
        for task, questions in zip(tasks, asked, strict=True):
            verdicts: list[bool | None] = []
            reasons = []
            for _ in questions:
                count = min(prompts.TEXTS_PER_PROMPT, len(task.items) - len(verdicts))
                found, reason = prompts.read_verdicts(next(answers), count)
                verdicts += found or [None] * count
                reasons += [reason] if reason else []
            judged.append(Verdicts(verdicts, reasons))
        return judged

    def cost(self, records: Sequence[Record], seed: int) -> Cost:
        """What is still to ask about these latents; until there is an explanation, the token rule stands in for its words."""
        asked = [prompts.explanation_prompt(record["examples"]) for record in records]
        questions = list(asked)
        for record, answer in zip(records, self._backend.kept(asked), strict=True):
            explanation, failure = describe(**record["rule"]), ""
            if answer is not None:
                explanation, failure = prompts.read_explanation(answer)
            if not failure:
                questions += [prompt for task in tasks_of(record, explanation, seed) for prompt in _questions(task)]
        return self._backend.cost(questions)

    def _answers(self, stage: str, asked: Sequence[prompts.Prompt]) -> list[Answer]:
        progress = Progress(f"explain {self._subject}: {stage}", len(asked), "questions", self._progress_file)
        return self._backend.answers(asked, progress)


def tasks_of(record: Record, explanation: str, seed: int) -> list[Task]:
    """What one explanation is scored on; the order of texts, and where wrong marks are, follow from `seed`."""
    generator = np.random.default_rng([seed, record["latent"], 1])
    active, inactive = ([Item(truth, text) for text in record[part]] for part, truth in _PARTS)
    marked = [item for text in record["active"] for item in _marked_both_ways(text, generator)]
    return [
        Task(record, explanation, scorer, [items[index] for index in generator.permutation(len(items))])
        for scorer, items in ((DETECTION, active + inactive), (FUZZING, marked))
    ]


_PARTS = (("active", True), ("inactive", False))


def _marked_both_ways(excerpt: Record, generator: np.random.Generator) -> list[Item]:
    """An active text with its strongest tokens marked, and with as many inactive ones; none if all of it is active."""
    values = {int(place): value for place, value in excerpt["values"].items()}
    silent = [place for place in range(len(excerpt["tokens"])) if place not in values]
    count = min(len(values), len(silent), MOST_MARKS)
    if not count:
        return []
    strongest = sorted(values, key=lambda place: -values[place])[:count]
    wrong = generator.choice(silent, count, replace=False).tolist()
    return [Item(True, excerpt, tuple(sorted(strongest))), Item(False, excerpt, tuple(sorted(wrong)))]


def _rule_says(task: Task, item: Item) -> bool:
    rule = task.record["rule"]
    if task.scorer == DETECTION:
        return says_active(rule, item.excerpt)
    return says_right(rule, [item.excerpt["tokens"][place] for place in item.marks])


def _questions(task: Task) -> list[prompts.Prompt]:
    if task.scorer == DETECTION:
        texts = [prompts.plain(item.excerpt) for item in task.items]
        return prompts.verdict_prompts(prompts.DETECT, task.explanation, texts)
    texts = [prompts.marked(item.excerpt, item.marks) for item in task.items]
    return prompts.verdict_prompts(prompts.FUZZ, task.explanation, texts)
