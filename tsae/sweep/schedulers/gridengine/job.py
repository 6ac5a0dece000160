"""Inside a job of Grid Engine: `python -m tsae.sweep.schedulers.gridengine.job FOLDER`, the folder of its order."""

from __future__ import annotations

import os
import socket
import sys
import traceback
from pathlib import Path
from typing import Any

from tsae.runtime import metadata, preemption
from tsae.runtime.job import Call, Place, run_stage
from tsae.runtime.metadata import COUNT

ORDER_FILE = "order.json"
RESTARTS = "TSAE_RESTARTS"
"""Names the variable in which the batch script says how often the job was started before."""
BLOCKED = 3
"""Exit code of a job that did not begin, because an input is not done."""
FAILED = 200
"""Exit code of a stage that failed; above those of processes that leave because of it."""


def main(arguments: list[str]) -> int:
    """0: done; 3: an input is not done; 75: asked to leave; 200: failed."""
    folder = Path(arguments[0])
    job, task = os.environ["JOB_ID"], int(os.environ["SGE_TASK_ID"])
    order = read_order(folder)
    missing = [name for name in inputs_of(order["inputs"], task) if not is_done(folder.parents[1], name)]
    if missing:
        print(f"not begun: {', '.join(missing)} did not end well", file=sys.stderr)
        return BLOCKED
    place = Place(
        job=f"{job}_{task - 1}",
        host=socket.gethostname(),
        cluster=os.environ.get("SGE_CELL"),
        restarts=int(os.environ[RESTARTS]),
        log=str(folder / f"{job}.{task}.log"),
    )
    try:
        run_stage(Call.load(folder / f"call-{task}.json"), place)
    except preemption.Preempted as preempted:
        print(f"tsae: {preempted}", file=sys.stderr)
        return preemption.REQUEUE
    except Exception as error:
        traceback.print_exception(error)
        return FAILED
    return 0


def read_order(folder: Path) -> dict[str, Any]:
    """What an array is. Raises TsaeError."""
    return metadata.read(folder / ORDER_FILE, {"tasks": COUNT, "inputs": {str: [str]}}, "launch the sweep again")


def inputs_of(inputs: dict[str, list[str]], task: int) -> list[str]:
    """The jobs that must be done before task `task` begins: `123` (a whole array) or `123_4`."""
    return [f"{array}_{task - 1}" for array in inputs.get("one_by_one", [])] + inputs.get("jobs", [])


def is_done(attempts: Path, job: str) -> bool:
    """Whether all tasks of a job, or the one that is named, are done; in any launch of the sweep."""
    array, _, index = job.partition("_")
    marks = sorted(attempts.glob(f"*/*/{array}.order"))
    if not marks:
        return False
    folder = marks[-1].parent  # ids begin again when a qmaster's state is wiped: the latest launch means this one
    tasks = [int(index) + 1] if index else range(1, read_order(folder)["tasks"] + 1)
    return all((folder / f"{array}.{task}.done").exists() for task in tasks)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
