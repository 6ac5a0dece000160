"""What is said of the cost before anything starts; the room on the disk is a quota's, which a stand-in for `quota` tells."""

import re
from pathlib import Path

import pytest
import yaml

from tsae.cli import main
from tsae.config import run as configuration
from tsae.runtime.errors import TsaeError
from tsae.runtime.space import free_for, shown
from tsae.store.harvest import harvest
from tsae.store.layout import StoreLayout, store_path
from tsae.sweep.cost import cost_of_run, store_of


@pytest.fixture
def quota(tmp_path: Path, monkeypatch):
    """Let `quota` print these lines; numbers are kilobytes used, soft and hard limit."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")

    def says(*lines: str) -> None:
        printed = "\n".join(["Disk quotas for user me (uid 1000):", *lines])
        (folder / "quota").write_text(f"#!/bin/sh\ncat <<'END'\n{printed}\nEND\n")
        (folder / "quota").chmod(0o755)

    return says


@pytest.fixture
def config_file(tiny_model, text, tmp_path: Path) -> Path:
    """A run's YAML on the tiny model."""
    settings = {
        "model": {"name": str(tiny_model), "layer": 1, "device": "cpu", "batch_size": 8},
        "data": {"source": str(text), "context_length": 16, "min_length": 4, "holdout": 0.2},
        "sae": {"dict_size": 64, "k": 4},
        "training": {"steps": 20, "batch_size": 32, "device": "cpu"},
    }
    path = tmp_path / "little.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.mark.parametrize(
    ("line", "left"),
    [
        ("/ 100 0 300 0 0 0", 200),
        ("/ 100 250 0 0 0 0", 150),
        ("/ 400* 250 300 6days 0 0 0", 0),
        ("/ 100 0 0 0 0 0", None),
        ("/elsewhere 100 0 300 0 0 0", None),
        ("/ none", None),
    ],
)
def test_a_quota_counts_where_it_is_of_this_disk_and_has_a_limit(quota, tmp_path, line, left):
    without = free_for(tmp_path / "not" / "there")
    quota(line)
    found = free_for(tmp_path / "not" / "there")
    assert found.quota == (left is not None)
    assert found.bytes == (left * 1024 if left is not None else pytest.approx(without.bytes, rel=0.2))
    assert found.disk == without.disk


def test_the_papers_run_is_refused_where_it_does_not_fit_with_the_setting_that_does(quota, capsys):
    quota("/ 0 0 5000000 0 0 0")
    words = ["sweep", "split_fraction", "--base", "gemma-2-2b", "--dry-run"]
    assert main(words) == 2
    shown_first = capsys.readouterr().out
    assert re.search(r"harvest +\d +92\d GB", shown_first)
    assert "warning: harvest: no GPU, and google/gemma-2-2b has 2.6 G parameters" in shown_first
    assert "928 GB of disk are needed, 5.1 GB are left by the quota; data.max_tokens=" in shown_first
    setting = re.search(r"data\.max_tokens=\d+", shown_first)[0]
    assert main([*words, setting]) == 0
    assert "\nrefused: " not in capsys.readouterr().out
    quota("/ 0 0 9000000 0 0 0")
    assert main([*words, "store.window=2GB", "data.holdout=0.001"]) == 0
    assert re.search(r"harvest +\d +4.8 GB", capsys.readouterr().out)  # the window, what is held out, 8 bytes a token
    assert main([*words, "store.window=200GB", "data.holdout=0.001"]) == 2
    assert "a smaller store.window, or data.max_tokens, would fit" in capsys.readouterr().out


def test_a_cluster_gives_stages_the_gpus_that_it_says(tmp_path, capsys):
    site = tmp_path / "cluster.yaml"
    site.write_text("harvest: {gpus: 2, nodes: 2}\ntrain: {gpus: 1}\n")
    words = [
        "sweep",
        "split_fraction",
        "--base",
        "gemma-2-2b",
        "--executor",
        "slurm",
        "--cluster",
        str(site),
        "--dry-run",
    ]
    main(words)
    said = capsys.readouterr().out
    assert re.search(r"harvest +4 ", said)
    assert re.search(r"train +× 4 +1 ", said)
    assert re.findall(r"warning: (\w+): no GPU", said) == ["evaluate"]


