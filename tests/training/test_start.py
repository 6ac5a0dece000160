"""Training that begins with the weights of another run."""

import json
import multiprocessing
import signal
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from tests.system.dying import train_and_die
from tsae.checkpoint import RunFolder, load_dictionary, save_dictionary
from tsae.config import run as configuration
from tsae.runtime import metadata
from tsae.runtime.errors import TsaeError
from tsae.sae.init import new_dictionary, random_dictionary
from tsae.sae.kinds import KINDS
from tsae.training.resume import ResumeStates
from tsae.training.run import train
from tsae.training.start import begin_with


@pytest.fixture
def trained(normalised, tmp_path: Path) -> Path:
    """The folder of a trained run of 96 latents."""
    run = RunFolder.of(tmp_path, "first")
    train(normalised, run)
    return run.path.parent


def onwards(config, start: Path, sae=None, **training):
    """`config` begun with the weights in `start`, as a file would say it."""
    tree = configuration.to_yaml(config)
    tree.pop("written", None)
    tree["sae"] |= sae or {}
    tree["training"] |= {"init_from": str(start), "init_sha256": None, **training}
    return configuration.from_mapping(tree, "test")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("more", [0, 40])
def test_a_dictionary_that_is_begun_with_gives_what_the_given_one_gives(normalised, kind, more):
    sae = configuration.replace(normalised, sae={"kind": kind, "dict_size": 80 + more}).sae
    start = random_dictionary(KINDS[kind].dictionary.__name__, 32, 80)
    fresh = new_dictionary(sae, 32, seed=3)
    before = fresh.W_dec.detach().clone()
    scale, shift = 0.5, torch.linspace(-1, 1, 32)
    # `scale` and `shift` lead back to raw activations, as a trainer has them.
    begin_with(fresh, start, scale, shift)
    at, n = [], 0
    for old, new in zip(start.group_sizes, fresh.group_sizes, strict=True):
        at += range(n, n + old)
        n += new
    x = torch.randn(50, 32)
    codes = fresh.pre_activations((x - shift) / scale)[:, at] * scale
    assert torch.allclose(codes, start.pre_activations(x), atol=1e-4)
    assert torch.equal(fresh.W_dec[at], start.W_dec)
    assert torch.allclose(fresh.b_dec * scale + shift, start.b_dec, atol=1e-5)
    rest = [row for row in range(80 + more) if row not in set(at)]
    assert torch.equal(fresh.W_dec[rest], before[rest])


def test_it_goes_on_from_the_weights_and_says_so(normalised, trained, tmp_path):
    config = onwards(normalised, trained)
    run = RunFolder.of(tmp_path, "second")
    train(config, run)
    first, second = (
        json.loads((folder / "trainer_0" / "metrics.jsonl").read_text().splitlines()[0])
        for folder in (trained, run.path.parent)
    )
    assert second["fve"] > first["fve"] + 0.2
    assert run.load_config().training.init_sha256 == config.training.init_sha256
    (trained / "trainer_0" / "ae.pt").unlink()
    assert run.is_trained(run.load_config())  # which needs the other run no more


def test_more_latents_begin_where_the_given_ones_are(normalised, trained, tmp_path):
    run = RunFolder.of(tmp_path, "wide")
    train(onwards(normalised, trained, {"dict_size": 160}), run)
    assert load_dictionary(run.path)[0].dict_size == 160


def test_a_killed_run_goes_on_without_the_other(normalised, trained, tmp_path):
    config = onwards(normalised, trained, resume_every=10)
    straight, cut = RunFolder.of(tmp_path, "straight"), RunFolder.of(tmp_path, "cut")
    train(config, straight)

    # In step 25 the state of step 10 is whole, since that of step 20 waits for it there.
    killed = multiprocessing.get_context("spawn").Process(target=train_and_die, args=(config, cut, "in a step", 25))
    killed.start()
    killed.join()
    assert killed.exitcode == -signal.SIGKILL
    assert (cut.resume / "latest").exists()
    (trained / "trainer_0" / "ae.pt").rename(tmp_path / "away.pt")
    train(config, cut)
    one, two = (load_dictionary(run.path)[0].state_dict() for run in (straight, cut))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_the_content_of_the_weights_is_the_runs_identity(normalised, trained, tmp_path):
    config = onwards(normalised, trained)
    moved = trained.rename(tmp_path / "moved")
    assert onwards(normalised, moved).training_hash == config.training_hash
    assert config.training_hash != normalised.training_hash
    save_dictionary(moved / "trainer_0" / "ae.pt", new_dictionary(normalised.sae, 32, seed=9))
    assert onwards(normalised, moved).training_hash != config.training_hash
    with pytest.raises(TsaeError, match="has other weights than"):
        train(onwards(normalised, moved, init_sha256=config.training.init_sha256), RunFolder.of(tmp_path, "new"))


@pytest.mark.parametrize(
    ("sae", "training", "words"),
    [
        ({"dict_size": 48}, {}, r"has groups of \[19, 77\] latents, this run of \[9, 39\]"),
        ({"kind": "jump_relu"}, {"pair_rule": "none", "threshold_start_step": None}, "sae.kind: jump_relu trains a"),
    ],
)
def test_what_cannot_become_this_run_is_one_line(normalised, trained, tmp_path, sae, training, words):
    with pytest.raises(TsaeError, match=words):
        train(onwards(normalised, trained, sae, **training), RunFolder.of(tmp_path, "other"))
    assert not (tmp_path / "other").exists()


def test_a_run_that_is_not_there_is_refused_at_once(normalised, tmp_path):
    with pytest.raises(TsaeError, match=r"init_from: .*nowhere: no ae\.pt is here"):
        onwards(normalised, tmp_path / "nowhere")
    with pytest.raises(TsaeError, match="init_sha256: abc is impossible"):
        configuration.from_mapping({"training": {"init_sha256": "abc"}}, "test")


