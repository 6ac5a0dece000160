"""The wheel alone is enough: installed into a fresh environment, used in an empty folder, without the checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
# One process trains all four points: the wheel is looked at, and each process takes seconds for its imports.
TINY = (
    *("training.steps=40", "training.pack=4", "data.max_tokens=20000", "sae.dict_size=128"),
    *("evaluation.sequences=16", "evaluation.loss_sequences=4"),
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout; built from a copy, since setuptools writes beside what it reads."""
    source, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE", "constraints.txt"):
        shutil.copy(REPOSITORY / name, source)
    for name in ("tsae", "sweeps"):
        shutil.copytree(REPOSITORY / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        f"--wheel-dir={built}",
    ]
    subprocess.run([*build, str(source)], check=True)
    [found] = built.glob("tsae-*.whl")
    return found


@pytest.fixture(scope="module")
def program(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tsae` in a new virtual environment, in which this one's packages lie behind the wheel's."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    packages = Path(sysconfig.get_path("purelib", "venv", {"base": str(folder), "platbase": str(folder)}))
    # Only the path is taken: what else this environment's .pth files do, an editable tsae among it, stays outside.
    (packages / "shared.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")) + "\n")
    install = [sys.executable, "-m", "pip", f"--python={folder / 'bin/python'}", "install", "--quiet", "--no-deps"]
    subprocess.run([*install, "--force-reinstall", str(wheel)], check=True)
    return folder / "bin/tsae"


def run(program: Path, folder: Path, *words: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "TSAE_HOME")}
    done = subprocess.run([program, *words], cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_wheel_holds_sweeps_model_templates_and_pins(wheel: Path) -> None:
    inside = zipfile.ZipFile(wheel).namelist()
    package = {str(path.relative_to(REPOSITORY)) for path in (REPOSITORY / "tsae").rglob("*.py")}
    data = {f"tsae/{path.relative_to(REPOSITORY)}" for path in (REPOSITORY / "sweeps").rglob("*.yaml")}
    data |= {
        str(path.relative_to(REPOSITORY))
        for path in (REPOSITORY / "tsae").rglob("*")
        if path.suffix in (".html", ".css")
    }
    assert (package | data) - set(inside) == set()
    assert "tsae/lm/embedded/model.safetensors" in inside
    assert any(name.endswith("share/tsae/constraints.txt") for name in inside)
    assert not [name for name in inside if name.startswith(("tests/", "launch/", "sweeps/"))]


def test_the_quickstart_runs_in_an_empty_folder(program: Path, tmp_path: Path) -> None:
    said = run(program, tmp_path, "sweep", "split_fraction", *TINY)
    assert "split_fraction=0.5,seed=0" in said
    [page] = tmp_path.glob("runs/sweeps/*/report/report.html")
    assert f"report: {page}" in said
    [folder] = tmp_path.glob("runs/sweeps/*")
    assert "10 of 10 stages done" in run(program, tmp_path, "status", str(folder))
    assert "evaluated" in run(program, tmp_path, "runs")
    code = next((folder / "attempts").glob("*/code"))
    assert [path.name for path in code.iterdir()] == ["tsae"]
    assert {path.name for path in tmp_path.iterdir()} == {"runs"}


def test_it_tells_its_version(program: Path, wheel: Path, tmp_path: Path) -> None:
    assert run(program, tmp_path, "--version") == f"tsae {wheel.name.split('-')[1]}\n"
