"""A training that is killed with SIGKILL at random moments ends with the bytes of one that was left alone.

`TSAE_KILLS=200 pytest tests/system/test_kills.py` is the longer mode.
"""

from __future__ import annotations

import os
import random
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from tests.system.dying import MOMENTS, train_and_die
from tsae.checkpoint import RunFolder
from tsae.config.run import RunConfig
from tsae.training.run import train

KILLS = int(os.environ.get("TSAE_KILLS", "20"))
MOST = {"after a time": 60, "in a step": 45, "in a write": 7, "before a sync": 60, "before a rename": 25}


def contents(run: RunFolder) -> dict[str, bytes]:
    """Bytes of every file of a run but those that hold a clock."""
    clocked = (run.provenance, run.progress)
    files = [path for path in run.path.rglob("*") if path.is_file() and path not in clocked]
    return {str(path.relative_to(run.path)): path.read_bytes() for path in files}


def test_kills_at_random_moments_leave_no_trace(
    config: RunConfig, tmp_path: Path, run_process: Callable[..., int]
) -> None:
    undisturbed = RunFolder.of(tmp_path, "undisturbed")
    train(config, undisturbed)
    wanted = contents(undisturbed)
    assert len(wanted) == 6
    random_moments, kills, finished = random.Random(KILLS), Counter[str](), 0
    while sum(kills.values()) < KILLS:
        run = RunFolder.of(tmp_path, f"killed{finished}")
        moment = MOMENTS[sum(kills.values()) % len(MOMENTS)]
        code = run_process(train_and_die, config, run, moment, random_moments.randint(1, MOST.get(moment, 25)))
        assert code in (0, -signal.SIGKILL)
        kills[moment] += code != 0
        if code == 0:
            assert contents(run) == wanted
            finished += 1
    last = RunFolder.of(tmp_path, f"killed{finished}")
    train(config, last)
    assert contents(last) == wanted
    assert set(kills) == set(MOMENTS)


def test_a_kill_right_after_the_final_weights_leaves_no_resumable_states(
    config: RunConfig, tmp_path: Path, run_process: Callable[..., int]
) -> None:
    run = RunFolder.of(tmp_path, "run")
    at = (config, run, "before the states are removed", 1)
    assert run_process(train_and_die, *at) == -signal.SIGKILL
    assert run.is_trained(config)
    assert run.resume.exists()
    train(config, run)
    assert not run.resume.exists()
