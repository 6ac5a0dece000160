"""One process of a training by several: `python -m tsae.bench.rank`, what to do as JSON on its input.

The first process answers with one line of JSON: a record for each way to share, which are tried in the order given.
What needs the least memory comes first, since the system tells the most that a process ever had.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from itertools import chain
from typing import Any

import torch

from tsae.bench.memory import Memory
from tsae.bench.shape import Shape, batches
from tsae.config import run as configuration
from tsae.parallel.group import Group
from tsae.parallel.rendezvous import together
from tsae.runtime.errors import TsaeError
from tsae.training.trainer import Trainer

BATCHES = 8


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
    trainer = Trainer(config, shape.activation_dim, device=device, group=group)
    losses, handed, seconds = [], [], []
    for step in range(steps):
        began = time.perf_counter()
        terms = trainer.step(own[step % len(own)])
        losses.append(float(terms.loss))
        seconds.append(time.perf_counter() - began)
        handed.append(terms.bytes_handed)
    parameters = list(trainer.dictionary.parameters())
    moments = (moment for state in trainer.optimizer.state.values() for moment in state.values())
    # One process on a CPU stores no gradients of matrices.
    gradients = (parameter.grad for parameter in parameters if parameter.grad is not None)
    return {
        "processes": group.world,
        "shard": shard,
        "loss": losses,
        "bytes_handed": handed,
        "seconds": seconds,
        "state_bytes": sum(tensor.nbytes for tensor in chain(parameters, moments, gradients)),
        "gradient_bytes": sum(parameter.nbytes for parameter in parameters),
        "peak_bytes": max(group.collect(memory.peak() or 0), default=0),
    }


if __name__ == "__main__":
    sys.exit(main())
