"""Grid Engine (SGE, Son of Grid Engine, Univa, Altair) as a scheduler of sweeps, through its own commands.

Every order is an array job, one of a single task too. What it lacks beside Slurm is made up for by the batch script:

    afterok      -hold_jid waits until inputs have ended, however they did. Each script leaves its exit code beside its log
                 (`<job>.<task>.exit`), and a job looks for those of its inputs before it begins.
    time limit   at s_rt the script gets SIGUSR1, and passes it to the stage as SIGUSR2, which it saves itself on.
    requeue      exit code 99 sends a job back to the queue; -r y does where its host was lost.
    restarts     the script counts its starts (`<job>.<task>.starts`).
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path

from tsae.runtime.errors import TsaeError
from tsae.runtime.state import State
from tsae.sweep.schedulers.base import Inputs, Limits, Order, Seen
from tsae.sweep.schedulers.gridengine.job import BLOCKED, ORDER_FILE, RESTARTS

PARALLEL_ENVIRONMENT = "smp"
"""Of a job with several cores, where the site's `extra: {pe: NAME}` says no other; it must give all slots on one host."""
BATCH = """\
cd {folder}
id=$JOB_ID.$SGE_TASK_ID
echo start >>"$id.starts"
export {restarts}=$(($(wc -l <"$id.starts") - 1))
asked= children=
leave() {{ asked=1; kill -USR2 $children 2>/dev/null; }}
trap leave USR1 USR2 TERM
for rank in $(seq 0 {last}); do
    # Signals reach the whole process group; the stage listens to those that the script passes on.
    (trap '' USR1; export {meeting}; exec {python} -u -m tsae.sweep.schedulers.gridengine.job .) &
    children="$children $!"
done
code=0
for child in $children; do
    wait $child; ended=$?
    while kill -0 $child 2>/dev/null; do wait $child; ended=$?; done  # a signal ends `wait`, not the child
    # The highest code tells: of several processes one fails and the others leave because of it.
    [ $ended -gt $code ] && code=$ended
    [ $ended -ne 0 ] && [ $ended -ne {blocked} ] && kill -TERM $children 2>/dev/null
done
echo "batch script: the stage ended with code $code${{asked:+, asked to leave}}"
case $code/$asked in
    75/* | 140/1 | 143/1) exit 99 ;;
    {blocked}/*) echo $code >"$id.exit"; exit 0 ;;
esac
echo $code >"$id.exit"
[ $code -eq 0 ] || exit 1
"""
ALONE = "RANK=0"
TOGETHER = (
    "RANK=$rank LOCAL_RANK=$rank WORLD_SIZE={count} MASTER_ADDR=127.0.0.1 "
    "MASTER_PORT=$((20000 + (JOB_ID * 7 + SGE_TASK_ID) % 12000))"
)


