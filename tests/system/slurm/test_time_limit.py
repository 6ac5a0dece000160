"""Jobs that need more time than they have: they go on in another turn, but not for ever."""

from __future__ import annotations

import json

from tests.system.slurm.slurm_sweep import SweepOnSlurm


def test_a_job_whose_time_is_over_goes_on_in_another_turn(long_before: SweepOnSlurm) -> None:
    sweep = long_before
    sweep.wait(lambda: sweep.state("after").get("state") == "done")
    assert sweep.state("in time")["state"] == "done"
    assert sweep.state("in time")["restarts"] >= 1
    assert json.loads((sweep.home / "counter").read_text())["counted"] == 450


def test_a_job_that_is_never_done_fails_after_as_many_turns_as_the_cluster_allows(long_before: SweepOnSlurm) -> None:
    sweep = long_before
    sweep.wait(lambda: sweep.state("never").get("state") == "failed")
    assert sweep.state("never")["error"].startswith("was preempted or out of time 1 times, more than max_restarts: 0")
    sweep.wait_until_over()
    assert json.loads((sweep.home / "other").read_text())["counted"] > 50
