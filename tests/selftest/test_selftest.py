"""`tsae selftest`: a line for each check, and an exit code that a script can trust."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

from tsae import selftest
from tsae.cli import main
from tsae.runtime.errors import TsaeError

REPOSITORY = Path(__file__).parents[2]
LOADED = "import sys; from tsae import selftest; selftest.imports(); print(*{name.partition('.')[0] for name in sys.modules})"


def test_sound_installation_passes_every_check(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TSAE_HOME", str(tmp_path / "new"))
    assert main(["selftest"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines[:-1]] == [f"ok      {name}" for name in selftest.CHECKS]
    assert [path.name for path in (tmp_path / "new").iterdir() if path.name != "contents"] == []


def test_imports_load_every_dependency():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    names = {re.split(r"[^\w-]", requirement, maxsplit=1)[0] for requirement in project["dependencies"]}
    answer = subprocess.run([sys.executable, "-c", LOADED], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    distributions = metadata.packages_distributions()
    loaded = {name.lower() for module in answer.stdout.split() for name in distributions.get(module, ())}
    assert {name.lower() for name in names} - {name.replace("_", "-") for name in loaded} - loaded == set()


def test_dependency_that_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(TsaeError, match="submitit cannot be loaded"):
        selftest.imports()


def test_failed_check_is_told_and_the_others_are_still_made(monkeypatch, capsys):
    def broken() -> str:
        raise ImportError("no\nsuch thing")

    monkeypatch.setattr(selftest, "CHECKS", {"first": broken, "second": lambda: "fine"})
    assert main(["selftest"]) == 2
    first, second, last = capsys.readouterr().out.splitlines()
    assert first.startswith("FAILED  first:          ImportError: no such thing")
    assert second.startswith("ok      second:         fine")
    assert last == "1 of 2 checks failed"


def test_version_that_is_not_the_pinned_one_is_named(tmp_path, monkeypatch):
    pins = tmp_path / "constraints.txt"
    pins.write_text("# tested\ntorch==0.1\nno-such-package==1.0\n")
    monkeypatch.setattr(selftest, "_constraints", lambda: pins)
    with pytest.raises(TsaeError, match=r"^torch 2\S+ instead of 0\.1; `pip install -c constraints\.txt`"):
        selftest.versions()


def test_home_that_cannot_be_written_is_refused(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("TSAE_HOME", str(tmp_path / "file"))
    with pytest.raises(TsaeError, match=r"cannot write there"):
        selftest.writable_home()


def test_gpu_that_the_container_hides_is_a_failure(tmp_path, monkeypatch):
    monkeypatch.setattr(selftest, "GPU_DEVICE", tmp_path)
    monkeypatch.setattr("torch.version.cuda", "13.0")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with pytest.raises(TsaeError, match=r"--nv \(Apptainer\) or --gpus all"):
        selftest.gpus()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert selftest.gpus() == "none visible; the CPU is used"


def test_too_little_shared_memory_is_a_failure(monkeypatch):
    monkeypatch.setattr(selftest, "MINIMUM_SHARED_MEMORY", 10**9)
    with pytest.raises(TsaeError, match=r"--shm-size=1g"):
        selftest.shared_memory()
    monkeypatch.setattr(selftest, "SHARED_MEMORY", Path("/no/such/folder"))
    with pytest.raises(TsaeError, match="is missing"):
        selftest.shared_memory()
    monkeypatch.setattr(selftest, "MINIMUM_SHARED_MEMORY", 0)
    monkeypatch.setattr(selftest, "SHARED_MEMORY", Path("/proc"))
    with pytest.raises(TsaeError, match="cannot write there"):
        selftest.shared_memory()


def test_processes_add_up_over_a_backend():
    selftest.add_up("gloo", 2)
