"""The same training by one process and by several: whether the losses agree, and what it costs each of them.

Each process is `python -m tsae.bench.groups` and gets what to do as JSON on its input. The first one answers with one
line of JSON: a record for each way to share, which are tried in the order given. What needs the least memory comes first,
since the system tells the most that a process ever had.
"""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch

from tsae.bench.rounds import Memory
from tsae.bench.shape import Shape, batches, moments
from tsae.config import run as configuration
from tsae.parallel.group import Group
from tsae.parallel.rendezvous import together
from tsae.runtime.errors import TsaeError
from tsae.training.trainer import Trainer

BATCHES = 8


def measure(shape: Shape, worlds: Sequence[int], steps: int, threads: int) -> list[dict[str, Any]]:
    """A record for each number of processes, and for each of several processes one with `shard: optimizer`.

    Raises TsaeError if the batch cannot be shared by so many, or a process fails.
    """
    config = shape.run_config("sparse")
    for world in worlds:
        configuration.require_processes(config, world)
    return [record for world in worlds for record in _by_processes(shape, world, steps, threads)]


def _by_processes(shape: Shape, world: int, steps: int, threads: int) -> list[dict[str, Any]]:
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
                [sys.executable, "-m", "tsae.bench.groups"],
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


def main() -> int:
    """Train, and tell how that went."""
    asked = json.loads(sys.stdin.read())
    torch.set_num_threads(asked["threads"])
    shape = Shape(**asked["shape"])
    try:
        with together(cpu=shape.device == "cpu") as group:
            # What is imported and initialised once is not a cost of the training.
            tiny = dataclasses.replace(shape, activation_dim=16, dict_size=128, k=4, batch_size=32 * group.world)
            _train(tiny, 2, "none", group)
            answer = [_train(shape, asked["steps"], shard, group) for shard in asked["shards"]]
            if group.rank == 0:
                print(json.dumps(answer), flush=True)
    except TsaeError as error:
        print(f"tsae: {error}", file=sys.stderr)
        return 2
    return 0


def _train(shape: Shape, steps: int, shard: str, group: Group) -> dict[str, Any]:
    settings = {"shard": shard, "steps": steps, "threshold_start_step": steps // 2, "dead_after": 3 * shape.batch_size}
    config = configuration.replace(shape.run_config("sparse"), training=settings)
    device = torch.device("cuda", torch.cuda.current_device()) if shape.device != "cpu" else torch.device("cpu")
    own = [batch[group.share(shape.batch_size // group.world)].clone() for batch in batches(shape, BATCHES)]
    memory = Memory(str(device))
    trainer = Trainer(config, shape.activation_dim, device=device, group=group, moments=moments(shape))
    losses, handed, seconds = [], [], []
    for step in range(steps):
        began = time.perf_counter()
        terms = trainer.step(own[step % len(own)])
        losses.append(float(terms.loss))
        seconds.append(time.perf_counter() - began)
        handed.append(terms.bytes_handed)
    parameters = list(trainer.dictionary.parameters())
    of_adam = (moment for state in trainer.optimizer.state.values() for moment in state.values())
    # One process on a CPU stores no gradients of matrices.
    gradients = (parameter.grad for parameter in parameters if parameter.grad is not None)
    return {
        "processes": group.world,
        "shard": shard,
        "loss": losses,
        "bytes_handed": handed,
        "seconds": seconds,
        "state_bytes": sum(tensor.nbytes for tensor in chain(parameters, of_adam, gradients)),
        "gradient_bytes": sum(parameter.nbytes for parameter in parameters),
        "peak_bytes": max(group.collect(memory.peak() or 0), default=0),
    }


if __name__ == "__main__":
    sys.exit(main())
