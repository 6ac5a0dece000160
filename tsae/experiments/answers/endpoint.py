"""An OpenAI-compatible endpoint: several requests at a time, and patience with one that is busy or stumbles."""

from __future__ import annotations

import json
import logging
import os
import queue
import random
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from email.message import Message
from email.utils import parsedate_to_datetime
from http.client import HTTPException
from typing import TYPE_CHECKING, Any

from tsae.experiments.answers.prompts import Answer, Keep, Prompt
from tsae.runtime import preemption
from tsae.runtime.errors import TsaeError

if TYPE_CHECKING:
    from tsae.config.experiments import AnswersConfig

log = logging.getLogger("tsae")

HOPELESS = {401: "the key is refused", 403: "the key may not do this", 404: "there is no such address or model"}
"""Answers that every other request would get as well."""
PASSING = frozenset({408, 409, 425, 429})
"""Statuses below 500 after which another attempt may succeed."""
FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0  # seconds
MOST_PATIENCE = 600.0  # seconds
"""How long an endpoint may ask to wait; one that names a longer time is out of its budget for the day."""
CHARACTERS_PER_TOKEN = 4
"""Of English text, about; which tokenizer an endpoint has, and what it adds to a message, is its own business."""
INVALID = (400, 422)
"""How an endpoint refuses a request whose parameters it does not like."""
UNKNOWN = (
    "unsupported",
    "not supported",
    "unrecognized",
    "unknown",
    "unexpected",
    "not permitted",
    "not allowed",
    "extra",
)
"""How it says that it does not know a parameter at all."""


