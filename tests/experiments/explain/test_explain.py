"""`tsae explain`: true texts, restartable stages, honest scores; with rules, with a served model, and from a record."""

from __future__ import annotations

import _thread
import dataclasses
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.experiments.answers.chat_server import Server
from tsae.checkpoint import RunFolder
from tsae.cli import main
from tsae.config import run as configuration
from tsae.config.experiments import AnswersConfig, ExplainConfig
from tsae.config.run import Counted, RunConfig
from tsae.evaluation.measures import REGISTRY
from tsae.experiments import driver
from tsae.experiments.answers import endpoint
from tsae.experiments.explain import experiment as explain
from tsae.experiments.shared.subject import Subject
from tsae.interop.explanations import read_explanations
from tsae.runtime import files
from tsae.runtime.errors import TsaeError
from tsae.stages import harvest_stage
from tsae.store.reader import Store

SETTINGS = ExplainConfig(window=8, tests=6, examples=9)


@pytest.fixture
def run(checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    """A fresh copy of the trained T-SAE, and a TSAE_HOME of its own."""
    monkeypatch.setenv("TSAE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(endpoint, "FIRST_WAIT", 0.02)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    source, run = RunFolder.of(checkpoints, "temporal"), RunFolder.of(tmp_path, "run")
    for file in (source.config_json, source.weights, source.resolved):
        files.write_atomically(run.path / file.name, lambda stream, file=file: stream.write(file.read_bytes()))
    return run


Explain = Callable[..., dict[str, Any]]


@pytest.fixture
def explained(run: RunFolder, run_config: RunConfig) -> Explain:
    """Explain the run's latents with some settings changed; the results."""

    def make(**changes: Any) -> dict[str, Any]:
        settings = dataclasses.replace(SETTINGS, **changes)
        config = configuration.replace(run_config, experiments={"explain": settings})
        (path,) = driver.run("explain", config, run)
        results: dict[str, Any] = json.loads(Path(path).read_text())
        return results

    return make


def lines(run: RunFolder, stage: str) -> dict[int, dict[str, Any]]:
    """The records of a stage by latent."""
    text = run.result(f"autointerp_{stage}", "jsonl").read_text().splitlines()
    return {record["latent"]: record for record in map(json.loads, text[1:])}


@pytest.fixture(scope="module")
def dense(run_config: RunConfig, checkpoints: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray, range]:
    """Feature activations [S, L, F], tokens and documents [S, L] of the store, and its held-out sequences."""
    store = Store.open(harvest_stage(run_config), run_config)
    state = torch.load(RunFolder.of(checkpoints, "temporal").weights, weights_only=True)
    x = store.read(range(store.n_sequences)).float()
    pre = torch.relu((x - state["b_dec"]) @ state["W_enc"] + state["b_enc"])
    codes = (pre * (pre > state["threshold"]) * state["W_dec"].norm(dim=1)).numpy()
    codes *= store.valid(Counted(1))[:, :, None]
    return codes, store.tokens, store.document, store.heldout_range


def test_texts_carry_the_true_activations_and_no_document_serves_twice(
    run: RunFolder, explained: Explain, tiny_model: Path, dense: tuple[np.ndarray, np.ndarray, np.ndarray, range]
) -> None:
    results = explained()
    codes, tokens, document, heldout = dense
    vocabulary = json.loads((tiny_model / "tokenizer.json").read_text())["model"]["vocab"]
    checked = 0
    for latent, record in lines(run, "examples").items():
        assert ("failure" in record) != ("rule" in record)
        for part in ("examples", "active", "inactive") if "rule" in record else ():
            documents = [text["document"] for text in record[part]]
            assert len(set(documents)) == len(documents) or part == "inactive"
            for text in record[part]:
                ids = [vocabulary[token.strip()] for token in text["tokens"]]
                rows, first = _find(tokens, document, text["document"], ids)
                truth = codes[rows, first : first + len(ids), latent]
                shown = np.array([text["values"].get(str(place), 0.0) for place in range(len(ids))])
                np.testing.assert_allclose(shown, truth, rtol=1e-2, atol=1e-4)
                assert (truth.max() > 0) == (part != "inactive")
                assert (rows in heldout) == (part != "examples")
                checked += 1
    assert checked > 200
    assert results["latents"]["all"] == 64
    assert results["latents"]["drawn"] + sum(results["latents"]["failures"].values()) == 64
    assert results["latents"]["testable"] == results["latents"]["drawn"]


def _find(tokens: np.ndarray, document: np.ndarray, wanted: int, ids: list[int]) -> tuple[int, int]:
    """Sequence and position at which some tokens of a document stand."""
    for row in np.flatnonzero((document == wanted).any(1)):
        for first in range(1, tokens.shape[1] - len(ids) + 1):
            if tokens[row, first : first + len(ids)].tolist() == ids and document[row, first] == wanted:
                return int(row), first
    raise AssertionError(f"document {wanted} does not hold these tokens")


def test_rules_are_scored_without_a_language_model(run: RunFolder, explained: Explain, run_config: RunConfig) -> None:
    results = explained()
    assert results["explained_by"] == "a rule over tokens (no language model)"
    assert results["chance"] == 0.5
    found = read_explanations(run.path)
    assert len(found) == results["latents"]["explained"] > 20
    scores = lines(run, "scores")
    assert set(scores) == set(found)
    mean = results["headline"]["detection"]
    assert abs(mean - np.mean([record["detection"]["score"] for record in scores.values()])) < 0.1
    # One word, one token: what a latent fires on is most of what there is to say here.
    assert mean - results["half_width_95"]["detection"] > 0.6
    assert run.result("autointerp", "png").read_bytes().startswith(b"\x89PNG")
    config = configuration.replace(run_config, experiments={"explain": SETTINGS})
    assert driver.is_done(config, run, "explain")
    assert set(driver.headlines(run, config)) <= set(REGISTRY)
    assert driver.headlines(run, config)["autointerp/detection"] == (mean, results["half_width_95"]["detection"])


def test_the_same_seed_gives_the_same_results(run: RunFolder, explained: Explain) -> None:
    first = explained()
    for file in [*run.path.glob("autointerp*"), run.result("explanations", "json")]:
        file.unlink()
    assert explained() == first


def test_fewer_latents_are_drawn_from_every_stratum(run: RunFolder, explained: Explain) -> None:
    explained()
    everything = lines(run, "examples")
    testable = {record["group"] for record in everything.values() if "rule" in record}
    results = explained(latents=8)
    drawn = [record for record in lines(run, "examples").values() if "rule" in record]
    assert len(drawn) == results["latents"]["drawn"] == 8
    assert {record["group"] for record in drawn} == testable


def test_an_intermediate_checkpoint_has_explanations_of_its_own(
    run: RunFolder, explained: Explain, run_config: RunConfig
) -> None:
    final = explained()
    kept = {file.name: file.read_bytes() for file in run.path.iterdir() if file.is_file()}
    state = torch.load(run.weights, weights_only=True)
    run.checkpoint(20).parent.mkdir()
    torch.save({**state, "threshold": state["threshold"] * 1.5}, run.checkpoint(20))
    config = configuration.replace(run_config, experiments={"explain": SETTINGS})
    assert Subject(config, run, checkpoint="20").explanations == {}
    (path,) = driver.run("explain", config, run, checkpoint="20")
    assert Path(path).name == "autointerp_step20.json"
    early = json.loads(Path(path).read_text())
    assert early["latents"] != final["latents"]
    assert early["explanations"]["file"] == "explanations_step20.json"
    assert Subject(config, run, checkpoint="20").explanations == read_explanations(
        run.result("explanations_step20", "json")
    )
    assert {name: (run.path / name).read_bytes() for name in kept if name != "progress.json"} == {
        name: content for name, content in kept.items() if name != "progress.json"
    }


# --- with a language model behind an endpoint


def says(request: dict[str, Any]) -> str:
    """A reader who names the words between the marks, and finds them again in other texts."""
    system, user = (message["content"] for message in request["messages"])
    if "EXPLANATION:" in system:
        words = sorted(set(re.findall(r"<<(.*?)>>", user)))
        return f"I see.\n**EXPLANATION:** {' '.join(words)}"
    words = set(re.search(r"Description: (.*)", user)[1].split())
    texts = re.findall(r"^Text \d+: (.*)$", user, re.MULTILINE)
    if "<<" in user:
        kept = [set(" ".join(re.findall(r"<<(.*?)>>", text)).split()) <= words for text in texts]
    else:
        kept = [bool(set(text.split()) & words) for text in texts]
    return f"Here they are: {json.dumps([int(yes) for yes in kept])}"


@pytest.fixture
def server() -> Iterator[Server]:
    with Server(says) as running:
        yield running


def served(server: Server, **changes: Any) -> AnswersConfig:
    return AnswersConfig(backend="endpoint", model="reader", base_url=server.base_url, **changes)


def questions(server: Server) -> list[str]:
    return [json.dumps(request["messages"]) for request in server.requests]


def test_a_served_model_explains_and_judges_through_faults(run: RunFolder, explained: Explain, server: Server) -> None:
    # Twelve explanations are asked for first; no question meets as many faults as it has attempts.
    faults = ["429", "broken", "500", "cut", "hang"]
    server.faults = [*faults, *[""] * 12, *faults]
    results = explained(answers=served(server, timeout=1.0), latents=12)
    assert results["explained_by"] == f"reader at {server.base_url}"
    assert results["latents"]["scored"] == results["latents"]["drawn"] == 12
    assert "some verdicts are missing" not in results["latents"]["failures"]
    assert results["fuzzing"]["all"]["mean"] > 0.6
    assert all(set(text.split()) <= _words(run, latent) for latent, text in read_explanations(run.path).items())


def _words(run: RunFolder, latent: int) -> set[str]:
    """The words of a latent's examples on which it fires."""
    return {
        text["tokens"][int(place)].strip()
        for text in lines(run, "examples")[latent]["examples"]
        for place in text["values"]
    }


def test_an_interrupted_run_asks_nothing_twice_and_ends_the_same(
    run: RunFolder, explained: Explain, server: Server
) -> None:
    whole = explained(answers=served(server), latents=20)
    every = set(questions(server))
    assert len(every) == len(server.requests)
    for file in [*run.path.glob("autointerp*"), run.result("explanations", "json")]:
        file.unlink()
    shutil.rmtree(run.path.parent.parent / "home")
    server.requests.clear()

    server.faults = [""] * 70 + ["401"] * 200
    with pytest.raises(TsaeError, match="the key is refused"):
        explained(answers=served(server, concurrency=1), latents=20)
    done = {latent for latent, record in lines(run, "explanations").items() if "explanation" in record}
    assert len(done) == 20
    answered = set(questions(server)[:70])
    server.faults = []
    server.requests.clear()
    assert explained(answers=served(server), latents=20) == whole
    assert set(questions(server)) == every - answered


def _sent(server: Server) -> tuple[int, int, int]:
    """Questions, tokens by their length and the longest answers of what was sent."""
    texts = [[message["content"] for message in request["messages"]] for request in server.requests]
    tokens = sum(-(-sum(map(len, both)) // 4) for both in texts)
    return len(texts), tokens, sum(request["max_tokens"] for request in server.requests)


def test_the_cost_is_said_first_and_is_what_is_sent(
    run: RunFolder, explained: Explain, run_config: RunConfig, server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = served(server, concurrency=1, prompt_price=0.5, answer_price=2.0)
    settings = dataclasses.replace(SETTINGS, answers=answers, latents=12)
    config = configuration.replace(run_config, experiments={"explain": settings})

    def cost() -> tuple[int, int, int]:
        who, asks = driver.cost("explain", config, run)
        assert who.startswith("explain run: 12 of 64 latents; left out: ")
        found = re.match(r"reader at \S+: ([\d,]+) questions of about ([\d,]+) tokens \(characters / 4\)", asks)
        longest = re.search(r"answers of at most ([\d,]+);", asks)
        assert found
        assert longest
        questions, tokens, most = (int(text.replace(",", "")) for text in (*found.groups(), longest[1]))
        assert asks.endswith(
            f"; costs {tokens / 2e6:,.2f} (prompts alone) to {tokens / 2e6 + most * 2 / 1e6:,.2f} (longest answers)"
        )
        return questions, tokens, most

    before = {path: path.read_bytes() for path in run.path.iterdir() if path.name != "progress.json"}
    first = cost()
    assert server.requests == []
    assert {path: path.read_bytes() for path in run.path.iterdir() if path.name != "progress.json"} == before

    server.faults = [""] * 12 + ["401"] * 10
    with pytest.raises(TsaeError, match="the key is refused"):
        explained(answers=answers, latents=12)
    server.requests = server.requests[:12]
    explaining, judging = _sent(server), cost()
    server.faults, server.requests = [], []
    explained(answers=answers, latents=12)
    assert _sent(server) == judging  # every explanation is known by then
    assert f"{judging[0]} questions of about {judging[1]:,} tokens" in capsys.readouterr().err
    assert first[::2] == (explaining[0] + judging[0], explaining[2] + judging[2])
    assert first[1] == pytest.approx(explaining[1] + judging[1], rel=0.05)  # but for the words of the explanations
    assert driver.cost("explain", config, run) == [f"{run.result('autointerp', 'json')}: complete already"]


def test_a_dry_run_prints_the_cost_and_who_is_left_out(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(run.path.parent.parent)
    arguments = ["explain", "--run_name", "run", "--checkpoints_path", folder, "experiments.explain.window=8"]
    assert main([*arguments, "--dry-run"]) == 0
    (who,) = capsys.readouterr().out.splitlines()
    drawn = int(re.match(r"explain run: (\d+) of 64 latents; left out: ", who)[1])
    assert drawn + sum(int(count) for count in re.findall(r"(?:: |; )(\d+) (?:silent|active|inactive)", who)) == 64
    assert not run.result("autointerp_examples", "jsonl").exists()


def test_results_do_not_depend_on_how_many_questions_are_under_way(
    run: RunFolder, explained: Explain, server: Server
) -> None:
    def made(concurrency: int) -> tuple[dict[str, Any], dict[str, bytes]]:
        results = explained(answers=served(server, concurrency=concurrency), latents=12)
        files = [*run.path.glob("autointerp_*.jsonl"), run.result("explanations", "json")]
        content = {file.name: file.read_bytes() for file in files}
        for file in [*run.path.glob("autointerp*"), *files]:
            file.unlink(missing_ok=True)
        shutil.rmtree(run.path.parent.parent / "home/answers")
        del results["settings"], results["made_from"], results["digest"]
        return results, content

    one = made(1)
    assert server.most_at_once == 1
    server.faults = ["slow", "slow", "429 0.05", "slow", "", "500"] * 4  # later ones overtake
    assert made(12) == one
    assert server.most_at_once > 1
    assert len(one[1]) == 4


def test_ctrl_c_leaves_what_was_answered(explained: Explain, server: Server, tmp_path: Path) -> None:
    def interrupted(request: dict[str, Any]) -> str:
        if len(server.requests) == 20:
            _thread.interrupt_main()
        return says(request)

    server.says = interrupted
    with pytest.raises(KeyboardInterrupt):
        explained(answers=served(server, concurrency=2), latents=12)
    (file,) = tmp_path.glob("home/answers/*/*.jsonl")
    kept = [json.loads(line)["user"] for line in file.read_text().splitlines()]
    assert len(kept) >= 18  # but for the one request that is under way, and the one that is answered now
    server.requests.clear()
    server.says = says
    assert explained(answers=served(server, concurrency=2), latents=12)["latents"]["scored"] == 12
    assert not {request["messages"][1]["content"] for request in server.requests} & set(kept)


def test_answers_to_other_questions_or_of_another_model_are_not_taken(explained: Explain, server: Server) -> None:
    explained(answers=served(server), latents=4)
    first = set(questions(server))
    server.requests.clear()
    explained(answers=served(server), latents=4, examples=3)
    assert len(set(questions(server)) - first) >= 4  # explanations from fewer texts
    server.requests.clear()
    explained(answers=dataclasses.replace(served(server), model="another"), latents=4)
    assert set(questions(server)) == first


def test_recorded_answers_give_the_same_results_without_the_endpoint(
    explained: Explain, server: Server, tmp_path: Path
) -> None:
    first = explained(answers=served(server), latents=6)
    (recorded,) = (tmp_path / "home/answers").iterdir()
    server.requests.clear()
    replay = AnswersConfig(backend="replay", model="reader", recorded=str(recorded))
    second = explained(answers=replay, latents=6)
    assert server.requests == []
    for name in ("headline", "half_width_95", "latents", "explanations", "by_rate"):
        assert second[name] == first[name]


def test_what_cannot_be_read_is_a_failure_with_its_reason(run: RunFolder, explained: Explain, server: Server) -> None:
    asked: list[str] = []

    def sloppy(request: dict[str, Any]) -> str:
        system, user = (message["content"] for message in request["messages"])
        if "EXPLANATION:" in system:
            asked.append(user)
            return "No idea." if len(asked) <= 3 else says(request)
        return "Yes to all!" if "<<" in user else says(request)

    server.says = sloppy
    results = explained(answers=served(server, concurrency=1), latents=8)
    failed = [record["failure"] for record in lines(run, "explanations").values() if "failure" in record]
    assert failed == ["the answer has no line that begins with EXPLANATION:"] * 3
    assert results["latents"]["explained"] == results["latents"]["scored"] == 5
    assert results["latents"]["failures"]["no explanation in the answer"] == 3
    for record in lines(run, "scores").values():
        assert record["failure"] == "the answer has no list of 5 zeros and ones"
        assert record["fuzzing"]["score"] is None
        assert record["fuzzing"]["unanswered"] > 0
        assert record["detection"]["score"] is not None
    assert results["fuzzing"]["all"]["mean"] is None
    assert "fuzzing" not in results["headline"]


def test_explanations_from_elsewhere_are_not_written_over(run: RunFolder, explained: Explain, server: Server) -> None:
    target = run.result("explanations", "json")
    target.write_text('{"3": "from SAEBench"}\n')
    with pytest.raises(TsaeError, match=r"explanations.json: was not made by `tsae explain`"):
        explained(answers=served(server), latents=6)
    assert server.requests == []
    assert target.read_text() == '{"3": "from SAEBench"}\n'
    target.unlink()

    explained(answers=served(server), latents=6)
    own = target.read_text()
    assert explained()["latents"]["explained"] > 6  # its own ones are replaced
    assert target.read_text() != own
    target.write_text('{"3": "edited"}\n')
    with pytest.raises(TsaeError, match="was not made by"):
        explained(answers=served(server), latents=6)


# --- files and refusals


def test_a_stage_continues_after_the_last_whole_line(run: RunFolder, explained: Explain) -> None:
    first = explained()
    run.result("autointerp", "json").unlink()
    run.result("explanations", "json").unlink()
    for stage in ("explanations", "scores"):
        path = run.result(f"autointerp_{stage}", "jsonl")
        text = path.read_text()
        path.write_text(text[: len(text) // 2])
    assert explained() == first
    assert len(lines(run, "scores")) == first["latents"]["scored"]


def test_half_a_file_is_made_again(run: RunFolder, explained: Explain) -> None:
    first = explained()
    run.result("autointerp", "json").write_text('{"explanations": ')
    path = run.result("autointerp_examples", "jsonl")
    path.write_text("\n".join(path.read_text().splitlines()[:10]))
    assert explained() == first


def test_other_settings_begin_anew(run: RunFolder, explained: Explain) -> None:
    explained()
    explained(window=16)
    lengths = {len(text["tokens"]) for record in lines(run, "examples").values() for text in record.get("active", ())}
    assert max(lengths) == 16


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"window": 200}, "experiments.explain.window: 200 is too long"),
        ({"tests": 0}, "experiments.explain.tests: 0 is impossible"),
        ({"sequences": 2}, "no latent can be explained; of most: active in fewer than 4 documents"),
        ({"answers": AnswersConfig(backend="endpoint", model="m")}, "explain.answers.base_url: is needed"),
    ],
)
def test_what_cannot_work_is_refused_with_its_reason(
    run: RunFolder, explained: Explain, changes: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(TsaeError, match=complaint):
        explained(**changes)
    assert not run.result("explanations", "json").exists()
    assert not run.result("autointerp", "json").exists()


def test_without_a_store_the_command_that_makes_one_is_named_and_nothing_is_left(
    run: RunFolder, run_config: RunConfig, tmp_path: Path
) -> None:
    before = {path.name for path in run.result("x", "json").parent.iterdir()}
    config = configuration.replace(run_config, store={"path": str(tmp_path / "nowhere")})
    with pytest.raises(TsaeError, match=r"no activation store is here; `tsae harvest YAML` makes one"):
        driver.run("explain", config, run)
    assert {path.name for path in run.result("x", "json").parent.iterdir()} == before


def test_a_synthetic_world_has_no_text(run_config: RunConfig, run: RunFolder) -> None:
    config = configuration.replace(run_config, data={"source": "synthetic"})
    for name in ("explain", "features"):
        with pytest.raises(TsaeError, match="synthetic world, without text"):
            driver.run(name, config, run)


def test_the_command_prints_where_its_results_are(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(run.path.parent.parent)
    arguments = ["explain", "--run_name", "run", "--checkpoints_path", folder]
    assert main([*arguments, "experiments.explain.window=8", "experiments.explain.latents=5"]) == 0
    assert capsys.readouterr().out.strip() == str(run.result("autointerp", "json"))
    assert main([*arguments, "experiments.explain.answers.backend=chatgpt"]) == 2
    assert "allowed: none, local, endpoint, replay" in capsys.readouterr().err


def test_a_local_model_that_says_nothing_useful_ends_with_the_reason(explained: Explain, tiny_model: Path) -> None:
    local = AnswersConfig(backend="local", model=str(tiny_model))
    with pytest.raises(TsaeError, match=r"none of 3 latents could be explained; mostly: .*64 positions"):
        explained(answers=local, latents=3)


def test_version_is_part_of_what_decides_a_stage(
    run: RunFolder, explained: Explain, monkeypatch: pytest.MonkeyPatch
) -> None:
    explained(latents=4)
    before = run.result("autointerp_examples", "jsonl").read_text().splitlines()[0]
    monkeypatch.setattr(explain, "VERSION", explain.VERSION + 1)
    run.result("autointerp", "json").unlink()
    explained(latents=4)
    assert run.result("autointerp_examples", "jsonl").read_text().splitlines()[0] != before