def test_more_steps_of_a_finished_run_are_told_the_way(normalised, trained, tmp_path):
    longer = configuration.replace(normalised, training={"steps": 120})
    with pytest.raises(TsaeError, match=f"another name with training.init_from={trained} trains on from its weights"):
        train(longer, RunFolder.of(tmp_path, "first"))


@pytest.fixture
def short(normalised):
    """A configuration whose schedules do not depend on how many steps there are, and whose last state is kept."""
    return configuration.replace(
        normalised,
        objective={"temporal_anneal": 1.0},
        training={"warmup_steps": 5, "threshold_start_step": 10, "steps": 30, "resume_every": 7, "keep_state": True},
    )


def grown(config, steps: int = 50, **training):
    return configuration.replace(config, training={"steps": steps, **training})


def test_a_finished_run_goes_on_when_its_steps_are_raised_to_what_it_would_have_been(short, tmp_path):
    run, whole = RunFolder.of(tmp_path, "grown"), RunFolder.of(tmp_path, "whole")
    train(short, run)
    before, first = run.weights.read_bytes(), run.metrics.read_text().splitlines()
    assert sorted(path.name for path in run.kept.iterdir()) == ["latest", "step_30"]
    train(short, run)  # does nothing
    for steps in (40, 50):
        train(grown(short, steps), run)
    train(grown(short), whole)
    assert run.weights.read_bytes() == whole.weights.read_bytes()
    assert run.checkpoint(30).read_bytes() == before
    assert run.checkpoint(40).exists()
    assert load_dictionary(run.path, checkpoint=30)[0].dict_size == 96
    assert run.training_hash() == grown(short).training_hash
    assert not run.resume.exists()
    assert sorted(path.name for path in run.kept.iterdir()) == ["latest", "step_50"]
    logged = run.metrics.read_text().splitlines()
    assert logged[: len(first)] == first
    assert [json.loads(line)["step"] for line in logged][-1] == 49
    assert "inexact" not in json.loads(run.provenance.read_text())


def test_without_a_state_it_is_refused_and_told_how(short, tmp_path):
    run = RunFolder.of(tmp_path, "run")
    train(configuration.replace(short, training={"keep_state": False}), run)
    assert not run.kept.exists()
    with pytest.raises(TsaeError, match=r"training\.steps is 30.*training\.keep_state=true from the start"):
        train(grown(short), run)
    train(short, run)
    with pytest.raises(TsaeError, match=r"training\.lr"):
        train(grown(short, lr=0.1), run)


@pytest.mark.parametrize("every", [0, 7])
def test_a_state_is_not_kept_longer_than_it_is_asked_for(short, tmp_path, every):
    run = RunFolder.of(tmp_path, "run")
    train(short, run)
    train(grown(short, keep_state=False, resume_every=every), run)
    assert run.is_trained(grown(short))
    assert not run.kept.exists()


def test_a_run_that_ended_between_its_last_state_and_its_weights_comes_to_its_end(short, tmp_path, monkeypatch):
    run, whole = RunFolder.of(tmp_path, "run"), RunFolder.of(tmp_path, "whole")
    with monkeypatch.context() as broken:
        broken.setattr("tsae.training.run.save_run", Mock(side_effect=TsaeError("no space")))
        with pytest.raises(TsaeError, match="no space"):
            train(short, run)
    assert not run.weights.exists()
    train(short, run)
    train(short, whole)
    assert run.weights.read_bytes() == whole.weights.read_bytes()
    assert run.metrics.read_bytes() == whole.metrics.read_bytes()
    assert sorted(path.name for path in run.kept.iterdir()) == ["latest", "step_30"]


def test_what_a_killed_process_left_of_its_end_is_done_by_the_first_of_several(short, tmp_path, monkeypatch):
    run = RunFolder.of(tmp_path, "run")
    train(short, run)
    run.kept.rename(run.resume)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    run.end(short)
    assert run.resume.exists()
    monkeypatch.setenv("RANK", "0")
    for _ in range(2):
        run.end(short)
        assert [run.resume.exists(), (run.kept / "step_30").exists()] == [False, True]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"training": {"warmup_steps": None}}, "warm-up went"),
        ({"training": {"threshold_start_step": None}}, "threshold went"),
        ({"training": {"decay_start": 20}}, "decay went"),
        ({"objective": {"temporal_anneal": 4.0}}, "weight of the temporal term went"),
    ],
)
def test_what_went_by_the_number_of_steps_is_said_in_provenance(short, tmp_path, changes, told):
    short, run = configuration.replace(short, **changes), RunFolder.of(tmp_path, "run")
    train(short, run)
    train(grown(short), run)
    (inexact,) = json.loads(run.provenance.read_text())["inexact"]
    assert inexact.startswith(f"from step 30, the last of a run whose {told} by its 30 steps")


@pytest.mark.parametrize("at", range(4))
def test_growing_survives_a_kill_anywhere(short, tmp_path, monkeypatch, at):
    run, whole = RunFolder.of(tmp_path, "grown"), RunFolder.of(tmp_path, "whole")
    train(short, run)
    train(grown(short), whole)
    places = [(RunFolder, "claim"), (metadata, "write"), (ResumeStates, "save"), (RunFolder, "end")]
    owner, name = places[at]

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(owner, name, killed)
        with pytest.raises(KeyboardInterrupt):
            train(grown(short), run)
    train(grown(short), run)
    assert run.weights.read_bytes() == whole.weights.read_bytes()
    assert sorted(path.name for path in run.kept.iterdir()) == ["latest", "step_50"]
    assert run.checkpoint(30).exists()