class Endpoint:
    """Answers prompts through POST <base_url>/chat/completions."""

    counts_by = f"characters / {CHARACTERS_PER_TOKEN}"

    def __init__(self, settings: AnswersConfig, where: str) -> None:
        address = urllib.parse.urlsplit(str(settings.base_url))
        if address.scheme not in ("http", "https") or not address.netloc:
            raise TsaeError(
                f"{where}.base_url: {settings.base_url!r} is no address; one such as http://localhost:8000/v1 is expected"
            )
        self._settings, self._url = settings, f"{str(settings.base_url).rstrip('/')}/chat/completions"
        self._where = where
        _key(settings)
        self._refused: set[str] = set()
        self._opener = _opener()
        self._failed_in_a_row = 0
        self._stop = threading.Event()
        self._hopeless: str | None = None
        self._not_before = 0.0

    def tokens(self, prompts: Sequence[Prompt]) -> int:
        """Tokens of these prompts together, estimated by their length."""
        return sum(-(-len(prompt.system + prompt.user) // CHARACTERS_PER_TOKEN) for prompt in prompts)

    def ask(self, prompts: Sequence[Prompt], keep: Keep) -> Iterator[tuple[int, Answer]]:
        """Index and answer of each prompt, as they come in; `keep` is called by the thread that asked.

        Raises TsaeError for a refused key, an unknown model, and an endpoint that answers nothing at all.
        """
        self._stop = threading.Event()
        waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
        for index in range(len(prompts)):
            waiting.put(index)
        answered: queue.Queue[tuple[int, Answer] | Exception] = queue.Queue()
        for _ in range(min(self._settings.concurrency, len(prompts))):
            # Daemons: a process that was asked to leave must not wait for the slowest request.
            threading.Thread(target=self._work, args=(prompts, waiting, answered, keep), daemon=True).start()
        try:
            for _ in prompts:
                yield self._next(answered)
        finally:
            self._stop.set()

    def _next(self, answered: queue.Queue[tuple[int, Answer] | Exception]) -> tuple[int, Answer]:
        while True:
            preemption.check()
            try:
                found = answered.get(timeout=0.2)
            except queue.Empty:
                continue
            if isinstance(found, Exception):
                raise found
            index, answer = found
            if self._hopeless is not None and answer.text is None:
                raise TsaeError(f"{self._url}: {self._hopeless}")
            self._failed_in_a_row = self._failed_in_a_row + 1 if answer.text is None else 0
            if self._failed_in_a_row > 2 * self._settings.concurrency:
                raise TsaeError(
                    f"{self._url}: {self._failed_in_a_row} requests in a row failed, the last one: {answer.failure}; "
                    "answers so far are kept, and the same command continues"
                )
            return index, answer

    def _work(
        self,
        prompts: Sequence[Prompt],
        waiting: queue.SimpleQueue[int],
        answered: queue.Queue[tuple[int, Answer] | Exception],
        keep: Keep,
    ) -> None:
        stop = self._stop
        while not stop.is_set():
            try:
                index = waiting.get_nowait()
            except queue.Empty:
                return
            try:
                answer = self._answer(prompts[index], stop)
                keep(index, answer)
            except Exception as error:  # a full disk, say: raised where somebody waits for answers
                answered.put(error)
                return
            answered.put((index, answer))

    def _answer(self, prompt: Prompt, stop: threading.Event) -> Answer:
        """One prompt's answer, after as many attempts as it takes and the settings allow."""
        failure, attempt = "", 0
        while attempt < self._settings.tries:
            body = self._body(prompt)
            # A limit is the account's: when it is met, every other request would meet it, too.
            if stop.wait(max(0.0, self._not_before - time.monotonic())):
                break
            try:
                return self._request(body)
            except urllib.error.HTTPError as error:
                with error:
                    text = self._without_key(_text(error))
                    asked_to_wait = _seconds(error.headers)
                refused = _refused(text.lower(), body) if error.code in INVALID else None
                if refused is not None:
                    self._do_without(refused)
                    continue
                failure = f"HTTP {error.code} {_reason(text)}".strip()
                if error.code in HOPELESS:
                    self._give_up(error.code, failure)
                    return Answer(None, failure)
                if error.code < 500 and error.code not in PASSING:
                    return Answer(None, failure)
                if asked_to_wait > MOST_PATIENCE:
                    return Answer(None, f"{failure}; it asks to wait for {asked_to_wait:.0f} s")
                self._not_before = max(self._not_before, time.monotonic() + asked_to_wait)
            except TimeoutError:
                failure = f"no answer within {self._settings.timeout:g} s"
            except (OSError, HTTPException) as error:
                failure = f"connection failed: {getattr(error, 'reason', None) or error!r}"
            except ValueError as error:
                failure = f"the answer is not what the protocol says: {error}"
            attempt += 1
            if attempt < self._settings.tries:
                doubled = FIRST_WAIT * 2 ** (attempt - 1) * random.uniform(0.5, 1.0)
                if stop.wait(min(doubled, LONGEST_WAIT)):
                    break
        return Answer(None, f"{failure} (after {self._settings.tries} attempts)")

    def _body(self, prompt: Prompt) -> dict[str, Any]:
        """A request in the words that the endpoint has not refused."""
        limit = "max_completion_tokens" if "max_tokens" in self._refused else "max_tokens"
        body = {
            "model": self._settings.model,
            "messages": [{"role": "system", "content": prompt.system}, {"role": "user", "content": prompt.user}],
            limit: prompt.max_tokens,
            "temperature": 0,
        }
        return {name: value for name, value in body.items() if name not in self._refused}

    def _do_without(self, parameter: str) -> None:
        if parameter == "temperature" and parameter not in self._refused:
            log.warning("%s takes no temperature: answers are drawn as it likes, and may differ next time", self._url)
        self._refused.add(parameter)

    def _request(self, body: dict[str, Any]) -> Answer:
        """One attempt. Raises ValueError for an answer that is no JSON or not of its form."""
        request = urllib.request.Request(
            self._url, json.dumps(body).encode(), {"Content-Type": "application/json", "Accept": "application/json"}
        )
        key = _key(self._settings)
        if key is not None:
            request.add_unredirected_header("Authorization", f"Bearer {key}")
        with self._opener.open(request, timeout=self._settings.timeout) as response:
            answer = json.loads(self._without_key(response.read().decode()))
        try:
            choice = answer["choices"][0]
            text, ended = choice["message"]["content"], choice.get("finish_reason")
        except (KeyError, IndexError, TypeError, AttributeError):
            raise ValueError("no choices[0].message.content in it") from None
        found = text if isinstance(text, str) and text.strip() else None
        if ended == "length":
            limit = body.get("max_tokens", body.get("max_completion_tokens"))
            what = "an answer without text" if found is None else "the answer"
            return Answer(
                found, f"{what} ended at its {limit} tokens (finish_reason length); raise {self._where}.max_tokens"
            )
        if found is None and ended not in (None, "stop"):
            return Answer(None, f"an answer without text (finish_reason {ended})")
        if not isinstance(text, str):
            raise ValueError("choices[0].message.content is no text")
        return Answer(text)

    def _without_key(self, text: str) -> str:
        """What the endpoint says, which may repeat the key that it refuses; logs and results keep the rest."""
        key = _key(self._settings)
        return text.replace(key, "[key]") if key else text

    def _give_up(self, status: int, failure: str) -> None:
        variable = self._settings.key_variable
        about_key = f"the key is read from {variable}, which is {'set' if _key(self._settings) else 'not set'}"
        remedy = f"the model is called {self._settings.model!r} here" if status == 404 else about_key
        self._hopeless = f"{HOPELESS[status]} ({failure}); {remedy}"


def _opener() -> urllib.request.OpenerDirector:
    """What urllib does by default, but for redirects: one would make a GET of the question, or take the key elsewhere."""
    opener = urllib.request.OpenerDirector()
    for kind in ("ProxyHandler", "HTTPHandler", "HTTPSHandler", "HTTPDefaultErrorHandler", "HTTPErrorProcessor"):
        opener.add_handler(getattr(urllib.request, kind)())
    return opener


def _text(error: urllib.error.HTTPError) -> str:
    """What the endpoint says of an error, as it says it."""
    try:
        return error.read(2000).decode(errors="replace") or str(error.reason)
    except OSError:
        return str(error.reason)


def _reason(text: str) -> str:
    """The same on one short line."""
    try:
        message = json.loads(text)["error"]
        text = message["message"] if isinstance(message, dict) else str(message)
    except (ValueError, KeyError, TypeError):
        pass
    return " ".join(str(text).split())[:200]


def _refused(text: str, body: dict[str, Any]) -> str | None:
    """The parameter of a request that the endpoint's answer refuses and that can be done without; None if it is none."""
    # Not every complaint about the limit is about its name: the number may be too large.
    by_name = "max_completion_tokens" in text or ("max_tokens" in text and any(word in text for word in UNKNOWN))
    if "max_tokens" in body and by_name:
        return "max_tokens"
    return "temperature" if "temperature" in body and "temperature" in text else None


def _seconds(headers: Message) -> float:
    """Retry-After, a number of seconds or a date; 0 without one."""
    asked = headers.get("Retry-After") or "0"
    try:
        return max(0.0, float(asked))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(asked).timestamp() - time.time())
    except ValueError:
        return 0.0


def _key(settings: AnswersConfig) -> str | None:
    """The endpoint's key, from the environment variable that the settings name. Raises TsaeError for what is none."""
    key = os.environ.get(settings.key_variable, "").strip()
    if not (key.isascii() and key.isprintable()):
        # Not shown; nor by the library, which would quote the whole header in its complaint.
        raise TsaeError(f"{settings.key_variable}: a key in plain letters is expected, without line breaks inside")
    return key or None
