"""Triton's kernels, without a GPU: they run in the interpreter, and they compile for GPUs that are not here.

Triton decides at import whether it interprets, so either happens in a process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

CASES = ["kernel_cases.py", "screen_cases.py"]
COMPILE = Path(__file__).parent / "kernel_compilation.py"


def run(arguments: list[str], **environment: str) -> str:
    own = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, *arguments], env={**own, **environment}, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


@pytest.mark.parametrize("cases", CASES)
def test_interpreted_kernels_equal_dense_products(cases: str) -> None:
    output = run(["-m", "pytest", "-p", "no:cacheprovider", str(Path(__file__).parent / cases)], TRITON_INTERPRET="1")
    assert "passed" in output
    assert "skipped" not in output


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("cases", CASES)
def test_compiled_kernels_equal_dense_products(cases: str) -> None:
    run(["-m", "pytest", "-p", "no:cacheprovider", str(Path(__file__).parent / cases)])


def test_kernels_compile_for_ampere_hopper_and_blackwell_without_spilled_registers(tmp_path: Path) -> None:
    run([str(COMPILE), "80", "90", "120"], TRITON_CACHE_DIR=str(tmp_path))
