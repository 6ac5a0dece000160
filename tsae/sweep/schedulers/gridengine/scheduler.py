"""Grid Engine (SGE, Son of Grid Engine, Univa, Altair) as a scheduler of sweeps, through its own commands.

Every order is an array job, one of a single task too. What it lacks beside Slurm is made up for by the batch script:

    afterok      -hold_jid waits until inputs have ended, however they did. A script whose stage is done leaves a mark
                 beside its log (`<job>.<task>.done`), and a job looks for those of its inputs before it begins.
    time limit   at s_rt the script gets SIGUSR1, and passes it to the stage as SIGUSR2, on which it saves itself. What
                 has not left shortly before h_rt is killed by the script, which Grid Engine would kill then too.
    requeue      exit code 99 sends a job back to the queue; -r y does where its host was lost.
    restarts     the script counts its starts (`<job>.<task>.starts`).
"""

from __future__ import annotations

import math
import os
import re
import shlex
import subprocess
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path

from tsae.runtime import metadata
from tsae.runtime.errors import TsaeError
from tsae.runtime.state import State
from tsae.sweep.schedulers.base import Full, Inputs, Limits, Order, Seen
from tsae.sweep.schedulers.gridengine.job import BLOCKED, ORDER_FILE, RESTARTS

PARALLEL_ENVIRONMENT = "smp"
"""Of a job with several cores, where the site's `extra: {pe: NAME}` says no other; it must give all slots on one host."""
MEMORY = "mem_free"
"""How memory is asked for, all of it at once, where `extra: {memory: NAME}` names no resource that each slot has: h_vmem."""
MEGABYTES = {"K": 1 / 1024, "M": 1, "G": 1024, "T": 1024**2}
NO_ROOM = re.compile(r"only \d+ jobs are allowed per \w+")
"""What qsub says where max_u_jobs or max_jobs is reached."""
LEAST_NOTICE = 2
"""Seconds before h_rt at which the script makes an end."""
BATCH = """\
folder={folder}
id=$folder/$JOB_ID.$SGE_TASK_ID
exec >>"$id.log" 2>&1
{setup}
echo start >>"$id.starts"
export {restarts}=$(($(wc -l <"$id.starts") - 1))
asked= children= killer=
leave() {{
    asked=1
    kill -USR2 $children 2>/dev/null
}}
time_is_over() {{
    leave
    (trap '' USR1 USR2; sleep {patience}; kill -KILL $children) &
    killer=$!
}}
trap time_is_over USR1
trap leave USR2 TERM
export WORLD_SIZE={count} MASTER_ADDR=127.0.0.1 MASTER_PORT=$((20000 + (JOB_ID * 7 + SGE_TASK_ID) % 12000))
for rank in $(seq 0 $((WORLD_SIZE - 1))); do
    # Signals reach the whole process group; the stage listens to those that the script passes on.
    (trap '' USR1; RANK=$rank LOCAL_RANK=$rank exec {python} -u -m tsae.sweep.schedulers.gridengine.job "$folder") &
    children="$children $!"
done
code=0
while [ -n "$children" ]; do
    sleep 0.5 &
    wait $!  # not for a child: of several that work together any may be the first to fail
    left=
    for child in $children; do
        if kill -0 $child 2>/dev/null; then
            left="$left $child"
            continue
        fi
        wait $child
        ended=$?
        # The highest code tells: one fails, and the others leave because of it.
        [ $ended -gt $code ] && code=$ended
    done
    children=$left
    [ $code -eq 0 ] || [ $code -eq {blocked} ] || [ -z "$children" ] || kill -TERM $children 2>/dev/null
done
[ -z "$killer" ] || kill $killer 2>/dev/null
echo "batch script: the stage ended with code $code${{asked:+, asked to leave}}"
case $code/$asked in
    0/*) touch "$id.done" ;;
    {blocked}/*) exit 0 ;;
    # 75: left when asked to; 140, 143: was asked to before it could listen; 137: did not leave in time
    75/* | 137/1 | 140/1 | 143/1) exit 99 ;;
    # by itself; where nobody may read the accounting, this tells
    *) echo $code >"$folder/${{JOB_ID}}_$((SGE_TASK_ID - 1))_exit_code"; exit 1 ;;
esac
"""


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
        most = int(found[1]) if found and int(found[1]) else 75000
        return Limits(f"{_run('qconf', '-sss').strip()}/{cell}", most, array_counts_once=True)

    def submit(self, order: Order) -> list[str]:
        """Submit one array with one call of qsub."""
        batch = order.folder / "job.sh"
        batch.write_text(self.script(order))
        inputs = {"one_by_one": order.inputs.one_by_one, "jobs": order.inputs.jobs}
        must_be_done = {} if order.inputs.however_they_end else inputs
        metadata.write(order.folder / ORDER_FILE, {"tasks": len(order.calls), "inputs": must_be_done})
        for number, call in enumerate(order.calls, 1):
            call.save(order.folder / f"call-{number}.json")
        try:
            said = _run("qsub", "-terse", str(batch))
        except TsaeError as error:
            message = f"{str(error).replace('qsub: ', f'qsub: {order.comment}: ', 1)}; nothing was submitted"
            limit = NO_ROOM.search(message)
            raise (Full(message, limit.group()) if limit else TsaeError(message)) from None
        job = said.split()[-1].partition(".")[0]
        (order.folder / f"{job}.order").touch()  # by which later jobs find the marks of this one
        return [f"{job}_{index}" for index in range(len(order.calls))]

    def script(self, order: Order) -> str:
        """The script for qsub, with its options in lines that begin with `#$`."""
        batch = BATCH.format(
            folder=shlex.quote(str(order.folder)),
            setup="\n".join(order.setup),
            restarts=RESTARTS,
            patience=max(1, _notice(order) - LEAST_NOTICE),
            count=order.resources.processes,
            python=shlex.join(order.python),
            blocked=BLOCKED,
        )
        options = "\n".join(f"#$ {option}" for option in _options(order))
        return "\n".join(["#!/bin/bash", f"# {order.comment}", options, batch])

    def log(self, order: Order, job: str) -> Path:
        """The output of a task's script."""
        return order.folder / f"{_theirs(job)}.log"

    def queued(self, job_name: str) -> dict[str, Seen]:
        """What the qmaster knows, by one call of qstat."""
        found: dict[str, Seen] = {}
        for entry in ElementTree.fromstring(_run("qstat", "-xml", "-g", "d", "-u", "*")).iter("job_list"):
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
        # The script opens its log itself: -o would cut a path at commas and colons.
        "-S /bin/bash -cwd -o /dev/null -j y -r y -notify -V",
        f"-N {order.job_name}",
        f"-t 1-{len(order.calls)} -tc {order.max_parallel}",
    ]
    slots = asked.tasks_per_node * (asked.cpus or 1)
    environment, memory = extra.pop("pe", PARALLEL_ENVIRONMENT), extra.pop("memory", MEMORY)
    if slots > 1:
        options.append(f"-pe {environment} {slots}")
    if asked.minutes is not None:
        seconds = asked.minutes * 60
        options.append(f"-l h_rt={seconds},s_rt={seconds - _notice(order)}")
    if asked.mem is not None:
        options.append(f"-l {memory}={math.ceil(_megabytes(asked.mem) / (1 if memory == MEMORY else slots))}M")
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


def _notice(order: Order) -> int:
    """Seconds between the request to leave and the end of a job's time."""
    minutes, most = order.resources.minutes, order.cluster.signal_seconds
    return most if minutes is None else min(most, minutes * 60 // 3)


def _megabytes(mem: str) -> float:
    """`32G`, `500MB` or `64000`, which are megabytes as in Slurm; Grid Engine knows neither B nor T and counts in bytes."""
    amount, unit = re.fullmatch(r"(\d+)([KMGT]?)B?", mem.upper()).groups()  # type: ignore[union-attr]  # was checked
    return int(amount) * MEGABYTES[unit or "M"]


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
