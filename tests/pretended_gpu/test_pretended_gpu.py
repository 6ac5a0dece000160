"""What a GPU would refuse, or get wrong for want of a wait, without one. Each list in a process of its own: what is kept there
from one test to the next has its place there alone, and Triton decides at import whether it interprets.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

HERE = Path(__file__).parent


@pytest.mark.parametrize(
    ("tests", "interpret"),
    [
        ([HERE / "cases_of_steps.py"], "1"),
        ([HERE / "cases_of_runs.py"], "0"),
        (["-m", "gpu", HERE.parent / "store" / "test_filling.py"], "0"),
    ],
)
def test_on_a_gpu_that_is_not_there(tests: list[str | Path], interpret: str) -> None:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "tests.pretended_gpu.plugin"]
    environment = {**os.environ, "TRITON_INTERPRET": interpret}
    root = HERE.parents[1]
    done = subprocess.run([*command, *map(str, tests)], env=environment, capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "skipped" not in done.stdout
