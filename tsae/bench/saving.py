"""What it costs to be resumable: writing a state beside the steps, and continuing from one."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

from tsae.bench.report import spread
from tsae.bench.shape import Shape, batches
from tsae.training.resume import ResumeStates
from tsae.training.trainer import Trainer

EVERY = 50
"""Steps between states, for which the cost is told."""


def cost(record: dict[str, Any]) -> dict[str, Any]:
    """What a state every `EVERY` steps adds to the step time, as a share of it, from a record with both contestants."""
    by_name = {entry["name"]: entry["seconds"]["rounds"] for entry in record["contestants"]}
    pairs = zip(by_name["sparse+state"], by_name["sparse"], strict=True)
    return {"every": EVERY, "share_of_step_time": spread([(saving / plain - 1) / EVERY for saving, plain in pairs])}


def resume_seconds(shape: Shape, rounds: int) -> list[float]:
    """Wall seconds from nothing to a trainer that continues, state checked and read; the store's first pool is not in it."""
    config = shape.run_config("sparse")
    (batch,) = batches(shape, 1)
    with tempfile.TemporaryDirectory(prefix="tsae-bench-") as folder:
        trainer = Trainer(config, shape.activation_dim, device=shape.device)
        trainer.step(batch)
        states = ResumeStates(Path(folder), {}, keep=1)
        states.save(1, trainer.state(), first=lambda: None)
        states.wait()
        seconds = []
        for _ in range(rounds):
            began = time.perf_counter()
            state = ResumeStates(Path(folder), {}, keep=1).load()
            assert state is not None
            Trainer(config, shape.activation_dim, device=shape.device).load_state(state)
            seconds.append(time.perf_counter() - began)
    return seconds


def line(costs: dict[str, Any]) -> str:
    """For the terminal."""
    share, seconds = costs["share_of_step_time"], costs["resume_seconds"]
    return (
        f"a resumable state every {costs['every']} steps: {100 * share['median']:+.1f} % of the step time "
        f"({100 * share['lowest']:+.1f} to {100 * share['highest']:+.1f}); resumed in {seconds['median']:.2g} s"
    )
