"""Keys that stand in the environment, in a command line or in a changed checkout are nowhere in what is written."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tsae.cli import main
from tsae.runtime.secrets import hide

REPOSITORY = Path(__file__).resolve().parents[2]
PLANTED = {
    "HF_TOKEN": "hf_PlantedPlantedPlanted",
    "WANDB_API_KEY": "planted0planted0planted0planted0planted0",
    "OPENAI_API_KEY": "sk-planted-planted-planted",
    "MY_LAB_PASSWORD": "planted horse battery",
    "AWS_SECRET_ACCESS_KEY": "plantedplanted/planted",
}
IN_ENV_FILE = "written-down-in-dot-env"


def written_with(word: str, folder: Path) -> list[str]:
    return [str(path) for path in folder.rglob("*") if path.is_file() and word.encode() in path.read_bytes()]


def test_a_sweep_writes_down_no_key(tmp_path: Path, tiny_model: Path, text: Path) -> None:
    # A checkout with changes, whose copy and differences each launch keeps: one in the code, one in a tracked .env.
    checkout, git = (
        tmp_path / "checkout",
        ["git", "-c", "user.name=n", "-c", "user.email=e", "-C", str(tmp_path / "checkout")],
    )
    shutil.copytree(REPOSITORY / "tsae", checkout / "tsae", ignore=shutil.ignore_patterns("__pycache__"))
    (checkout / ".env").write_text("A=1\n")
    for arguments in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "one"]):
        subprocess.run([*git, *arguments], check=True)
    (checkout / ".env").write_text(f"HF_TOKEN={IN_ENV_FILE}\n")
    with (checkout / "tsae/__init__.py").open("a") as file:
        file.write(f"\nTRIED = '{PLANTED['WANDB_API_KEY']}'\nKEPT = 'this change'\n")
    base = {
        "model": {"name": str(tiny_model), "layer": 1},
        "data": {"source": str(text), "context_length": 32, "min_length": 8, "holdout": 0.2},
        "sae": {"dict_size": 64, "k": 6, "split_fraction": 0.25},
        "training": {"steps": 10, "batch_size": 64, "trackers": ["tensorboard"], "pool_sequences": 64},
        "evaluation": {"sequences": 8, "loss_recovered": False},
    }
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(base))
    (tmp_path / "little.yaml").write_text(yaml.safe_dump({"base": "tiny.yaml", "grid": {"sae.k": [6]}}))
    home = tmp_path / "home"
    done = subprocess.run(
        [sys.executable, "-m", "tsae.cli", "sweep", str(tmp_path / "little.yaml"), "--executor=local"],
        env={**os.environ, **PLANTED, "TSAE_HOME": str(home), "PYTHONPATH": str(checkout)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert list(home.glob("checkpoints/little-tiny/*/trainer_0/ae.pt"))
    (differences,) = home.glob("sweeps/little-tiny/attempts/*/changes.diff")
    assert "KEPT = 'this change'" in differences.read_text()
    assert written_with(IN_ENV_FILE, home) == []
    copied = [path for path in written_with(PLANTED["WANDB_API_KEY"], home) if "/code/" not in path]
    assert copied == []  # the code itself runs as it is
    for name in PLANTED.keys() - {"WANDB_API_KEY"}:
        assert written_with(PLANTED[name], home) == [], name
    assert done.stdout + done.stderr == hide(done.stdout + done.stderr)


@pytest.mark.parametrize(
    "address",
    [
        "http://me:planted-word@localhost:8000/v1",
        "https://planted-word@host/v1",
        "https://host/v1?key=sk-planted-word-planted-word",
    ],
)
def test_an_address_with_a_key_is_refused_and_not_repeated(address: str, write_sweep, home: Path, capsys) -> None:
    path = write_sweep(grid={"sae.k": [4]}, stages=["harvest", "train", "explain"])
    asked = [f"experiments.explain.answers.{word}" for word in ("backend=endpoint", "model=m", f"base_url={address}")]
    assert main(["sweep", str(path), "--base=embedded", *asked]) == 2
    told = capsys.readouterr().err
    assert "base_url: " in told
    assert "key_variable" in told
    assert "planted-word" not in told
    assert not home.exists()


def test_a_sites_variables_hold_no_keys(write_sweep, tmp_path: Path, capsys) -> None:
    site = tmp_path / "cluster.yaml"
    site.write_text("environment: {NCCL_DEBUG: INFO, SITE_TOKEN: Planted}\n")
    path = write_sweep(grid={"sae.k": [4]}, stages=["harvest", "train"])
    assert main(["sweep", str(path), "--base=embedded", "--dry-run", "--executor=slurm", f"--cluster={site}"]) == 2
    told = capsys.readouterr().err
    assert "environment: " in told
    assert "no keys" in told
    assert "Planted" not in told
    site.write_text("environment: {NCCL_DEBUG: INFO, TOKENIZERS_PARALLELISM: 'false', MONKEY: '1', KEYS: '2'}\n")
    assert main(["sweep", str(path), "--base=embedded", "--dry-run", "--executor=slurm", f"--cluster={site}"]) == 0


def test_hidden_is_what_is_secret_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAB_API_KEY", "0123456789abcdef")
    monkeypatch.setenv("MY_TOKEN", "short")
    text = "curl http://me:word@host/v1 -H 0123456789abcdef hf_abcdefghijklmnopqrst short http://host/v1 sk-short"
    assert hide(text) == "curl http://***@host/v1 -H *** *** short http://host/v1 sk-short"
