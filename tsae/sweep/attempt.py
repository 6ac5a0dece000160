"""An attempt: one launch that started something, in a folder that is never used again.

attempts/<stamp>/
  sweep.yaml base.yaml points/      what was asked for
  provenance.json changes.diff      by whom, with which code
  code/                             the copy that the jobs import
  jobs.json                         which job works on which stage
  submitting                        there until a scheduler has all of its jobs; says which one
  <n>-<kind>/                       batch script and logs of an array
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from tsae.runtime import files
from tsae.runtime.errors import TsaeError
from tsae.sweep import schedulers
from tsae.sweep.snapshot import copy_code, write_provenance
from tsae.sweep.stage import config_file

KINDS_LIMIT = 40
"""Characters of a sweep's name that its jobs bear; a hash behind them tells sweeps apart."""


@dataclass(frozen=True, kw_only=True)
class Submitted:
    """A stage that was given to an executor."""

    stage: str
    """Key of the stage."""
    label: str
    """For people: `train split_fraction=0.2`."""
    job: str
    """A scheduler's id such as `123_4`, or a process id."""
    cluster: str | None
    """The scheduler's name of the cluster: ids of another one mean other jobs."""
    submitted: float
    """Seconds since the epoch: an older job with this id is another one."""
    executor: str
    """A scheduler's name, or local."""
    log: str
    """File that holds the output of its first process."""
    attempt: str
    """Stamp of the attempt."""

    @property
    def exit_code(self) -> Path:
        """File in which the batch script may leave the exit code of a job that failed by itself."""
        return Path(self.log).with_name(f"{self.job}_exit_code")


@dataclass(frozen=True)
class Attempt:
    """One attempt's folder."""

    folder: Path

    @classmethod
    def begin(
        cls, sweep_folder: Path, sources: Mapping[str, str], points: Mapping[str, str], image: str | None = None
    ) -> Attempt:
        """A new attempt with the sweep's files and the points' YAML by name; whole, or not there at all.

        `image` is the container that jobs run in, recorded with its digest.
        """
        parent = sweep_folder / "attempts"
        parent.mkdir(parents=True, exist_ok=True)
        made = parent / f".{os.getpid()}.tmp"
        try:
            (made / "points").mkdir(parents=True)
            for name, text in sources.items():
                files.write_text(made / name, text)
            for name, text in points.items():
                config_file(made / "points", name).write_text(text, encoding="utf-8")
            write_provenance(made, image)
            copy_code(made / "code")
            folder = _fresh(parent)
            made.rename(folder)
        finally:
            shutil.rmtree(made, ignore_errors=True)
        return cls(folder)

    @property
    def stamp(self) -> str:
        """Names it among the attempts of its sweep; later ones sort behind."""
        return self.folder.name

    @property
    def code(self) -> Path:
        """The copy of the code that its jobs import."""
        return self.folder / "code"

    @property
    def points(self) -> Path:
        """The resolved configurations as its jobs read them."""
        return self.folder / "points"

    @property
    def submitting(self) -> Path:
        """A file that names the scheduler that gets the jobs; if the launcher dies then, some are held and others missing."""
        return self.folder / "submitting"

    def jobs(self) -> list[Submitted]:
        """What it has submitted so far."""
        path = self.folder / "jobs.json"
        try:
            return [Submitted(**entry) for entry in json.loads(path.read_bytes())]
        except FileNotFoundError:
            return []
        except (ValueError, TypeError):
            name = job_name(self.folder.parents[1])
            ways = " and ".join(
                f"`{known.ending(name)}` ends those on {known.title}" for known in schedulers.everyone()
            )
            raise TsaeError(
                f"{path}: damaged, so nobody knows which job does what; {ways}, then remove the file"
            ) from None

    def add_jobs(self, submitted: Iterable[Submitted]) -> None:
        """Remember what was submitted."""
        files.write_json(self.folder / "jobs.json", [asdict(entry) for entry in (*self.jobs(), *submitted)])

    def remove(self) -> None:
        """Take it away again; for one that could submit nothing."""
        shutil.rmtree(self.folder)


def attempts(sweep_folder: Path) -> list[Attempt]:
    """All attempts of a sweep, oldest first."""
    return [Attempt(path) for path in sorted((sweep_folder / "attempts").glob("[0-9]*"))]


def newest_jobs(sweep_folder: Path) -> dict[str, Submitted]:
    """Stage key → the job that was submitted for it last."""
    return {entry.stage: entry for attempt in attempts(sweep_folder) for entry in attempt.jobs()}


def job_name(sweep_folder: Path) -> str:
    """The name that all jobs of a sweep bear and no others: one query finds them, whoever submitted them and when."""
    text = str(sweep_folder.absolute())
    readable = re.sub(r"[^\w.=+-]+", "-", sweep_folder.name)[:KINDS_LIMIT]
    return f"tsae.{readable}.{hashlib.sha256(text.encode()).hexdigest()[:10]}"


def _fresh(parent: Path) -> Path:
    """A path that no attempt has had: stamps are in order even when made within one second."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    taken = len(list(parent.glob(f"{stamp}*")))
    return parent / (f"{stamp}-{taken + 1:02}" if taken else stamp)
