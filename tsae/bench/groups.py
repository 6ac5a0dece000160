"""The same training by one process and by several: whether the losses agree, and what it costs each of them."""

from __future__ import annotations

import json
import os
import socket
import statistics
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from tsae.bench.shape import Shape
from tsae.config.run import require_processes
from tsae.runtime.errors import TsaeError


def measure(shape: Shape, worlds: Sequence[int], steps: int, threads: int) -> list[dict[str, Any]]:
    """A record for each number of processes, and for each of several processes one with `shard: optimizer`.

    Raises TsaeError if the batch cannot be shared by so many, or a process fails.
    """
    config = shape.run_config("sparse")
    for world in worlds:
        require_processes(config, world)
    return [record for world in worlds for record in _train(shape, world, steps, threads)]


def _train(shape: Shape, world: int, steps: int, threads: int) -> list[dict[str, Any]]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    shards = ["optimizer", "none"] if world > 1 else ["none"]
    request = json.dumps({"shape": shape.as_dict(), "shards": shards, "steps": steps, "threads": threads})
    processes = []
    for rank in range(world):
        place = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": world}
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": threads}
        processes.append(
            subprocess.Popen(
                [sys.executable, "-m", "tsae.bench.rank"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env={**os.environ, **{name: str(value) for name, value in {**place, **meeting}.items()}},
                text=True,
            )
        )
    for process in processes:
        assert process.stdin is not None
        process.stdin.write(request)
        process.stdin.close()
        process.stdin = None  # `communicate` would flush it
    answers = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        raise TsaeError(f"bench: a training by {world} processes failed; what it said stands above")
    records: list[dict[str, Any]] = json.loads(answers[0])
    return records[::-1]


def table(records: Sequence[dict[str, Any]]) -> str:
    """One line for each record."""
    lines = [
        f"{'processes':>9}  {'shard':10}{'largest difference of a loss':>30}{'MB handed over / step':>23}"
        f"{'of them gradients':>19}{'s / step':>10}{'MB of state':>13}{'MB at most':>12}"
    ]
    for record in records:
        handed = statistics.median(record["bytes_handed"]) / 1e6
        gradients = record["gradient_bytes"] / 1e6 if record["processes"] > 1 else 0
        lines.append(
            f"{record['processes']:>9}  {record['shard']:10}{max(differences(record, records[0])):>30.1e}"
            f"{handed:>23.3f}{gradients:>19.3f}{statistics.median(record['seconds']):>10.3g}"
            f"{record['state_bytes'] / 1e6:>13.1f}{record['peak_bytes'] / 1e6:>12.1f}"
        )
    return "\n".join(lines)


def differences(record: dict[str, Any], alone: dict[str, Any]) -> list[float]:
    """Of each step's loss from that of another record, relative to it."""
    return [abs(found - wanted) / abs(wanted) for found, wanted in zip(record["loss"], alone["loss"], strict=True)]
