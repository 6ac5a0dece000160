"""A sweep on the lab's Slurm whose stages do what a test wants, and what becomes of them."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from tsae.runtime.metadata import whole as read_whole_json
from tsae.runtime.state import state_path
from tsae.sweep.attempt import Attempt, Submitted, job_name
from tsae.sweep.cluster import Cluster
from tsae.sweep.resources import StageResources
from tsae.sweep.schedulers.slurm.query import run
from tsae.sweep.schedulers.slurm.scheduler import Slurm
from tsae.sweep.schedulers.submission import Submission
from tsae.sweep.stage import Stage

HERE = Path(__file__).parent
LAUNCH = HERE.parents[2] / "launch"
PATIENCE = 150.0


def tiny_run(store: Path, **training: Any) -> dict[str, Any]:
    """The configuration of a run on a small synthetic world: no language model is read."""
    return {
        "data": {"source": "synthetic", "context_length": 32, "holdout": 0.1, "skip_positions": 0},
        "synthetic": {"sequences": 900, "activation_dim": 16, "n_slow": 6, "k_slow": 1, "n_fast": 10, "k_fast": 2},
        "store": {"path": str(store), "dtype": "float32"},
        "sae": {"dict_size": 20, "k": 3, "split_fraction": 0.3},
        "training": {"steps": 60, "batch_size": 128, "threshold_beta": 0.9, "device": "cpu", **training},
        "evaluation": {"sequences": 64},
    }


class SweepOnSlurm:
    """A sweep's folder, the stages put into it, and what becomes of them."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.folder = home / "sweeps" / "tiny,k=3"
        self.folder.mkdir(parents=True, exist_ok=True)

    def stage(
        self,
        name: str,
        function: str,
        *arguments: Any,
        kind: str = "train",
        after: tuple[str, ...] = (),
        config: str | None = None,
        after_failures: bool = False,
        **resources: Any,
    ) -> Stage:
        """A stage of `kind` that calls `function` (module:name) with the configurations' folder and `arguments`."""
        return Stage(
            kind=kind,
            key=name,
            subject=name,
            function=function,
            config=config,
            arguments=arguments,
            points=(name,),
            depends_on=after,
            record=self.folder / "stages" / name,
            progress=self.home / "progress",
            lock=self.home / "lock",
            resources=StageResources(**{"time": "10m", "mem": "200M", **resources}),
            on_gpu=False,
            is_done=lambda: False,
            after_failures=after_failures,
        )

    def submission(self, configs: dict[str, Any] | None = None, environment: Any = None, **settings: Any) -> Submission:
        """A fresh attempt whose jobs find the errands; `settings` are the cluster's."""
        points = {name: yaml.safe_dump(tree) for name, tree in (configs or {}).items()}
        attempt = Attempt.begin(self.folder, {"sweep.yaml": "name: tiny"}, points)
        cluster = Cluster(environment={"PYTHONPATH": str(HERE.parents[2]), **(environment or {})}, **settings)
        return Submission(scheduler=Slurm(), sweep_folder=self.folder, attempt=attempt, cluster=cluster)

    def submit(self, *stages: Stage, **settings: Any) -> dict[str, Submitted]:
        """Stage key → what was submitted for it."""
        return {entry.stage: entry for entry in self.submission(**settings).submit(stages)}

    def queue(self) -> dict[str, tuple[str, str]]:
        """Job id → state and reason, in Slurm's words, for all jobs of this sweep."""
        said = run("squeue", "--noheader", "--array", "--states=all", f"--name={job_name(self.folder)}", "-o%i|%T|%r")
        return {job: (state, reason) for job, state, reason in (line.split("|") for line in said.splitlines())}

    def state(self, name: str) -> dict[str, Any]:
        """The record of a stage; empty before there is one."""
        return read_whole_json(state_path(self.folder / "stages" / name))

    def alive(self) -> list[str]:
        """Jobs that run or will."""
        return [job for job, seen in Slurm().queued(job_name(self.folder)).items() if seen.alive]

    def wait(self, condition: Callable[[], object], seconds: float = PATIENCE) -> None:
        """Return when `condition` holds, which must be before the last job has ended."""
        until = time.monotonic() + seconds
        while not condition():
            in_vain = time.monotonic() > until or (not self.alive() and not condition())
            assert not in_vain, f"{self.queue()}{self._logs()}"
            time.sleep(0.2)

    def wait_until_over(self, seconds: float = PATIENCE) -> None:
        """Return when no job of this sweep is alive."""
        self.wait(lambda: not self.alive(), seconds)

    def _logs(self) -> str:
        logs = sorted(self.folder.glob("attempts/*/*/*.out"))
        return "".join(f"\n== {path.name}\n{path.read_text()[-2000:]}" for path in logs)
