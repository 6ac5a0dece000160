"""How busy a machine is while a sweep runs on it from nothing: cores and GPUs over time, beside what its stages did when.

The sweep is `tsae sweep … --executor local`, in a TSAE_HOME of its own by which its processes are told from others. Samples
are cores (processor seconds of those processes per second) and, where nvidia-smi is found, the shares of time in which GPUs
computed, as that tells them; those are of whole GPUs, whoever uses them.
"""

from __future__ import annotations

import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tsae.runtime.errors import TsaeError
from tsae.runtime.state import Record

EVERY = 0.25
"""Seconds between samples."""
LEAVE_SECONDS = 30.0
"""For a sweep that is interrupted to end its stages."""
TICKS = os.sysconf("SC_CLK_TCK")


def measure(arguments: Sequence[str], folder: Path) -> dict[str, Any]:
    """Run the sweep that `tsae sweep` is given by `arguments`, in `folder` for a while; what was busy, and its stages.

    Raises TsaeError where the sweep fails, and on a system without /proc.
    """
    if not Path("/proc/self/environ").exists():
        raise TsaeError("--sweep: what is busy is read from /proc, which only Linux has")
    with tempfile.TemporaryDirectory(prefix="sweep-", dir=folder, ignore_cleanup_errors=True) as made:
        home, samples, metrics = Path(made), list[dict[str, Any]](), dict[Path, float]()
        with _gpus() as (gpus, names):
            seen, began = dict[str, float](), time.time()
            last = began
            process = subprocess.Popen(
                [sys.executable, "-m", "tsae.cli", "sweep", *arguments, "--executor", "local"],
                env={**os.environ, "TSAE_HOME": str(home)},
            )
            try:
                while process.poll() is None:
                    time.sleep(EVERY)
                    spent, now = _processor_seconds(home, seen), time.time()
                    samples.append({"at": now - began, "cores": spent / (now - last), "gpus": dict(gpus)})
                    last = now
                    for path in home.glob("checkpoints/*/*/*/metrics.jsonl"):  # which begins with the first step
                        metrics.setdefault(path, now - began)
            finally:
                # Where Ctrl-C came here it came there, too, and a second word would keep it from ending its stages.
                with suppress(subprocess.TimeoutExpired):
                    process.wait(LEAVE_SECONDS)
                process.terminate()
                process.wait()
        if process.returncode:
            raise TsaeError(f"--sweep: `tsae sweep {' '.join(arguments)}` failed; what it said stands above")
        told = [record for place in home.glob("sweeps/*/stages/*") if (record := Record.of(place)) is not None]
        first_steps = {path.parent.parent.name: at for path, at in metrics.items()}
        stages = [_stage(record, samples, began, first_steps) for record in told if record.started and record.ended]
    if not stages:
        raise TsaeError(f"--sweep: `tsae sweep {' '.join(arguments)}` had nothing to run")
    stages.sort(key=lambda stage: stage["start"])
    return {
        "sweep": list(arguments),
        "seconds": samples[-1]["at"],
        "gpus": dict(sorted(names.items())),
        "samples": samples,
        "stages": stages,
    }


def _processor_seconds(home: Path, seen: dict[str, float]) -> float:
    """Of all processes whose TSAE_HOME is `home`, since the last call; `seen` keeps what each had then."""
    mark, spent = f"TSAE_HOME={home}".encode(), 0.0
    for entry in os.scandir("/proc"):
        if not entry.name.isdigit():
            continue
        try:
            # Whose environment it is does not change, but for a moment after it was started.
            if entry.name not in seen and mark not in Path(entry.path, "environ").read_bytes().split(b"\0"):
                continue
            fields = Path(entry.path, "stat").read_text().rpartition(")")[2].split()
        except OSError:  # it has ended, or is another user's
            continue
        now = (int(fields[11]) + int(fields[12])) / TICKS
        spent += now - seen.get(entry.name, 0.0)
        seen[entry.name] = now
    return spent


@contextmanager
def _gpus() -> Iterator[tuple[dict[str, float], dict[str, str]]]:
    """Share of time that each GPU computed lately, kept up to date while the block runs, and its name; empty without
    nvidia-smi."""
    shares, names = dict[str, float](), dict[str, str]()
    found = shutil.which("nvidia-smi")
    if found is None:
        yield shares, names
        return
    asked = [
        "--query-gpu=index,utilization.gpu,name",
        "--format=csv,noheader,nounits",
        "-lms",
        str(round(1000 * EVERY)),
    ]
    process = subprocess.Popen([found, *asked], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)

    def follow() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            index, percent, name = (part.strip() for part in f"{line},,".split(",")[:3])
            if percent.isdigit():  # else it says that there is no GPU, or cannot tell
                shares[index], names[index] = int(percent) / 100, name

    reader = threading.Thread(target=follow)
    reader.start()
    try:
        yield shares, names
    finally:
        process.kill()
        process.wait()
        reader.join()


def _stage(
    record: Record, samples: list[dict[str, Any]], began: float, first_steps: dict[str, float]
) -> dict[str, Any]:
    """When a stage ran, and the mean of what was busy meanwhile; other stages may have run beside it."""
    assert record.started is not None
    assert record.ended is not None
    start, end = record.started - began, record.ended - began
    within = [sample for sample in samples if start < sample["at"] <= end + EVERY]
    gpus = [share for sample in within for share in sample["gpus"].values()]
    # `train k=5`, `train k=5 and 2 more` of a pack, `train k=5, then evaluate` where it is chained.
    subject = re.split(r" and \d+ more|, then ", record.stage.partition(" ")[2])[0]
    first = first_steps.get(subject) if record.stage.startswith("train ") else None
    return {
        "stage": record.stage,
        "start": start,
        "end": end,
        "cores": statistics.fmean(sample["cores"] for sample in within) if within else None,
        "gpus": statistics.fmean(gpus) if gpus else None,
        "first_step_after": None if first is None else first - start,
    }
