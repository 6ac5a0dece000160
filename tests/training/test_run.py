"""The training loop on a real store: what it writes, and that a kill leaves no trace."""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from tsae.checkpoint import RunFolder, load_dictionary
from tsae.config import run as configuration
from tsae.config.run import RunConfig
from tsae.config.sections import OBJECTIVE_PRESETS
from tsae.runtime.errors import TsaeError
from tsae.store.harvest import harvest
from tsae.training.metrics import has_diverged
from tsae.training.resume import ResumeStates
from tsae.training.run import train, train_together
from tsae.training.splits import last_line, trouble

STEPS = 60


@pytest.fixture
def config(tiny_model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run of 60 steps on a store that the tests of this session share."""
    store = tmp_path_factory.getbasetemp() / "training-store"
    tree = {
        "model": {"name": str(tiny_model), "layer": 1, "device": "cpu"},
        "data": {"source": str(text), "context_length": 32, "min_length": 8, "holdout": 0.2},
        "store": {"path": str(store)},
        "sae": {"dict_size": 96, "k": 4},
        "training": {
            "steps": STEPS,
            "batch_size": 64,
            "lr": 0.003,
            "warmup_steps": 5,
            "decay_start": 40,
            "threshold_start_step": 10,
            "threshold_beta": 0.9,
            "dead_after": 1000,
            "log_every": 3,
            "save_steps": [20],
            "resume_every": 7,
            "device": "cpu",
        },
    }
    made = configuration.from_mapping(tree, "test")
    harvest(made)
    return made


def outputs(run: RunFolder) -> dict[str, bytes]:
    """Bytes of everything a run computes."""
    return {path.name: path.read_bytes() for path in (run.weights, run.metrics, run.checkpoint(20), run.config_json)}


def test_run_writes_the_checkpoint_layout(config: RunConfig, tmp_path: Path) -> None:
    run = RunFolder.of(tmp_path, "whole")
    train(config, run)
    assert run.is_trained(config)
    dictionary, written = load_dictionary(tmp_path / "whole")
    assert type(dictionary).__name__ == "TemporalMatryoshkaBatchTopKSAE"
    assert dictionary.group_sizes == (19, 77)
    assert float(dictionary.threshold) > 0
    assert (written["trainer"]["temporal_term"], written["trainer"]["temp_alpha"]) == ("prediction", 1.5)
    assert (written["trainer"]["temporal"], written["trainer"]["high_share"]) == ("within:16", 0.3)
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    assert [line["step"] for line in lines] == [*range(0, STEPS, 3), STEPS - 1]
    assert lines[-1]["fve"] > lines[0]["fve"]
    assert lines[-1]["l0"] == pytest.approx(4)
    assert not run.resume.exists()
    norms = dictionary.W_dec.norm(dim=1)
    # The high-level split is written in the unit in which the one threshold is right for it, too.
    assert torch.allclose(norms[19:], torch.ones(77), atol=1e-6)
    assert torch.allclose(norms[:19], norms[0].expand(19), atol=1e-6)


def be_killed(config: RunConfig, run: RunFolder, least_step: int) -> None:
    """Train until a state of `least_step` or later is on the disk; then this process ends as by `kill -9`."""
    write = ResumeStates._write

    def killing(states: ResumeStates, step: int, *rest: Any) -> None:
        write(states, step, *rest)
        if step >= least_step:  # the training goes on meanwhile, to whichever step
            os.kill(os.getpid(), signal.SIGKILL)

    ResumeStates._write = killing  # type: ignore[method-assign, assignment]
    ResumeStates.busy = False  # type: ignore[method-assign, assignment]  # none is left out where the disk is slow
    train(config, run)


def test_resume_is_bit_exact_after_kills(config: RunConfig, tmp_path: Path) -> None:
    # What is subtracted comes from the store again, and from no state.
    config = configuration.replace(config, training={"normalize": "centred"})
    whole, killed = RunFolder.of(tmp_path, "whole"), RunFolder.of(tmp_path, "killed")
    train(config, whole)
    for least_step in (7, 28):
        process = multiprocessing.get_context("spawn").Process(target=be_killed, args=(config, killed, least_step))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert not killed.is_trained(config)
    train(config, killed)
    assert outputs(killed) == outputs(whole)


def test_a_folder_of_another_configuration_is_refused(config: RunConfig, tmp_path: Path) -> None:
    run = RunFolder.of(tmp_path, "run")
    train(configuration.replace(config, training={"steps": 41}), run)
    before = outputs(run)
    with pytest.raises(TsaeError, match="another configuration"):
        train(config, run)
    assert outputs(run) == before


def test_trackers_receive_the_measures(config: RunConfig, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = RunFolder.of(tmp_path, "tracked")
    train(configuration.replace(config, training={"trackers": ("tensorboard",)}), run)
    tags: set[str] = set()
    for events in run.path.rglob("events.out.tfevents.*"):
        accumulator = EventAccumulator(str(events))
        accumulator.Reload()
        tags |= set(accumulator.Tags()["scalars"])
    assert {"fve", "l0", "temp_loss"} <= tags
    assert {f"{name}_{group}" for name in ("alive", "share", "l0", "fve") for group in (0, 1)} <= tags


def test_a_missing_tracker_is_named(config: RunConfig, tmp_path: Path) -> None:
    if importlib.util.find_spec("wandb"):
        pytest.skip("wandb is installed here, so it cannot be missing")
    with pytest.raises(TsaeError, match="wandb is not installed"):
        train(configuration.replace(config, training={"trackers": ("wandb",)}), RunFolder.of(tmp_path, "run"))


def test_intermediate_checkpoints_hold_the_state_before_their_step(config: RunConfig, tmp_path: Path) -> None:
    full, short = RunFolder.of(tmp_path, "full"), RunFolder.of(tmp_path, "short")
    train(config, full)
    train(configuration.replace(config, training={"save_steps": (0, 20)}), short)
    dictionary, _ = load_dictionary(tmp_path / "full", checkpoint=20)
    again, _ = load_dictionary(tmp_path / "short", checkpoint=20)
    assert torch.equal(dictionary.W_dec, again.W_dec)
    final, _ = load_dictionary(tmp_path / "full")
    assert not torch.equal(dictionary.W_dec, final.W_dec)
    with pytest.raises(TsaeError, match="never calibrated"):
        load_dictionary(tmp_path / "short", checkpoint=0)


def test_packed_runs_equal_runs_trained_alone(config: RunConfig, tmp_path: Path) -> None:
    others = [
        configuration.replace(config, sae={"k": 6}, training={"normalize": "centred"}),
        configuration.replace(config, sae={"kind": "batch_topk"}, training={"steps": 45}),
    ]
    alone = [RunFolder.of(tmp_path / "alone", str(n)) for n in range(3)]
    packed = [RunFolder.of(tmp_path / "packed", str(n)) for n in range(3)]
    configs = [config, *others]
    for one, run in zip(configs, alone, strict=True):
        train(one, run)
    # One of the pack is ahead of the others, as after a kill between two of their resumable states.
    train(configs[1], packed[1])
    train_together(list(zip(configs, packed, strict=True)))
    for a, b in zip(alone, packed, strict=True):
        assert outputs(a) == outputs(b)


def test_a_failing_run_does_not_stop_its_pack(config: RunConfig, tmp_path: Path) -> None:
    contrast = {"preset": "scale_free", **OBJECTIVE_PRESETS["scale_free"]}
    config = configuration.replace(config, objective=contrast)
    silent = configuration.replace(config, sae={"k": 1, "split_fraction": 0.02})
    good, bad = RunFolder.of(tmp_path, "good"), RunFolder.of(tmp_path, "bad")
    with pytest.raises(TsaeError, match="temporal term"):
        train_together([(silent, bad), (config, good)])
    assert good.is_trained(config)
    assert not bad.is_trained(silent)


def test_runs_that_read_other_batches_are_not_packed(config: RunConfig, tmp_path: Path) -> None:
    other = configuration.replace(config, training={"seed": 1})
    with pytest.raises(TsaeError, match="cannot be packed"):
        train_together([(config, RunFolder.of(tmp_path, "a")), (other, RunFolder.of(tmp_path, "b"))])


def test_a_diverged_training_fails_and_keeps_no_weights(config: RunConfig, tmp_path: Path) -> None:
    wild, run = configuration.replace(config, training={"lr": 1e30}), RunFolder.of(tmp_path, "wild")
    for _ in range(2):
        with pytest.raises(TsaeError, match=r"wild: training diverged.*at step \d+; lower training.lr"):
            train(wild, run)
        assert not run.weights.exists()


@pytest.mark.parametrize("kind", ["temporal", "standard_april"])
def test_a_training_that_explains_nothing_any_more_ends_with_one_line(
    config: RunConfig, tmp_path: Path, kind: str
) -> None:
    # Finite, and far worse than before it was trained.
    settings = {"lr": 1000.0, "clip_norm": 1e9, "resume_every": 1}
    wild = configuration.replace(config, training=settings, sae={"kind": kind})
    run = RunFolder.of(tmp_path, "wild")
    messages = []
    for _ in range(2):
        with pytest.raises(
            TsaeError,
            match=r"^wild: training diverged: the fraction of variance explained is -\d\S+, after -?\d\S* at first, at "
            r"step \d+; lower training.lr \(1000\) or training.clip_norm \(1e\+09\) under another run name",
        ) as raised:
            train(wild, run)
        messages.append(str(raised.value))
        assert not run.weights.exists()
        assert list(run.resume.iterdir())  # nothing of what there was is lost
        assert json.loads(run.metrics.read_text().splitlines()[0])["step"] == 0
    assert messages[0] == messages[1]


def test_a_dictionary_that_is_silent_at_the_end_is_not_kept(config: RunConfig, tmp_path: Path) -> None:
    silent = configuration.replace(
        config, sae={"kind": "standard"}, objective={"sparsity_penalty": 1e6}, training={"lr": 1.0}
    )
    run = RunFolder.of(tmp_path, "silent")
    with pytest.raises(TsaeError, match=r"silent: training diverged: no latent fires any more at step 59; lower"):
        train(silent, run)
    assert not run.is_trained(silent)


@pytest.mark.parametrize(
    ("fve", "first", "last", "diverged"),
    [
        (-34.7, -2.28, False, False),  # as at a learning rate 100 times too large, which came back to 0.03
        (-7.6e5, -2.28, False, True),
        (-55.2, -55.2, True, False),  # an untrained dense code
        (-20.5, -55.2, True, False),
        (-48.0, 0.15, True, True),
        (-2.4, -2.28, True, False),
        (-0.3, 0.9, True, True),
        (0.2, 0.9, True, False),
        (float("-inf"), 0.1, True, False),  # a batch without variance
        (float("nan"), 0.1, True, False),
    ],
)
def test_what_counts_as_diverged(fve: float, first: float, last: bool, diverged: bool) -> None:
    assert has_diverged(fve, first, last) == diverged


def test_every_line_says_how_many_latents_of_each_split_live(
    config: RunConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunFolder.of(tmp_path, "run")
    train(config, run)
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    for line in lines:
        alive, dead = ([line[f"{name}_{group}"] for group in (0, 1)] for name in ("alive", "dead"))
        assert 19 * dead[0] + 77 * dead[1] == pytest.approx(96 * line["dead_percent"] / 100, abs=1e-4)
        assert all(0 < a <= 1 for a in alive)
    assert 19 * lines[0]["alive_0"] + 77 * lines[0]["alive_1"] == pytest.approx(lines[0]["n_fired_features"], abs=1e-4)
    shown = " ".join(
        f"{told} {lines[-1][f'{name}_0']:.2f}/{lines[-1][f'{name}_1']:.2f}"
        for name, told in (("alive", "alive"), ("share", "share"), ("fve", "fve_alone"))
    )
    assert shown in json.loads(run.progress.read_text())["message"]
    assert shown in capsys.readouterr().err
    assert not caplog.records


def test_a_split_that_dies_is_warned_of_once(
    config: RunConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dying = configuration.replace(config, sae={"kind": "matryoshka"}, training={"lr": 0.3, "clip_norm": 1.0})
    run = RunFolder.of(tmp_path, "dying")
    train(dying, run)
    last = last_line(run.metrics)
    assert last["alive_1"] < 0.5
    told = [record.getMessage() for record in caplog.records if "alive" in record.getMessage()]
    assert len(told) == 1
    assert re.match(
        r"dying: step \d+: .*the low-level split \(group 1\) is \d+% alive, .*; lower training.lr to keep latents alive",
        told[0],
    )
    assert "the low-level split (group 1)" in str(trouble(last, dying))