class GridEngine:
    """The Grid Engine whose commands are on PATH."""

    name = "gridengine"
    title = "Grid Engine"
    command = "qsub"
    silence = "no qmaster answers `qconf -sql`"

    def answers(self) -> bool:
        """Whether a qmaster answers; PBS has a qsub too, but no qconf."""
        try:
            answer = subprocess.run(["qconf", "-sql"], capture_output=True, check=False, timeout=30)
        except (FileNotFoundError, subprocess.TimeoutExpired):
            return False
        return answer.returncode == 0

    def limits(self) -> Limits:
        """What the qmaster was configured with."""
        found = re.search(r"^max_aj_tasks\s+(\d+)", _run("qconf", "-sconf"), re.MULTILINE)
        cell = os.environ.get("SGE_CELL", "default")
        return Limits(f"{_run('qconf', '-sss').strip()}/{cell}", int(found[1]) if found and int(found[1]) else 75000)

    def submit(self, order: Order) -> list[str]:
        """Submit one array with one call of qsub."""
        batch = order.folder / "job.sh"
        batch.write_text(self.script(order))
        inputs = {"one_by_one": order.inputs.one_by_one, "jobs": order.inputs.jobs}
        must_be_done = {} if order.inputs.however_they_end else inputs
        (order.folder / ORDER_FILE).write_text(json.dumps({"tasks": len(order.calls), "inputs": must_be_done}))
        for number, call in enumerate(order.calls, 1):
            call.save(order.folder / f"call-{number}.json")
        try:
            said = _run("qsub", "-terse", str(batch))
        except TsaeError as error:
            raise TsaeError(
                f"{str(error).replace('qsub: ', f'qsub: {order.comment}: ', 1)}; nothing was submitted"
            ) from None
        job = said.split()[-1].partition(".")[0]
        (order.folder / f"{job}.order").touch()  # by which later jobs find the exit codes of this one
        return [f"{job}_{index}" for index in range(len(order.calls))]

    def script(self, order: Order) -> str:
        """The script for qsub, with its options in lines that begin with `#$`."""
        count = order.resources.processes
        batch = BATCH.format(
            folder=shlex.quote(str(order.folder)),
            restarts=RESTARTS,
            last=count - 1,
            meeting=ALONE if count == 1 else TOGETHER.format(count=count),
            python=shlex.join(order.python),
            blocked=BLOCKED,
        )
        options = "\n".join(f"#$ {option}" for option in _options(order))
        return "\n".join(["#!/bin/bash", f"# {order.comment}", options, *order.setup, batch])

    def log(self, order: Order, job: str) -> Path:
        """The output of a task's script."""
        return order.folder / f"{_theirs(job)}.log"

    def queued(self, job_name: str) -> dict[str, Seen]:
        """What the qmaster knows, by one call of qstat."""
        found: dict[str, Seen] = {}
        for entry in ElementTree.fromstring(_run("qstat", "-xml", "-g", "d")).iter("job_list"):
            value = {field.tag: field.text or "" for field in entry}
            if value.get("JB_name") == job_name:
                job = f"{value['JB_job_number']}_{int(value.get('tasks') or 1) - 1}"
                found[job] = _seen(job, value)
        return found

    def accounted(self, job_name: str, since: float) -> dict[str, Seen]:
        """How jobs ended, by one call of qacct; a job that was queued again has a record for each time, the last one tells."""
        start = time.strftime("%Y%m%d%H%M", time.localtime(since - 60))
        answer = subprocess.run(
            ["qacct", "-b", start, "-j", job_name], capture_output=True, text=True, check=False, env=_plain()
        )
        found: dict[str, Seen] = {}
        for record in re.split(r"^=+$", answer.stdout if answer.returncode == 0 else "", flags=re.MULTILINE)[1:]:
            value = dict(re.findall(r"^(\w+)\s+(.*?)\s*$", record, re.MULTILINE))
            task = value.get("taskid", "undefined")
            job = f"{value['jobnumber']}_{int(task) - 1 if task.isdigit() else 0}"
            found[job] = _ended(value)
        return found

    def cancel(self, jobs: Iterable[str]) -> None:
        """qdel; it complains of jobs that have ended, which is as well."""
        wanted = [_theirs(job) for job in jobs]
        if wanted:
            _run("qdel", *wanted, forgive="does not exist")

    def release(self, jobs: Iterable[str]) -> None:
        """Let arrays start that were submitted with -h."""
        wanted = [_theirs(job) for job in jobs]
        if wanted:
            _run("qrls", *wanted)

    def ending(self, job_name: str) -> str:
        """qdel, by the name."""
        return f"qdel {job_name}"

    def adopt_place(self) -> None:
        """The batch script says it in torchrun's variables already."""


