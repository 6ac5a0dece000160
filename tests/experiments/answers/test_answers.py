"""Language models that are asked: a real server with faults, a real local model, recorded answers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from email.message import Message
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest

from tests.experiments.answers.chat_server import Server
from tsae.config.experiments import AnswersConfig
from tsae.config.sections import ModelConfig
from tsae.experiments.answers import endpoint
from tsae.experiments.answers.ask import Cost, open_backend
from tsae.experiments.answers.prompts import Answer, Prompt
from tsae.experiments.explain.prompts import read_explanation, read_verdicts
from tsae.lm.model import load_tokenizer
from tsae.runtime import preemption
from tsae.runtime.errors import TsaeError

PROMPT = Prompt("You count.", "How many?", 16)
WHERE = "experiments.explain.answers"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(endpoint, "FIRST_WAIT", 0.02)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with Server(lambda request: request["messages"][-1]["content"].upper()) as running:
        yield running


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TSAE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


Ask = Callable[..., list[Answer]]


@pytest.fixture
def ask(server: Server) -> Ask:
    def ask(*questions: str, **settings: Any) -> list[Answer]:
        chosen = AnswersConfig(backend="endpoint", model="tester", base_url=server.base_url, **settings)
        return open_backend(chosen, WHERE).answers([PROMPT._replace(user=question) for question in questions])

    return ask


def test_a_prompt_is_sent_as_the_protocol_says_with_the_key_from_the_environment(
    server: Server, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", "secret")
    assert ask("how many?", key_variable="MY_KEY") == [Answer("HOW MANY?")]
    assert server.requests == [
        {
            "model": "tester",
            "messages": [{"role": "system", "content": "You count."}, {"role": "user", "content": "how many?"}],
            "max_tokens": 16,
            "temperature": 0,
        }
    ]
    assert server.keys == ["Bearer secret"]


def test_a_key_that_the_endpoint_repeats_is_in_no_answer_and_no_complaint(
    server: Server, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", "planted-key\n")  # as files have it
    server.says = lambda _request: "You came with planted-key."
    assert ask("a", key_variable="MY_KEY") == [Answer("You came with [key].")]
    server.refuses = {"model": "planted-key may not ask this model"}
    (answer,) = ask("b", key_variable="MY_KEY")
    assert (answer.text, "[key] may not ask" in str(answer.failure)) == (None, True)
    assert server.keys == ["Bearer planted-key"] * 2


@pytest.mark.parametrize("key", ["planted\nkey", "planted–key"])
def test_a_key_that_is_none_is_refused_and_not_shown(ask: Ask, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", key)
    with pytest.raises(TsaeError, match="MY_KEY: a key in plain letters is expected") as refused:
        ask("a", key_variable="MY_KEY")
    assert "planted" not in str(refused.value)


def test_without_a_key_none_is_sent(server: Server, ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    assert ask("a") == [Answer("A")]
    assert server.keys == [None]


def test_answers_stand_in_the_order_of_their_prompts_and_few_are_asked_at_a_time(server: Server, ask: Ask) -> None:
    server.faults = ["slow"] * 30
    questions = [f"question {n}" for n in range(30)]
    assert [answer.text for answer in ask(*questions, concurrency=4)] == [question.upper() for question in questions]
    assert 2 <= server.most_at_once <= 4


@pytest.mark.parametrize("fault", ["429", "500", "503", "hang", "cut", "broken", "empty"])
def test_a_passing_fault_is_outlived(server: Server, ask: Ask, fault: str) -> None:
    server.faults = [fault, fault]
    assert ask("still there?", timeout=1.0 if fault == "hang" else 60.0) == [Answer("STILL THERE?")]
    assert len(server.requests) == 3


def test_the_endpoint_decides_how_long_to_wait(server: Server, ask: Ask) -> None:
    server.faults = ["429 0.4"]
    assert ask("a") == [Answer("A")]
    assert server.times[1] - server.times[0] >= 0.4


def test_a_limit_that_one_request_meets_holds_back_all(server: Server) -> None:
    settings = AnswersConfig(backend="endpoint", model="tester", base_url=server.base_url, concurrency=2)
    asked = endpoint.Endpoint(settings, WHERE)

    def says(request: dict[str, Any]) -> str:
        while request is not server.requests[0] and not asked._not_before:
            time.sleep(0.01)  # the second request is answered when the first one's refusal was read
        return "yes"

    server.says, server.faults = says, ["429 0.4"]
    assert len(list(asked.ask([PROMPT._replace(user=str(n)) for n in range(5)], lambda *_: None))) == 5
    assert min(server.times[2:]) - server.times[0] >= 0.4


def test_a_limit_for_longer_than_anybody_waits_is_a_failure_at_once(server: Server, ask: Ask) -> None:
    server.faults = ["429 86400"]
    assert ask("a") == [Answer(None, "HTTP 429 slow down; it asks to wait for 86400 s")]
    assert len(server.requests) == 1


def test_a_time_to_wait_is_read_as_seconds_or_as_a_date() -> None:
    headers = Message()
    assert endpoint._seconds(headers) == 0
    for text, least, most in (("7", 7, 7), (formatdate(time.time() + 100, usegmt=True), 1, 100), ("soon", 0, 0)):
        del headers["Retry-After"]
        headers["Retry-After"] = text
        assert least <= endpoint._seconds(headers) <= most


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("429", "HTTP 429 slow down"),
        ("500", "HTTP 500 no luck today"),
        ("hang", "no answer within 1 s"),
        ("cut", "IncompleteRead"),
        ("broken", "not what the protocol says"),
    ],
)
def test_a_lasting_fault_becomes_a_failure_with_its_reason(server: Server, ask: Ask, fault: str, reason: str) -> None:
    server.faults = [fault] * 3
    (answer,) = ask("a", timeout=1.0 if fault == "hang" else 60.0, tries=3)
    assert answer.text is None
    assert reason in str(answer.failure)
    assert "after 3 attempts" in str(answer.failure)
    assert len(server.requests) == 3


@pytest.mark.parametrize("fault", ["400", "302"])
def test_what_will_not_pass_is_not_tried_again(server: Server, ask: Ask, fault: str) -> None:
    server.faults = [fault]
    (answer,) = ask("a")
    assert answer.failure is not None
    assert answer.failure.startswith(f"HTTP {fault}")
    assert len(server.requests) == 1


REFUSALS = {
    "max_tokens": "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead.",
    "temperature": "Unsupported value: 'temperature' does not support 0 with this model. Only the default (1) is supported.",
}
"""In the words of an endpoint that many others copy."""


@pytest.mark.parametrize("names", [["max_tokens"], ["temperature"], ["max_tokens", "temperature"]])
def test_parameters_that_the_endpoint_does_not_take_are_said_otherwise_or_left_out(
    server: Server, ask: Ask, names: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    server.refuses = {name: REFUSALS[name] for name in names}
    assert ask("a", "b", "c", concurrency=1, tries=1) == [Answer("A"), Answer("B"), Answer("C")]
    assert len(server.requests) == 3 + len(names)  # each is learnt once
    for request in server.requests[len(names) :]:
        limit = "max_completion_tokens" if "max_tokens" in names else "max_tokens"
        assert request[limit] == 16
        assert not set(names) & set(request)
        assert ("temperature" in request) == ("temperature" not in names)
    assert ("takes no temperature" in caplog.text) == ("temperature" in names)


@pytest.mark.parametrize(
    "words",
    [
        "Unrecognized request argument supplied: max_tokens",
        '{"detail": [{"loc": ["body", "max_tokens"], "type": "extra_forbidden"}]}',
    ],
)
def test_an_endpoint_that_only_says_what_it_does_not_know_is_understood(server: Server, ask: Ask, words: str) -> None:
    server.refuses = {"max_tokens": words}
    assert ask("a", tries=1) == [Answer("A")]


def test_many_threads_learn_what_is_refused_and_ask_each_question_on(server: Server, ask: Ask) -> None:
    server.refuses = REFUSALS
    questions = [f"question {n}" for n in range(40)]
    assert [answer.text for answer in ask(*questions, concurrency=8, tries=1)] == [text.upper() for text in questions]
    assert len(server.requests) <= 40 + 2 * 8


def test_a_limit_that_is_too_large_is_no_matter_of_its_name(server: Server, ask: Ask) -> None:
    server.refuses = {"max_tokens": "max_tokens is too large: 16. This model supports at most 8 completion tokens."}
    (answer,) = ask("a")
    assert answer.failure == f"HTTP 400 {server.refuses['max_tokens']}"
    assert len(server.requests) == 1


def test_an_answer_that_was_all_thinking_names_the_limit_and_is_not_asked_for_again(server: Server, ask: Ask) -> None:
    server.thoughts = 500
    (answer,) = ask("a")
    assert answer == Answer(
        None, f"an answer without text ended at its 16 tokens (finish_reason length); raise {WHERE}.max_tokens"
    )
    assert len(server.requests) == 1
    assert ask("a", max_tokens=501) == [Answer("A")]
    assert server.requests[-1]["max_tokens"] == 501
    assert ask("a", max_tokens=501) == [Answer("A")]
    assert len(server.requests) == 2


def test_an_endpoint_whose_answers_are_all_thinking_is_given_up(server: Server, ask: Ask) -> None:
    server.thoughts = 500
    with pytest.raises(TsaeError, match=r"5 requests in a row failed, .*finish_reason length\); raise .*\.max_tokens"):
        ask(*map(str, range(50)), concurrency=2)
    assert len(server.requests) < 12


def test_a_text_that_was_cut_off_is_kept_with_what_is_wrong_with_it(server: Server, ask: Ask) -> None:
    server.faults = ["babble"]
    cut = Answer("A and", f"the answer ended at its 16 tokens (finish_reason length); raise {WHERE}.max_tokens")
    assert ask("a") == ask("a") == [cut]
    assert len(server.requests) == 1
    assert read_explanation(cut) == ("", cut.failure)
    assert read_verdicts(cut, 2) == ([], cut.failure)
    assert read_explanation(cut._replace(text="EXPLANATION: numbers\nand")) == ("numbers", "")
    assert read_verdicts(cut._replace(text="[1, 0], for"), 2) == ([True, False], "")


def test_an_answer_that_was_withheld_is_not_asked_for_again(server: Server, ask: Ask) -> None:
    server.faults = ["filtered"]
    assert ask("a") == [Answer(None, "an answer without text (finish_reason content_filter)")]
    assert len(server.requests) == 1


@pytest.mark.parametrize(("fault", "remedy"), [("401", "read from NO_SUCH_KEY, which is not set"), ("404", "'tester'")])
def test_a_refused_key_or_an_unknown_model_ends_it_at_once(server: Server, ask: Ask, fault: str, remedy: str) -> None:
    server.faults = [fault] * 100
    with pytest.raises(TsaeError, match=remedy):
        ask(*map(str, range(40)), concurrency=2, key_variable="NO_SUCH_KEY")
    assert len(server.requests) < 10


def test_an_endpoint_that_is_not_there_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    dead = AnswersConfig(backend="endpoint", model="m", base_url="http://127.0.0.1:9/v1", tries=1, concurrency=2)
    with pytest.raises(TsaeError, match=r"5 requests in a row failed.*connection failed"):
        open_backend(dead, WHERE).answers([PROMPT._replace(user=str(n)) for n in range(50)])


def test_what_was_answered_is_not_asked_again(server: Server, ask: Ask, own_home: Path) -> None:
    server.faults = ["", "400"]
    first = ask("a", "b", concurrency=1)
    assert [answer.text for answer in first] == ["A", None]
    assert [answer.text for answer in ask("a", "b")] == ["A", "B"]
    assert [request["messages"][1]["content"] for request in server.requests] == ["a", "b", "b"]

    (folder,) = (own_home / "answers").iterdir()
    replay = AnswersConfig(backend="replay", model="tester", recorded=str(folder))
    replayed = open_backend(replay, WHERE).answers([PROMPT._replace(user=text) for text in ("b", "new")])
    assert replayed == [Answer("B"), Answer(None, "no answer of tester is recorded")]


def test_an_answer_that_cannot_be_kept_ends_it(ask: Ask, own_home: Path) -> None:
    own_home.mkdir()
    (own_home / "answers").write_text("no folder")
    with pytest.raises(OSError, match="answers"):
        ask("a", "b")


def test_a_line_that_a_killed_process_left_unfinished_costs_one_answer(
    server: Server, ask: Ask, own_home: Path
) -> None:
    ask("a", "b")
    (file,) = own_home.glob("answers/*/*.jsonl")
    file.write_text(file.read_text()[:-20])
    assert [answer.text for answer in ask("a", "b")] == ["A", "B"]
    assert len(server.requests) == 3


def test_a_damaged_record_is_refused(tmp_path: Path) -> None:
    (tmp_path / "recorded.jsonl").write_text('{"model": "m", "system": "s"}\n')
    settings = AnswersConfig(backend="replay", model="m", recorded=str(tmp_path / "recorded.jsonl"))
    with pytest.raises(TsaeError, match=r"recorded.jsonl: line 1 is no recorded answer"):
        open_backend(settings, WHERE)


def test_a_process_that_is_asked_to_leave_does_not_wait_for_answers(
    server: Server, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.faults = ["hang"] * 8
    monkeypatch.setattr(preemption, "requested", lambda: bool(server.requests))
    with pytest.raises(preemption.Preempted):
        ask(*map(str, range(20)), concurrency=2)
    assert len(server.requests) <= 4  # of twenty


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"backend": "endpoint", "model": "m"}, "answers.base_url: is needed for the backend endpoint"),
        ({"backend": "endpoint", "model": "m", "base_url": "localhost:80"}, "answers.base_url: 'localhost:80'"),
        ({"backend": "local"}, "answers.model: is needed"),
        ({"backend": "replay", "model": "m", "recorded": "/nowhere"}, "answers.recorded: there is no /nowhere"),
        ({"backend": "none"}, "answers.backend: none asks nobody"),
        ({"backend": "endpoint", "model": "m", "tries": 0}, "answers.tries: 0 is impossible"),
    ],
)
def test_settings_that_lack_something_are_named(settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises(TsaeError, match=complaint):
        open_backend(AnswersConfig(**settings), WHERE)


def test_a_local_model_answers_a_prompt_alone_as_it_does_in_a_batch(tiny_model: Path, own_home: Path) -> None:
    prompts = [Prompt("kaba", words, 5) for words in ("lodo mife", "rugi", "senu taba kado lofe")]
    settings = AnswersConfig(backend="local", model=str(tiny_model), batch_size=2)
    together = open_backend(settings, WHERE).answers(prompts)
    assert all(answer.text for answer in together)
    for record in own_home.glob("answers/*/*.jsonl"):
        record.unlink()
    alone = AnswersConfig(backend="local", model=str(tiny_model), batch_size=1)
    assert open_backend(alone, WHERE).answers(prompts) == together


def test_a_local_model_counts_the_tokens_of_what_it_has_not_answered(tiny_model: Path) -> None:
    backend = open_backend(AnswersConfig(backend="local", model=str(tiny_model), max_tokens=7), WHERE)
    prompts = [Prompt("kaba", "lodo mife", 5), Prompt("kaba", "lodo mife senu rugi", 5)]
    tokenizer = load_tokenizer(ModelConfig(name=str(tiny_model)))
    lengths = [len(tokenizer(f"{prompt.system}\n\n{prompt.user}\n\n")["input_ids"]) for prompt in prompts]
    assert backend.cost(prompts) == Cost(2, sum(lengths), 14, "its tokenizer")
    backend.answers(prompts[:1])
    assert backend.cost(prompts) == Cost(1, lengths[1], 7, "its tokenizer")


def test_a_prompt_longer_than_the_local_model_reads_fails_by_itself(tiny_model: Path) -> None:
    prompts = [Prompt("kaba", "lodo " * 80, 5), Prompt("kaba", "lodo", 5)]
    long, short = open_backend(AnswersConfig(backend="local", model=str(tiny_model)), WHERE).answers(prompts)
    assert "81 tokens and 5 to come" in str(long.failure)
    assert short.text
