"""Asking a language model: a local one, one behind an OpenAI-compatible endpoint, or the record of what one said.

Answers are greedy, so a prompt has one answer, and an answer that was paid for once is kept on disk: a run that is
interrupted, repeated or judged again asks only what was never answered.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from tsae.config.sections import ModelConfig
from tsae.data.labelled import content_of
from tsae.experiments.answers.prompts import Answer, Prompt, Respondent
from tsae.lm.source import cached_commit, weights_fingerprint
from tsae.runtime import metadata, preemption
from tsae.runtime.environment import home
from tsae.runtime.errors import TsaeError
from tsae.runtime.metadata import NATURAL

if TYPE_CHECKING:
    from tsae.config.experiments import AnswersConfig
    from tsae.runtime.progress import Progress


ANSWER = {
    **{"model": str, "system": str, "user": str, "max_tokens": NATURAL, "text": (None, str)},
    "failure?": (None, str),
}
"""A line of recorded answers."""


class Cost(NamedTuple):
    """What prompts without a kept answer take."""

    questions: int
    """Requests, or prompts of a local model."""
    prompt_tokens: int
    answer_tokens: int
    """At most."""
    counts_by: str
    """How the tokens of prompts were counted."""


class Backend:
    """A model whose answers are kept; `respondent` None: only what is kept is known. `longest` tokens, if given, may be
    in an answer, whatever a prompt says.
    """

    def __init__(
        self, name: str, model: str, respondent: Respondent | None, kept: AnswerFile, longest: int | None = None
    ) -> None:
        self.name, self._model, self._respondent, self._kept, self._longest = name, model, respondent, kept, longest

    def answers(self, prompts: Sequence[Prompt], progress: Progress | None = None) -> list[Answer]:
        """The answer to each prompt; a prompt without one has its reason.

        Raises TsaeError where asking on is pointless, and Preempted when asked to leave; what was answered is kept.
        """
        prompts, answers = self._as_asked(prompts), self.kept(prompts)
        open_ = [index for index, answer in enumerate(answers) if answer is None]
        done = len(prompts) - len(open_)
        if self._respondent is None:
            for index in open_:
                answers[index] = Answer(None, f"no answer of {self._model} is recorded")
        elif open_:
            asked = [prompts[index] for index in open_]

            def keep(place: int, answer: Answer) -> None:
                if answer.text is not None:
                    self._kept.keep(self._model, asked[place], answer)

            for place, answer in self._respondent.ask(asked, keep):
                answers[open_[place]] = answer
                done += 1
                if progress is not None:
                    progress.update(done)
                preemption.check()
        if progress is not None:
            progress.update(len(prompts))
        return [answer for answer in answers if answer is not None]

    def kept(self, prompts: Sequence[Prompt]) -> list[Answer | None]:
        """The answer to each prompt, if it was given before; nobody is asked."""
        return [self._kept.find(self._model, prompt) for prompt in self._as_asked(prompts)]

    def cost(self, prompts: Sequence[Prompt]) -> Cost:
        """What `answers` would send to the model now, and how long what comes back may be."""
        if self._respondent is None:
            return Cost(0, 0, 0, "")
        known = zip(self._as_asked(prompts), self.kept(prompts), strict=True)
        open_ = [prompt for prompt, answer in known if answer is None]
        tokens = self._respondent.tokens(open_)
        return Cost(len(open_), tokens, sum(prompt.max_tokens for prompt in open_), self._respondent.counts_by)

    def _as_asked(self, prompts: Sequence[Prompt]) -> Sequence[Prompt]:
        if self._longest is None:
            return prompts
        return [prompt._replace(max_tokens=self._longest) for prompt in prompts]


class AnswerFile:
    """Answers on disk, as JSON lines: all `*.jsonl` of a folder (or one file) are read, a new one is written.

    Every process writes a file of its own, so that any number of them may share the folder on any file system.
    """

    def __init__(self, path: Path, *, writable: bool) -> None:
        self._own = path / f"{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:8]}.jsonl" if writable else None
        self._answers: dict[str, Answer] = {}
        self._lock = threading.Lock()
        for file in [path] if path.is_file() else sorted(path.glob("*.jsonl")):
            self._read(file, strict=not writable)

    def find(self, model: str, prompt: Prompt) -> Answer | None:
        """The recorded answer of `model`, or None."""
        return self._answers.get(_key(model, prompt))

    def keep(self, model: str, prompt: Prompt, answer: Answer) -> None:
        """Record an answer with a text; any thread may."""
        self._answers[_key(model, prompt)] = answer
        if self._own is None:
            return
        line = metadata.line({"model": model, **prompt._asdict(), **answer._asdict()})
        self._own.parent.mkdir(parents=True, exist_ok=True)
        with self._lock, open(self._own, "ab") as stream:
            stream.write(line)

    def _read(self, file: Path, *, strict: bool) -> None:
        try:
            lines = file.read_bytes().rstrip(b"\n").split(b"\n")
        except OSError as error:
            raise TsaeError(f"{file}: recorded answers cannot be read: {error}") from None
        for number, line in enumerate(lines, start=1):
            record = metadata.record(line, ANSWER)
            if record is not None:
                prompt = Prompt(record["system"], record["user"], record["max_tokens"])
                self._answers[_key(record["model"], prompt)] = Answer(record["text"], record.get("failure"))
            elif strict and lines != [b""]:
                raise TsaeError(
                    f"{file}: line {number} is no recorded answer: model, system, user, max_tokens and text are expected"
                )
            # Of our own, what a killed process left half written, or what is damaged since, is asked again.


def open_backend(settings: AnswersConfig, where: str) -> Backend:
    """The backend that `settings` name; `where` is their key path in errors. Raises TsaeError if they lack something."""
    kind = settings.backend
    for name in ("concurrency", "timeout", "tries", "batch_size"):
        if not getattr(settings, name) > 0:
            raise TsaeError(f"{where}.{name}: {getattr(settings, name)} is impossible; it must be greater than 0")
    settings.require_whole(where)
    model = settings.model
    if model is None:
        raise TsaeError(f"{where}.backend: none asks nobody; allowed here: local, endpoint, replay")
    if kind == "replay":
        path = Path(str(settings.recorded)).expanduser()
        if not path.exists():
            raise TsaeError(f"{where}.recorded: there is no {path}; a file or folder of recorded answers is expected")
        return Backend(f"{model} (recorded)", model, None, AnswerFile(path, writable=False), settings.max_tokens)
    # A model of this machine may be another one tomorrow; what an endpoint has behind a name is its own business.
    known_as = f"{model} {local_model_identity(model)}".strip() if kind == "local" else model
    kept = AnswerFile(home() / "answers" / _folder_name(known_as), writable=True)
    if kind == "endpoint":
        from tsae.experiments.answers.endpoint import Endpoint

        return Backend(f"{model} at {settings.base_url}", model, Endpoint(settings, where), kept, settings.max_tokens)
    from tsae.experiments.answers.local import LocalModel

    return Backend(model, model, LocalModel(settings), kept, settings.max_tokens)


def content_of_answers(settings: AnswersConfig) -> str:
    """What gives the answers, as far as it can be known: a local model's content, the file of recorded ones."""
    if settings.backend == "replay" and settings.recorded:
        return content_of(settings.recorded)
    return local_model_identity(str(settings.model)) if settings.backend == "local" and settings.model else ""


def local_model_identity(model: str) -> str:
    """The content of a model folder, the commit of a hub model in the local cache; nothing where that is not known."""
    config = ModelConfig(name=model)
    return weights_fingerprint(config) or cached_commit(config) or ""


def _key(model: str, prompt: Prompt) -> str:
    return hashlib.sha256(json.dumps([model, *prompt]).encode()).hexdigest()


def _folder_name(model: str) -> str:
    """A model's name as a folder's; two models never share one."""
    readable = "".join(letter if letter.isalnum() or letter in "-._" else "_" for letter in model)
    return f"{readable[-60:].lstrip('._')}-{hashlib.sha256(model.encode()).hexdigest()[:8]}"
