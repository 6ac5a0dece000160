"""What is told where Slurm keeps no accounts; the last tests, because Slurm forgets all jobs here."""

from __future__ import annotations

import json
import os
import signal
from typing import Any

from tests.system.slurm.slurm_commands import CommandLine
from tests.system.slurm.slurm_sweep import SweepOnSlurm
from tsae.sweep.attempt import attempts
from tsae.sweep.schedulers.slurm.query import run as slurm_command


def test_a_job_that_dies_without_a_word_is_failed_without_accounting_and_when_ids_are_used_again(
    sweep: SweepOnSlurm, tiny: CommandLine, slurm: Any
) -> None:
    """The controller's word is all there is; later it has forgotten the jobs, and others have their ids."""
    slurm("accounting", "off")
    tiny.sweep()
    record = next(iter(attempts(sweep.folder))).jobs()[0]
    sweep.wait(lambda: any(tiny.home.rglob("state.json")))
    (state,) = tiny.home.rglob("state.json")
    os.kill(json.loads(state.read_text())["pid"], signal.SIGKILL)
    sweep.wait_until_over()
    shown = tiny.status()
    assert tiny.counts()["harvest"] == {"done": "0/1", "failed": "1"}, shown
    assert tiny.counts()["train"] == {"done": "0/2", "blocked": "2"}, shown
    assert record.log.removeprefix(f"{sweep.folder}/") in shown

    said = tiny.sweep(code=1)
    assert "--retry-failed" in said
    assert len(attempts(sweep.folder)) == 1
    slurm("accounting", "on")
    for _ in range(8):
        slurm_command("sbatch", "--job-name=another", "--output=/dev/null", "--wrap=sleep 20")
    assert {key: set(found) for key, found in tiny.counts().items() if key in ("harvest", "train")} == {
        "harvest": {"done", "failed"},
        "train": {"done", "blocked"},
    }
    slurm_command("scancel", "--name=another")
    tiny.sweep("--retry-failed")
    assert tiny.counts()["harvest"].keys() & {"queued", "running"}
    tiny.sweep("--cancel")