def _options(order: Order) -> list[str]:
    """qsub's options. Raises TsaeError for resources that cannot be asked for in its words."""
    asked, extra = order.resources, dict(order.resources.extra)
    if (asked.nodes or 1) > 1:
        raise TsaeError(f"{order.comment}: resources.nodes: {asked.nodes}: on Grid Engine a job of ours has one node")
    if asked.qos is not None:
        raise TsaeError(
            f"{order.comment}: resources.qos: Grid Engine has none; partition names a queue, account a project"
        )
    options = [
        "-S /bin/bash -j y -r y -notify",
        f"-N {order.job_name}",
        f"-t 1-{len(order.calls)} -tc {order.max_parallel}",
        f"-o {order.folder}/$JOB_ID.$TASK_ID.log",
    ]
    slots = asked.tasks_per_node * (asked.cpus or 1)
    environment = extra.pop("pe", PARALLEL_ENVIRONMENT)
    if slots > 1:
        options.append(f"-pe {environment} {slots}")
    if asked.minutes is not None:
        seconds = asked.minutes * 60
        notice = min(order.cluster.signal_seconds, seconds // 3)
        options.append(f"-l h_rt={seconds},s_rt={seconds - notice}")
    if asked.mem is not None:
        options.append(f"-l mem_free={asked.mem}")
    if asked.gpus:
        options.append(f"-l {asked.gpu_request or f'gpu={asked.gpus}'}")
    if asked.constraint is not None:
        options.append(f"-l {asked.constraint}")
    if asked.exclude is not None:
        options.append(f"-l hostname=!({asked.exclude.replace(',', '|')})")
    if asked.partition is not None:
        options.append(f"-q {asked.partition}")
    if asked.account is not None:
        options.append(f"-P {asked.account}")
    options += _dependencies(order.inputs)
    if order.hold:
        options.append("-h")
    return options + [
        f"-{name}" if value is True else f"-{name} {value}"
        for name, value in extra.items()
        if value not in (None, False)
    ]


def _dependencies(inputs: Inputs) -> list[str]:
    """What a job waits for. One task of another array cannot be named: its whole array is waited for."""
    options = [f"-hold_jid_ad {','.join(inputs.one_by_one)}"] if inputs.one_by_one else []
    arrays = dict.fromkeys(job.partition("_")[0] for job in inputs.jobs)
    return options + ([f"-hold_jid {','.join(arrays)}"] if arrays else [])


def _theirs(job: str) -> str:
    """`123_4` → `123.5`: tasks are counted from 1."""
    array, _, index = job.partition("_")
    return f"{array}.{int(index) + 1}" if index else array


def _seen(job: str, value: dict[str, str]) -> Seen:
    """A job that qstat lists: its state is letters, such as `hqw`, `r`, `Rr`, `dr`, `Eqw`."""
    letters = value.get("state", "")
    if "E" in letters:
        return Seen(State.QUEUED, why=f"its start failed (Eqw); `qmod -cj {_theirs(job)}` tries again")
    if set(letters) & set("sST"):
        return Seen(State.QUEUED, why="suspended")
    if set(letters) & set("rt"):
        started = value.get("JAT_start_time", "")
        since = datetime.fromisoformat(started).timestamp() if started else None
        return Seen(State.RUNNING, value.get("queue_name", "").rpartition("@")[2], since)
    return Seen(State.QUEUED)


def _ended(value: dict[str, str]) -> Seen:
    """A record of qacct."""
    node, failed = value.get("hostname", ""), value.get("failed", "0")
    if failed.split()[0] == "0" and value.get("deleted_by", "NONE") == "NONE":
        return Seen(State.DONE if value.get("exit_status", "").split()[0] == "0" else State.FAILED, node)
    by = value.get("deleted_by", "NONE")
    return Seen(State.INTERRUPTED, node, why=f"deleted by {by}" if by != "NONE" else f"ended from outside ({failed})")


def _run(*command: str, forgive: str = "") -> str:
    """The output of a command. Raises TsaeError with what it complains about, unless that is what `forgive` says."""
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=False, env=_plain())
    except FileNotFoundError:
        raise TsaeError(
            f"{command[0]}: not found; sweeps on a cluster start where Grid Engine's commands are"
        ) from None
    said = "; ".join(line.strip() for line in (answer.stderr + answer.stdout).splitlines() if line.strip())
    if answer.returncode and not (forgive and forgive in said):
        raise TsaeError(f"{command[0]}: {said or f'ended with code {answer.returncode}'}")
    return answer.stdout


def _plain() -> dict[str, str]:
    return {**os.environ, "LC_ALL": "C"}
