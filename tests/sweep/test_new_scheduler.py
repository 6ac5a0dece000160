"""What a new scheduler costs: a class with what `Scheduler` lists, and a line in `SCHEDULERS`.

This one has no queue: it runs each job of an array at once, as a process. Jobs of it are real, and so are their records.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterable
from pathlib import Path

import pytest
import yaml

from tests.system.slurm.slurm_sweep import tiny_run
from tsae.cli import main
from tsae.sweep import schedulers
from tsae.sweep.schedulers.base import Limits, Order, Seen

held: list[Order] = []
"""Arrays that wait for their release, and those behind them."""


class AtOnce:
    """A scheduler that everyone has."""

    name = "at_once"
    title = "At once"
    command = "python"
    silence = "it always answers"

    def answers(self) -> bool:
        return True

    def limits(self) -> Limits:
        return Limits("here", max_array=10)

    def submit(self, order: Order) -> list[str]:
        held.append(order)
        return [f"{len(held)}_{index}" for index in range(len(order.calls))]

    def script(self, order: Order) -> str:
        return f"{order.comment}: {len(order.calls)} jobs after {order.inputs.jobs or order.inputs.one_by_one or 'nothing'}"

    def log(self, order: Order, job: str) -> Path:
        return order.folder / f"{job}.log"

    def queued(self, job_name: str) -> dict[str, Seen]:
        del job_name
        return {}

    def accounted(self, job_name: str, since: float) -> dict[str, Seen]:
        del job_name, since
        return {}

    def cancel(self, jobs: Iterable[str]) -> None:
        assert not list(jobs)  # none lives

    def release(self, jobs: Iterable[str]) -> None:
        """The first jobs may start, and with them all that was submitted behind them."""
        assert list(jobs) == ["1"]
        for number, order in enumerate(held, 1):
            for index, call in enumerate(order.calls):
                path = order.folder / f"call-{index}.json"
                call.save(path)
                with self.log(order, f"{number}_{index}").open("w") as log:
                    command = [*order.python, "-m", "tsae.runtime.job", str(path)]
                    subprocess.run(command, stdout=log, stderr=log, check=False)

    def ending(self, job_name: str) -> str:
        return f"nothing to end of {job_name}"

    def adopt_place(self) -> None:
        """It starts single processes."""


@pytest.fixture
def sweep(tmp_path, home, monkeypatch):
    """The YAML of a sweep over two tiny runs, on a machine that has the scheduler."""
    del home
    held.clear()
    monkeypatch.setitem(schedulers.SCHEDULERS, "at_once", f"{__name__}:AtOnce")
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(tiny_run(tmp_path / "store")))
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump({"base": "base.yaml", "grid": {"sae.split_fraction": [0.2, 0.4]}}))
    return str(path)


def test_a_new_scheduler_is_a_class_and_a_line(sweep, home, capsys):
    assert main(["sweep", sweep, "--executor", "at_once", "--dry-run"]) == 0
    planned = capsys.readouterr().out
    assert "----- python" in planned
    assert "train of tiny-base: 2 jobs after ('<00-harvest>',)" in planned

    assert main(["sweep", sweep, "--executor", "at_once"]) == 0
    assert "6 stages were submitted" in capsys.readouterr().err
    assert [(order.kind, len(order.calls)) for order in held] == [
        ("harvest", 1),
        ("train", 2),
        ("evaluate", 2),
        ("report", 1),
    ]
    assert main(["status", sweep]) == 0
    assert "6 of 6 stages done" in capsys.readouterr().out
    records = [json.loads(path.read_text()) for path in home.glob("sweeps/*/stages/*/state.json")]
    assert {(record["state"], record["executor"]) for record in records} == {("done", "at_once")}
    assert main(["sweep", sweep, "--executor", "at_once"]) == 0
    assert "nothing to do" in capsys.readouterr().err


def test_an_executor_that_nobody_registered_is_refused(sweep, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["sweep", sweep, "--executor", "at_onec"])
    assert ended.value.code == 2
    assert "did you mean 'at_once'?" in capsys.readouterr().err
