"""Asking a language model: a local one, one behind an OpenAI-compatible endpoint, or the record of what one said.

Answers are greedy, so a prompt has one answer, and an answer that was paid for once is kept on disk: a run that is
interrupted, repeated or judged again asks only what was never answered.
"""

from __future__ import annotations

import hashlib
import json
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tsae.config.sections import ModelConfig
from tsae.data.labelled import content_of
from tsae.experiments.answers.prompts import Answer, Prompt, Respondent
from tsae.lm.source import cached_commit, weights_fingerprint
from tsae.runtime import preemption
from tsae.runtime.environment import home
from tsae.runtime.errors import TsaeError

if TYPE_CHECKING:
    from tsae.config.experiments import AnswersConfig
    from tsae.runtime.progress import Progress


class Backend:
    """A model whose answers are kept; `respondent` None: only what is kept is known."""

    def __init__(self, name: str, model: str, respondent: Respondent | None, kept: AnswerFile) -> None:
        self.name, self._model, self._respondent, self._kept = name, model, respondent, kept

    def answers(self, prompts: Sequence[Prompt], progress: Progress | None = None) -> list[Answer]:
        """The answer to each prompt; a prompt without one has its reason.

        Raises TsaeError where asking on is pointless, and Preempted when asked to leave; what was answered is kept.
        """
        found = [self._kept.find(self._model, prompt) for prompt in prompts]
        answers = [None if text is None else Answer(text) for text in found]
        open_ = [index for index, answer in enumerate(answers) if answer is None]
        done = len(prompts) - len(open_)
        if self._respondent is None:
            for index in open_:
                answers[index] = Answer(None, f"no answer of {self._model} is recorded")
        elif open_:
            for place, answer in self._respondent.ask([prompts[index] for index in open_]):
                answers[open_[place]] = answer
                if answer.text is not None:
                    self._kept.keep(self._model, prompts[open_[place]], answer.text)
                done += 1
                if progress is not None:
                    progress.update(done)
                preemption.check()
        if progress is not None:
            progress.update(len(prompts))
        return [answer for answer in answers if answer is not None]


class AnswerFile:
    """Answers on disk, as JSON lines: all `*.jsonl` of a folder (or one file) are read, a new one is written.

    Every process writes a file of its own, so that any number of them may share the folder on any file system.
    """

    def __init__(self, path: Path, *, writable: bool) -> None:
        self._own = path / f"{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:8]}.jsonl" if writable else None
        self._texts: dict[str, str] = {}
        for file in [path] if path.is_file() else sorted(path.glob("*.jsonl")):
            self._read(file, strict=not writable)

    def find(self, model: str, prompt: Prompt) -> str | None:
        """The recorded answer of `model`, or None."""
        return self._texts.get(_key(model, prompt))

    def keep(self, model: str, prompt: Prompt, text: str) -> None:
        """Record an answer."""
        self._texts[_key(model, prompt)] = text
        if self._own is None:
            return
        self._own.parent.mkdir(parents=True, exist_ok=True)
        with open(self._own, "a", encoding="utf-8") as stream:
            stream.write(json.dumps({"model": model, **prompt._asdict(), "text": text}) + "\n")

    def _read(self, file: Path, *, strict: bool) -> None:
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise TsaeError(f"{file}: recorded answers cannot be read: {error}") from None
        for number, line in enumerate(lines, start=1):
            try:
                record = json.loads(line)
                prompt = Prompt(record["system"], record["user"], record["max_tokens"])
                self._texts[_key(record["model"], prompt)] = record["text"]
            except (ValueError, KeyError, TypeError):
                # The last line of a process that was killed while it wrote is a fragment.
                if strict or number < len(lines):
                    raise TsaeError(
                        f"{file}: line {number} is no recorded answer: model, system, user, max_tokens and text are expected"
                    ) from None


def open_backend(settings: AnswersConfig, where: str) -> Backend:
    """The backend that `settings` name; `where` is their key path in errors. Raises TsaeError if they lack something."""
    kind = settings.backend
    for name in ("concurrency", "timeout", "tries", "batch_size"):
        if not getattr(settings, name) > 0:
            raise TsaeError(f"{where}.{name}: {getattr(settings, name)} is impossible; it must be greater than 0")
    needed = {"none": (), "local": ("model",), "endpoint": ("model", "base_url"), "replay": ("model", "recorded")}
    for name in needed[kind]:
        if not getattr(settings, name):
            raise TsaeError(f"{where}.{name}: is needed for the backend {kind}")
    model = settings.model
    if model is None:
        raise TsaeError(f"{where}.backend: none asks nobody; allowed here: local, endpoint, replay")
    if kind == "replay":
        path = Path(str(settings.recorded)).expanduser()
        if not path.exists():
            raise TsaeError(f"{where}.recorded: there is no {path}; a file or folder of recorded answers is expected")
        return Backend(f"{model} (recorded)", model, None, AnswerFile(path, writable=False))
    # A model of this machine may be another one tomorrow; what an endpoint has behind a name is its own business.
    known_as = f"{model} {local_model_identity(model)}".strip() if kind == "local" else model
    kept = AnswerFile(home() / "answers" / _folder_name(known_as), writable=True)
    if kind == "endpoint":
        from tsae.experiments.answers.endpoint import Endpoint

        return Backend(f"{model} at {settings.base_url}", model, Endpoint(settings, where), kept)
    from tsae.experiments.answers.local import LocalModel

    return Backend(model, model, LocalModel(settings), kept)


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
