"""`tsae explain`: what latents respond to, in words, and how well the words predict held-out activations (autointerp).

Three stages, each with a file of its own beside the run, so that an interrupted one continues:

    autointerp_examples.jsonl       texts with true activations (see explain_examples)
    autointerp_explanations.jsonl   one explanation, or the reason why there is none, per latent
    autointerp_scores.jsonl         verdicts and scores per latent
    explanations.json               {"<latent>": "<explanation>"}, for every other experiment and program

Detection asks whether the latent is active in a text; fuzzing, whether the marked tokens of a text are those that it is
active on. Without a language model, an explanation is a rule over tokens (see token_rules), scored in the same way.
"""

from __future__ import annotations

import hashlib
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tsae.config import schema
from tsae.config.experiments import ExplainConfig
from tsae.config.paths import as_written
from tsae.experiments.answers.ask import open_backend
from tsae.experiments.explain.examples import collect_examples, wanted_latents
from tsae.experiments.explain.explainers import Explainer, ModelExplainer, Record, TokenExplainer, tasks_of
from tsae.experiments.explain.figure import draw
from tsae.experiments.explain.scores import balanced_accuracy, headline, summarise
from tsae.experiments.shared.journal import Journal
from tsae.experiments.shared.subject import Subject
from tsae.interop.explanations import OWN, write_explanations
from tsae.runtime import metadata
from tsae.runtime.errors import TsaeError
from tsae.store.binding import data_identity, weights_identity

__all__ = ["cost", "draw", "measure"]

VERSION = 1
"""Of the stages' files and the prompts; raised when either changes."""


def measure(subject: Subject, settings: ExplainConfig) -> dict[str, Any]:
    """Explain latents, score the explanations and write explanations.json; the summary of all scores.

    Raises TsaeError for settings that cannot work, for an explanations.json that came from elsewhere, and where no
    latent can be explained.
    """
    stages, explainer = _begin(subject, settings)
    stages.require_own_explanations()
    about = stages.examples()
    print("\n".join(_costs(subject, settings, about, explainer)), file=sys.stderr)
    explained = stages.explanations(about, explainer)
    digest = stages.write_explanations(explained)
    scores = stages.scores(about, explained, explainer)
    results = summarise(about, scores)
    shown, half = headline(results)
    return {
        "explained_by": explainer.name,
        "explanations": {"file": stages.target.name, "sha256": digest},
        "latents": _counts(about, explained, scores),
        "headline_is": f"balanced accuracy; {_who(about)}",
        **results,
        "headline": shown,
        "half_width_95": half,
    }


def cost(subject: Subject, settings: ExplainConfig) -> list[str]:
    """What `measure` would explain, leave out and ask now, in two lines; nobody is asked, and no file is written.

    Raises TsaeError as `measure` does.
    """
    stages, explainer = _begin(subject, settings)
    return _costs(subject, settings, stages.examples(keep=False), explainer)


def _begin(subject: Subject, settings: ExplainConfig) -> tuple[_Stages, Explainer]:
    for name, least in (("sequences", 1), ("window", 2), ("examples", 1), ("tests", 1), ("seed", 0), ("latents", 1)):
        value = getattr(settings, name)
        if value is not None and value < least:
            raise TsaeError(f"experiments.explain.{name}: {value} is impossible; at least {least}")
    explainer: Explainer = TokenExplainer()
    if settings.answers.backend != "none":
        backend = open_backend(settings.answers, "experiments.explain.answers")
        explainer = ModelExplainer(backend, subject.name, subject.run.progress)
    return _Stages(subject, settings), explainer


def _costs(subject: Subject, settings: ExplainConfig, about: Sequence[Record], explainer: Explainer) -> list[str]:
    """Which latents are explained, and what it takes to ask a language model about them."""
    lines = [f"explain {subject.name}: {_who(about)}"]
    if not isinstance(explainer, ModelExplainer):
        return lines
    found = explainer.cost([record for record in about if "rule" in record], settings.seed)
    if not found.questions:
        return [*lines, f"{explainer.name}: nothing is asked, the answers are recorded"]
    asks = (
        f"{explainer.name}: {found.questions:,} questions of about {found.prompt_tokens:,} tokens ({found.counts_by}), "
        f"answers of at most {found.answer_tokens:,}"
    )
    least = found.prompt_tokens * settings.answers.prompt_price / 1e6
    most = least + found.answer_tokens * settings.answers.answer_price / 1e6
    if most:
        asks += f"; costs {least:,.2f} (prompts alone) to {most:,.2f} (longest answers)"
    return [*lines, asks]


def _who(about: Sequence[Record]) -> str:
    """How many latents are explained, and why the others are not."""
    drawn, reasons = sum("rule" in record for record in about), _reasons(about)
    if spared := len(about) - drawn - sum(reasons.values()):
        reasons["not drawn, which experiments.explain.latents limits"] = spared
    left_out = "; ".join(f"{count:,} {reason}" for reason, count in reasons.most_common())
    return f"{drawn:,} of {len(about):,} latents" + (f"; left out: {left_out}" if left_out else "")


def _reasons(about: Sequence[Record]) -> Counter[str]:
    """Why latents cannot be explained, and how many."""
    return Counter(record["failure"] for record in about if "failure" in record)