@pytest.mark.parametrize("command", ["sweep", "train", "harvest"])
def test_what_does_not_fit_is_refused_before_anything_starts(quota, config_file, home, tmp_path, capsys, command):
    quota("/ 0 0 20 0 0 0")
    sweep = tmp_path / "one.yaml"
    sweep.write_text(f"base: {config_file}\nstages: [train]\ngrid: {{sae.k: [4]}}\n")
    words = [str(sweep), "--executor", "debug"] if command == "sweep" else [str(config_file)]
    assert main([command, *words]) == 2
    said = capsys.readouterr().err
    assert "20 kB are left by the quota" in said
    assert not list(home.glob("stores/*/activations"))
    assert not list(home.glob("checkpoints/*/*"))


def test_a_harvest_is_refused_when_its_exact_size_is_known(quota, config_file):
    config = configuration.load(config_file)
    quota("/ 0 0 20 0 0 0")
    with pytest.raises(TsaeError, match="of activations are to be written and there is room for 20 kB"):
        harvest(config)
    quota("/ 0 0 20000 0 0 0")
    harvest(config)  # the text that was prepared is still there
    assert StoreLayout(store_path(config)).is_whole()


def test_the_size_of_a_store_is_told_before_and_counted_after(config_file):
    config = configuration.load(config_file)
    before = store_of(config)
    assert before.missing == before.bytes
    path = harvest(config)
    after = store_of(config)
    assert after.missing == 0
    assert after.width == 32
    assert 0.3 < before.bytes / after.bytes < 3  # of words that are one token each, and of texts that fill no context
    layout = StoreLayout(path)
    layout.shard(0).unlink()
    assert store_of(config).missing == layout.geometry.shard_bytes(0)


def test_the_size_of_a_training_is_what_it_writes(config_file, tmp_path):
    config = configuration.load(config_file)
    from tsae.checkpoint import RunFolder
    from tsae.stages import harvest_stage, train_stage

    run = RunFolder.of(tmp_path, "run")
    harvest_stage(config)
    told = cost_of_run(config, run)
    assert [work.kind for work in told.works] == ["train"]
    train_stage(config, tmp_path, "run")
    assert any(shown(4 * (64 * 65 + 32)) in line for line in told.lines)
    assert run.weights.stat().st_size == pytest.approx(4 * (64 * 65 + 32), rel=0.4)  # with the archive's own bytes
    assert cost_of_run(config, run).works == ()


def test_memory_that_is_not_here_is_refused_with_a_smaller_pool(config_file, tmp_path):
    asked = [
        "data.source=synthetic",
        "synthetic.sequences=1_000_000_000",
        "data.context_length=1000",
        "training.pool_sequences=1_000_000_000",
    ]
    from tsae.checkpoint import RunFolder

    cost = cost_of_run(configuration.load(config_file, asked), RunFolder(tmp_path / "run" / "trainer_0"))
    assert "synthetic.sequences=" in cost.refused[0]
    assert re.search(
        r"train: .* TB of memory are needed, this machine has .*; training.pool_sequences=\d+ would fit",
        cost.refused[1],
    )


def test_a_probe_says_how_long_it_takes(config_file, home, capsys):
    assert main(["train", str(config_file), "--dry-run", "--probe"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"harvest: [\d,]+ tokens/s, ", said)
    assert re.search(r"train little: \S+ s a step, ", said)
    assert "one after another: " in said
    assert not list(home.glob("stores/*/activations"))


def test_a_probe_needs_the_model(config_file, capsys):
    assert main(["harvest", str(config_file), "model.name=google/gemma-2-2b", "--probe"]) == 2
    assert "--probe: google/gemma-2-2b is not on this machine" in capsys.readouterr().err


def test_a_model_of_unknown_size_is_said(config_file, capsys):
    words = ["model.name=somebody/unheard-of", "model.layer=1"]
    assert main(["harvest", str(config_file), *words, "--dry-run"]) == 0
    assert "not known: the size of somebody/unheard-of" in capsys.readouterr().out
