"""What goes on around the steps: how fast activations arrive and are made, what smoothness costs, and a resumed start."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tsae.bench import loop
from tsae.bench.report import spread
from tsae.bench.shape import Shape, batches, moments
from tsae.config.run import Counted, RunConfig
from tsae.config.sections import StoreConfig
from tsae.runtime.progress import Progress
from tsae.store.pairs import PairStream
from tsae.store.reader import Store
from tsae.store.writer import finalise, prepare, write_shard
from tsae.training.resume import ResumeStates
from tsae.training.trainer import Trainer

CONTEXT = 128
SMOOTHNESS_ROUNDS, SMOOTHNESS_WARMUP = 50, 5
PERSISTENCE = 0.55


def measure(shape: Shape, megabytes: int, rounds: int, read: RunConfig, place: Path) -> dict[str, Any]:
    """Spreads of all rates, as they are written down; the store that is read has about `megabytes`, on the disk of `place`.

    What is harvested are random tokens by the language model of `read`.
    """
    if shape.device.startswith("cuda:"):
        torch.cuda.set_device(shape.device)  # a training takes the current one
    with tempfile.TemporaryDirectory(prefix="rates-", dir=place) as made:
        folder = Path(made)
        harvest = loop.harvest_rates(read, folder)
        store = _write_store(folder, shape, megabytes)
        read_rate, memmap_rate = _read_rates(folder, store, shape, rounds)
        fitting = replace(shape, batch_size=_fitting(shape, store), dtype="float32")
        return {
            "store_mb": megabytes,
            "store_pairs_per_second": spread(read_rate),
            "memmap_pairs_per_second": spread(memmap_rate),
            "training": loop.training_rates(fitting, store, folder / "runs"),
            "harvest": harvest,
            "smoothness_seconds_per_context": spread(_smoothness_cost(shape, SMOOTHNESS_ROUNDS)),
        }


def _read_rates(folder: Path, store: Store, shape: Shape, rounds: int) -> tuple[list[float], list[float]]:
    """Pairs per wall second of whole epochs of a temporary bfloat16 store, a quarter of it in memory at a time, and of
    as many random rows of a memory map of the same numbers, in turns.

    Of the store's pairs checksums, mixing and widening to float32 are included; the others are widened as well.
    """
    batch, pool = _fitting(shape, store), max(1, len(store.train) // 4)
    stream = PairStream(store, "previous", batch, 0, counted=Counted(1), pool_sequences=pool)
    steps = stream.steps_per_epoch
    flat = np.memmap(folder / "flat", np.uint16, mode="r").reshape(-1, shape.activation_dim)
    ways = (stream.iterate(0, (rounds + 1) * steps), _random_rows(flat, batch))
    rates: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds + 1):
        for way, found in zip(ways, rates, strict=True):
            began = time.perf_counter()
            for _ in range(steps):
                next(way)
            found.append(steps * batch / (time.perf_counter() - began))
    # The first round fills the pool and the page cache.
    return rates[0][1:], rates[1][1:]


def _fitting(shape: Shape, store: Store) -> int:
    """The batch size, or what of it a small store has several batches of."""
    return min(shape.batch_size, len(store.train) * CONTEXT // 8)


def _write_store(folder: Path, shape: Shape, megabytes: int) -> Store:
    sequences = max(64, megabytes * 10**6 // (2 * CONTEXT * shape.activation_dim))
    contexts = loop.contexts_of(np.zeros((sequences, CONTEXT), np.int32))
    attributes = {"model": {"name": "bench"}}
    layout = prepare(
        folder / "store", contexts, shape.activation_dim, store=StoreConfig(shard_mb=64), attributes=attributes
    )
    generator = torch.Generator().manual_seed(0)
    shards = layout.geometry.shards
    progress = Progress("writing the store that is read", shards, "shards")
    with open(folder / "flat", "wb") as flat:
        for shard in range(shards):
            rows = len(layout.geometry.sequences_of(shard))
            block = torch.randn(rows, CONTEXT, shape.activation_dim, generator=generator).bfloat16()
            write_shard(layout, shard, [block])
            flat.write(block.view(torch.uint16).numpy().tobytes())
            progress.update(shard + 1)
    finalise(layout)
    return Store.open(layout.path)


def _random_rows(flat: np.ndarray, batch: int) -> Iterator[torch.Tensor]:
    """Pairs [B, 2, D] of random neighbours without end, as the simplest loader would read them."""
    random = np.random.default_rng(0)
    while True:
        rows = random.integers(1, len(flat), batch)
        pairs = np.stack([flat[rows], flat[rows - 1]], axis=1)
        yield torch.from_numpy(pairs).view(torch.bfloat16).float()


def _smoothness_cost(shape: Shape, rounds: int) -> list[float]:
    """Seconds of processor time for all smoothness measures, of all splits, of one context's sparse code."""
    from tsae.evaluation.smoothness import context_code, smoothness, split_ranges
    from tsae.sae.sparse import from_dense

    code = from_dense(_persistent_codes(shape.dict_size, min(shape.k, shape.dict_size // 2)))
    x = torch.randn(CONTEXT, shape.activation_dim, generator=torch.Generator().manual_seed(0))
    ranges = split_ranges(shape.run_config("sparse").sae.group_sizes)
    seconds = []
    for _ in range(rounds + SMOOTHNESS_WARMUP):
        began = time.process_time()
        smoothness(context_code(code, slice(0, CONTEXT)), x, ranges)
        seconds.append(time.process_time() - began)
    return seconds[SMOOTHNESS_WARMUP:]


def _persistent_codes(dict_size: int, k: int) -> torch.Tensor:
    """[L, F] codes of k active latents, each of which stays on for about two tokens."""
    random = np.random.default_rng(0)
    f, active = torch.zeros(CONTEXT, dict_size), np.zeros(0, int)
    for position in range(CONTEXT):
        kept = active[random.random(len(active)) < PERSISTENCE]
        others = np.setdiff1d(random.choice(dict_size, 2 * k, replace=False), kept)
        active = np.concatenate([kept, random.permutation(others)[: k - len(kept)]])
        f[position, active] = torch.from_numpy(random.random(k, np.float32)) + 0.5
    return f


def resume_seconds(shape: Shape, rounds: int) -> dict[str, float]:
    """Wall seconds from nothing to a trainer that continues, state checked and read; the store's first pool is not in it."""
    shape = replace(shape, dtype="float32")  # of which a training is, whatever is timed
    config = shape.run_config("sparse")
    (batch,) = batches(shape, 1)
    with tempfile.TemporaryDirectory(prefix="tsae-bench-") as folder:
        trainer = Trainer(config, shape.activation_dim, device=shape.device, moments=moments(shape))
        trainer.step(batch)
        states = ResumeStates(Path(folder), {}, keep=1)
        states.save(1, trainer.state(), first=lambda: None)
        states.wait()
        seconds = []
        for _ in range(rounds):
            began = time.perf_counter()
            state = ResumeStates(Path(folder), {}, keep=1).load()
            assert state is not None
            Trainer(config, shape.activation_dim, device=shape.device, moments=moments(shape)).load_state(state)
            seconds.append(time.perf_counter() - began)
    return spread(seconds)
