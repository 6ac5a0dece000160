"""An attempt: one launch that started something, in a folder that is never used again.

attempts/<stamp>/
  sweep.yaml base.yaml points/      what was asked for
  provenance.json changes.diff      by whom, with which code
  code/                             the copy that the jobs import
  jobs.json                         which job works on which stage
  rest.json                         what its scheduler took no more of, and which job submits it
  submitting                        there until a scheduler has all of its jobs; says which one
  <n>-<kind>/                       batch script and logs of an array
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import tsae
from tsae.runtime import files, metadata
from tsae.runtime.errors import TsaeError
from tsae.runtime.secrets import hide
from tsae.sweep import schedulers
from tsae.sweep.stage import config_file

PACKAGE = Path(tsae.__file__).parent
_LEFT_OUT = shutil.ignore_patterns("__pycache__", "*.pyc", ".*")
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
class Rest:
    """What a launch meant to submit and found no room for."""

    stages: tuple[str, ...]
    """Their keys."""
    points: tuple[str, ...]
    """Names of the points that need them."""
    limit: str
    """Why not, in the scheduler's words."""
    job: str | None
    """The job that submits them once this launch's jobs have ended; None if there was no room for it either."""


JOB = {
    **dict.fromkeys(("stage", "label", "job", "executor", "log", "attempt"), str),
    **{"cluster": (None, str), "submitted": float},
}
JOBS = {metadata.ENTRIES: [JOB]}
REST = {"stages": [str], "points": [str], "limit": str, "job": (None, str)}


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
        files.discard_drafts(parent)
        made = files.draft_of(parent / "attempt")
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
        if not path.exists():
            return []
        name = job_name(self.folder.parents[1])
        ways = " and ".join(f"`{known.ending(name)}` ends those on {known.title}" for known in schedulers.everyone())
        remedy = f"so nobody knows which job does what; {ways}, then remove the file"
        found = metadata.read(path, JOBS, remedy)
        return [Submitted(**{key: entry[key] for key in JOB}) for entry in found[metadata.ENTRIES]]

    def add_jobs(self, submitted: Iterable[Submitted]) -> None:
        """Remember what was submitted."""
        metadata.write(
            self.folder / "jobs.json", {metadata.ENTRIES: [asdict(entry) for entry in (*self.jobs(), *submitted)]}
        )

    def leave(self, rest: Rest) -> None:
        """Remember what was not submitted."""
        metadata.write(self.folder / "rest.json", asdict(rest))

    def rest(self) -> Rest | None:
        """What was not submitted; None if all was, or what is said of it cannot be read."""
        found = metadata.whole(self.folder / "rest.json", REST)
        return Rest(tuple(found["stages"]), tuple(found["points"]), found["limit"], found["job"]) if found else None

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


def copy_code(folder: Path) -> None:
    """Copy the package into `folder`: an edit of the checkout never reaches a job that waits."""
    try:
        shutil.copytree(PACKAGE, folder / PACKAGE.name, ignore=_LEFT_OUT)
    except shutil.Error as error:
        # It lists every file; one is enough to know that the disk is full.
        _, target, reason = error.args[0][0]
        raise TsaeError(f"{target}: the code cannot be copied: {reason.partition(': ')[0]}") from None


def shell_path(in_image: bool = False) -> list[str]:
    """What the launching shell's PYTHONPATH names, as absolute paths; for an image only folders, which can be bound."""
    named = [os.path.abspath(entry) for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    return [entry for entry in named if os.path.isdir(entry)] if in_image else named


def python_path(code: Path, *more: str | None) -> str:
    """PYTHONPATH of jobs that run the copy in `code`: it comes first, or what is installed would stand in for it."""
    return os.pathsep.join([str(code), *(entry for entry in more if entry)])


def write_provenance(folder: Path, image: str | None = None) -> None:
    """Write provenance.json, and changes.diff for a checkout with changes, into `folder`; `image` is the container's."""
    record: dict[str, Any] = {
        "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": [*map(hide, sys.argv)],
        "working_directory": os.getcwd(),
        "user": os.environ.get("USER", str(os.getuid())),
        "host": platform.node(),
        "python": platform.python_version(),
        "packages": dict(sorted((found.name, found.version) for found in distributions())),
        "container": None if image is None else {"image": image, "sha256": _digest(image)},
    }
    earlier = PACKAGE.parent.with_name("provenance.json")
    if PACKAGE.parent.name == "code" and earlier.exists():  # a job of an earlier launch makes this one, with its code
        known = metadata.whole(earlier)
        record |= {name: known[name] for name in ("command", "commit", "untracked", "changes") if name in known}
        if record.get("changes"):
            shutil.copy(earlier.with_name(record["changes"]), folder)
    elif (PACKAGE.parent / ".git").exists():  # an installed wheel has no commit; its version is among the packages
        record["commit"] = _git("rev-parse", "HEAD").strip()
        record["untracked"] = _git("ls-files", "--others", "--exclude-standard").splitlines()
        changes = hide(_git("diff", "HEAD", "--", ".", ":(exclude,glob)**/*.env", ":(exclude,glob)**/.env*"))
        record["changes"] = "changes.diff" if changes else None
        if changes:
            files.write_text(folder / "changes.diff", changes)
    metadata.write(folder / "provenance.json", record)


def _fresh(parent: Path) -> Path:
    """A path that no attempt has had: stamps are in order even when made within one second."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    taken = len(list(parent.glob(f"{stamp}*")))
    return parent / (f"{stamp}-{taken + 1:02}" if taken else stamp)


def _git(*arguments: str) -> str:
    """What git says; its complaint where it refuses, as it does in a checkout of another user, or is not there."""
    try:
        answer = subprocess.run(["git", *arguments], cwd=PACKAGE.parent, capture_output=True, check=False)
    except FileNotFoundError:
        return "git: not found"
    # A changed file may hold any bytes.
    return (answer.stderr if answer.returncode else answer.stdout).decode(errors="replace")


def _digest(image: str) -> str | None:
    """SHA-256 of an image that is a file, or of one that Docker has; None of a folder, and of one yet to be fetched."""
    if Path(image).is_file():
        with open(image, "rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    try:
        inspect = ["docker", "image", "inspect", "--format={{.Id}}", image]
        answer = subprocess.run(inspect, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return answer.stdout.strip().removeprefix("sha256:") or None