class _Stages:
    """The stages' files of one run, or of one of its checkpoints."""

    def __init__(self, subject: Subject, settings: ExplainConfig) -> None:
        self._subject, self._settings = subject, settings
        self._suffix = "" if subject.checkpoint is None else f"_step{subject.checkpoint}"
        self.target = self._file("explanations", "json")
        read = {name: getattr(settings, name) for name in ("sequences", "window", "examples", "tests", "seed")}
        about = [weights_identity(subject.run, subject.checkpoint), data_identity(subject.run, subject.config)]
        self._examples_hash = schema.stable_hash([VERSION, *about, read, wanted_latents(settings)])
        answers = settings.answers
        self._answers_hash = schema.stable_hash([self._examples_hash, answers.backend, as_written(answers.model)])

    def examples(self, *, keep: bool = True) -> list[Record]:
        """A record of every latent; complete or not there."""
        journal = Journal(self._file("autointerp_examples"), "examples", self._examples_hash)
        if len(journal.records) < self._subject.dictionary.dict_size:
            about = collect_examples(self._subject, self._settings)
            if not keep:
                return about
            journal.replace(about)
        return [journal.records[latent] for latent in sorted(journal.records)]

    def explanations(self, about: Sequence[Record], explainer: Explainer) -> dict[int, str]:
        """Latent → explanation; what failed in an earlier attempt is tried again."""
        journal = Journal(self._file("autointerp_explanations"), "explanations", self._answers_hash)
        drawn = [record for record in about if "rule" in record]
        open_ = _unfinished(drawn, journal)
        made = zip(open_, explainer.explain(open_), strict=True)
        journal.add(*({"latent": record["latent"]} | _outcome(*found) for record, found in made))
        records = [journal.records[record["latent"]] for record in drawn]
        explained = {record["latent"]: record["explanation"] for record in records if "explanation" in record}
        if not explained:
            most = Counter(record["failure"] for record in records).most_common(1)[0][0]
            raise TsaeError(f"{journal.path}: none of {len(records)} latents could be explained; mostly: {most}")
        return explained

    def scores(self, about: Sequence[Record], explained: dict[int, str], explainer: Explainer) -> dict[int, Record]:
        """Latent → its scores; what was not answered in an earlier attempt is asked again."""
        journal = Journal(self._file("autointerp_scores"), "scores", self._answers_hash)
        drawn = [record for record in about if record["latent"] in explained]
        open_ = _unfinished(drawn, journal)
        tasks = [
            task for record in open_ for task in tasks_of(record, explained[record["latent"]], self._settings.seed)
        ]
        scored: dict[int, Record] = {record["latent"]: {"latent": record["latent"]} for record in open_}
        for task, (verdicts, reasons) in zip(tasks, explainer.judge(tasks), strict=True):
            record = scored[task.record["latent"]]
            record[task.scorer] = balanced_accuracy([item.truth for item in task.items], verdicts)
            if reasons:
                record["failure"] = reasons[0]
        journal.add(*scored.values())
        return journal.records

    def write_explanations(self, explained: dict[int, str]) -> str:
        """Write explanations.json; its digest."""
        write_explanations(self.target, explained)
        return _digest(self.target)

    def require_own_explanations(self) -> None:
        """Refuse, before anything is paid for, to write over explanations that were not made here."""
        if not self.target.exists():
            return
        summary = metadata.whole(self._file("autointerp", "json"), OWN)
        recorded = summary.get("explanations", {}).get("sha256")
        made = {
            str(line["latent"]): line["explanation"]
            for line in metadata.records(self._file("autointerp_explanations"))[0]
            if "explanation" in line
        }
        if _digest(self.target) != recorded and not (made and metadata.whole(self.target) == made):
            raise TsaeError(f"{self.target}: was not made by `tsae explain` and is left as it is; move it away first")

    def _file(self, name: str, suffix: str = "jsonl") -> Path:
        stem, _, stage = name.partition("_")
        return self._subject.run.result(f"{stem}{self._suffix}{'_' if stage else ''}{stage}", suffix)


def _unfinished(drawn: Sequence[Record], journal: Journal) -> list[Record]:
    """Latents without a flawless record."""
    return [record for record in drawn if "failure" in journal.records.get(record["latent"], {"failure": ""})]


def _outcome(explanation: str, failure: str) -> Record:
    return {"explanation": explanation} if explanation else {"failure": failure}


def _counts(about: Sequence[Record], explained: dict[int, str], scores: dict[int, Record]) -> dict[str, Any]:
    """How many latents there are, and what became of those without a score."""
    drawn = [record["latent"] for record in about if "rule" in record]
    reasons = _reasons(about)
    testable = len(about) - sum(reasons.values())
    reasons["no explanation in the answer"] = len(drawn) - len(explained)
    reasons["some verdicts are missing"] = sum("failure" in scores.get(latent, {}) for latent in explained)
    return {
        "all": len(about),
        "testable": testable,
        "drawn": len(drawn),
        "explained": len(explained),
        "scored": sum(scores.get(latent, {}).get("detection", {}).get("score") is not None for latent in explained),
        "failures": {reason: count for reason, count in reasons.most_common() if count},
    }


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
