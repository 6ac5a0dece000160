"""Who explains latents and judges explanations: a language model, or a rule over tokens that stands in for one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from tsae.experiments.answers.ask import Backend
from tsae.experiments.explain import prompts, token_rules

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
        texts = [token_rules.describe(**record["rule"]) for record in records]
        return [(text, "" if text else "no token stands out") for text in texts]

    def judge(self, tasks: Sequence[Task]) -> list[Verdicts]:
        """What each latent's rule says of its texts."""
        return [Verdicts([_rule_says(task, item) for item in task.items], []) for task in tasks]


class ModelExplainer:
    """Asks a language model for both."""

    def __init__(self, backend: Backend) -> None:
        self.name, self._backend = backend.name, backend

    def explain(self, records: Sequence[Record]) -> list[tuple[str, str]]:
        """What the model makes of each latent's examples."""
        asked = [prompts.explanation_prompt(record["examples"]) for record in records]
        return [prompts.read_explanation(answer) for answer in self._backend.answers(asked)]

    def judge(self, tasks: Sequence[Task]) -> list[Verdicts]:
        """The model's verdicts, a few texts to a question."""
        asked = [_questions(task) for task in tasks]
        answers = iter(self._backend.answers([prompt for questions in asked for prompt in questions]))
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
        return token_rules.says_active(rule, item.excerpt)
    return token_rules.says_right(rule, [item.excerpt["tokens"][place] for place in item.marks])


def _questions(task: Task) -> list[prompts.Prompt]:
    if task.scorer == DETECTION:
        texts = [prompts.plain(item.excerpt) for item in task.items]
        return prompts.verdict_prompts(prompts.DETECT, task.explanation, texts)
    texts = [prompts.marked(item.excerpt, item.marks) for item in task.items]
    return prompts.verdict_prompts(prompts.FUZZ, task.explanation, texts)
