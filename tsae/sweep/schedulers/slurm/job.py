"""Inside a job of Slurm: what submitit calls there, and how the job learns which one it is."""

from __future__ import annotations

import os
import re
import socket
import sys
import traceback

from tsae.runtime.job import Call, Place, run_stage

FAILED = 200
"""Exit code of a stage that failed. `srun` ends with the highest code of all processes, so a failure of one must be
above the codes of those that leave because of it: `REQUEUE`, and 143 where SIGTERM ends them."""
FIRST_PORT, PORTS = 20000, 12000
"""Where the processes of a step meet, by their job's number; below the ports that systems give away."""


def run(call: Call) -> None:
    """`run_stage` for submitit, which would end a process that fails with code 1."""
    from submitit import JobEnvironment

    adopt_step()
    here = JobEnvironment()
    place = Place(
        job=here.job_id,
        host=os.environ.get("SLURMD_NODENAME") or socket.gethostname(),
        cluster=os.environ.get("SLURM_CLUSTER_NAME"),
        restarts=int(os.environ.get("SLURM_RESTART_COUNT", "0")),
        log=str(here.paths.stdout),
    )
    try:
        run_stage(call, place)
    except Exception as error:
        # Its line is in the record already; the whole of it goes to the log, and the code tells the batch script.
        traceback.print_exception(error)
        sys.exit(FAILED)


def adopt_step() -> None:
    """Where `srun` alone started several of this process, say so in torchrun's variables; set ones win.

    Only inside a step: a job's batch script, and a shell that salloc opened, see the job's tasks but are none of them.
    """
    step = os.environ.get("SLURM_STEP_ID", "")
    tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS") or 1)
    place = ("SLURM_JOB_ID", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NODELIST")
    if "WORLD_SIZE" in os.environ or tasks == 1 or not step.isdigit() or not all(name in os.environ for name in place):
        return
    job = os.environ["SLURM_JOB_ID"]
    meeting = {
        "RANK": os.environ["SLURM_PROCID"],
        "WORLD_SIZE": str(tasks),
        "LOCAL_RANK": os.environ["SLURM_LOCALID"],
        "MASTER_ADDR": first_host(os.environ["SLURM_STEP_NODELIST"]),
        "MASTER_PORT": str(FIRST_PORT + (int(job) * 7 + int(step)) % PORTS),
    }
    for name, value in meeting.items():
        os.environ.setdefault(name, value)


def first_host(nodes: str) -> str:
    """The first of the hosts that Slurm writes as `n[3-5,8],m1`."""
    outside = re.match(r"(?:\[[^\]]*\]|[^,\[])*", nodes)
    assert outside is not None  # every part of the expression may be empty
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", outside.group())
