"""From end to end: a training from a store beside its bare steps, a harvest beside the bare forward pass and the disk.

What comes between is reading, mixing and copying of batches, metrics and states; of a harvest the hook, the checks, the
checksums and the disk. Each is measured as `tsae train` and `tsae harvest` do it, in rounds, with what it is compared to in
the same round.
"""

from __future__ import annotations

import dataclasses
import math
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tsae.bench.report import spread
from tsae.bench.shape import Shape, batches, moments
from tsae.checkpoint import RunFolder
from tsae.config import run as configuration
from tsae.config.run import STORED, RunConfig
from tsae.data.contexts import Contexts
from tsae.lm.model import LanguageModel, load_language_model, readings
from tsae.runtime.errors import TsaeError
from tsae.store.filling import write_missing
from tsae.store.layout import StoreLayout
from tsae.store.reader import Store
from tsae.store.writer import prepare
from tsae.training.run import train
from tsae.training.trainer import Trainer

SECONDS = 2.0
"""Of bare steps, or bare forward passes, in a round."""
ROUNDS = 3
FEWEST, FEWEST_BATCHES = 20, 4
"""Steps, and batches of a language model, in a round."""


def contexts_of(tokens: np.ndarray) -> Contexts:
    """Sequences of tokens [S, L] that begin with a special one, each a document of its own, none held out."""
    sequences, length = tokens.shape
    document = np.repeat(np.arange(sequences, dtype=np.int32)[:, None], length, axis=1)
    document[:, 0] = -1
    return Contexts(
        tokens=tokens,
        lengths=np.full(sequences, length, np.int32),
        document=document,
        label=np.full(sequences, -1, np.int32),
        label_names=(),
        heldout=0,
        fingerprint="bench",
    )


def training_rates(shape: Shape, store: Store, folder: Path) -> dict[str, Any]:
    """Pairs per wall second of trainings from `store`, a quarter of it in memory at a time, and of bare steps.

    A training of 3n steps less one of n is what 2n steps take; the rest is its start and its end. Rounds in which the machine
    was so busy that the longer one took no longer are left out; raises TsaeError if none is left.
    """
    bare = Trainer(shape.run_config("sparse"), shape.activation_dim, device=shape.device, moments=moments(shape))
    document = torch.arange(shape.batch_size, device=shape.device)
    given = cycle(batches(shape, 2))

    def steps(count: int) -> float:
        """Seconds of bare steps."""
        began = time.perf_counter()
        for batch in islice(given, count):
            bare.step(batch, document)
        _wait(shape.device)
        return time.perf_counter() - began

    steps(FEWEST)
    n = max(FEWEST, math.ceil(SECONDS / (steps(FEWEST) / FEWEST)))
    _seconds_of_training(shape, store, folder, FEWEST)  # what is imported and initialised once
    rates: dict[str, list[float]] = {"whole": [], "bare": [], "start": []}
    for _ in range(ROUNDS):
        short, long = (_seconds_of_training(shape, store, folder, each) for each in (n, 3 * n))
        alone = steps(n)
        if long <= short:
            continue
        step = (long - short) / (2 * n)
        rates["whole"].append(shape.batch_size / step)
        rates["start"].append(short - n * step)
        rates["bare"].append(shape.batch_size * n / alone)
    if not rates["whole"]:
        raise TsaeError("bench: this machine is too busy to time trainings; run it again when others are done")
    return {
        "steps": n,
        "batch_size": shape.batch_size,
        "pairs_per_second": spread(rates["whole"]),
        "bare_pairs_per_second": spread(rates["bare"]),
        "share_of_bare": spread([whole / bare for whole, bare in zip(rates["whole"], rates["bare"], strict=True)]),
        "start_and_end_seconds": spread(rates["start"]),
    }


def _seconds_of_training(shape: Shape, store: Store, folder: Path, steps: int) -> float:
    config = configuration.replace(
        shape.run_config("sparse"),
        data={"source": STORED},
        store={"path": str(store.path)},
        training={"steps": steps, "device": shape.device, "pool_sequences": max(1, len(store.train) // 4)},
    )
    began = time.perf_counter()
    train(config, RunFolder(folder / "sae"))
    _wait(shape.device)
    seconds = time.perf_counter() - began
    shutil.rmtree(folder)
    return seconds


def harvest_rates(config: RunConfig, folder: Path) -> dict[str, Any]:
    """Tokens per wall second of a harvest of random tokens, once the model is loaded; of the forward pass to the same place
    by torch alone; and bytes per second that the disk of `folder` takes, of those that were harvested."""
    lm, settings = load_language_model(config.model), dataclasses.replace(config.store, window=None)
    context = config.data.context_length
    size = config.model.batch_size
    generator = torch.Generator().manual_seed(0)
    one = torch.randint(lm.vocabulary, (size, context), generator=generator)
    lm.read(one, torch.full((size,), context))  # which refuses what is impossible
    _bare_seconds(lm, [one])
    count = max(FEWEST_BATCHES, math.ceil(SECONDS / _bare_seconds(lm, [one])))
    tokens = torch.randint(lm.vocabulary, (count * size, context), generator=generator)
    rates: dict[str, list[float]] = {"whole": [], "bare": [], "disk": []}
    for number in range(ROUNDS):
        path = folder / str(number)
        layout = prepare(path, contexts_of(tokens.int().numpy()), lm.activation_dim, store=settings)
        began = time.perf_counter()
        write_missing([layout], layout.measured, partial(_read, lm, tokens, layout, size))
        rates["whole"].append(tokens.numel() / (time.perf_counter() - began))
        rates["bare"].append(tokens.numel() / _bare_seconds(lm, tokens.split(size)))
        written = layout.attributes["manifest"]["bytes"]
        rates["disk"].append(written / _disk_seconds(layout, folder / "plain"))
        shutil.rmtree(path)
    return {
        "model": config.model.name,
        "hook_path": lm.hook_path,
        "dtype": config.model.dtype,
        "batch_size": size,
        "context_length": context,
        "tokens": tokens.numel(),
        "bytes_per_token": written / tokens.numel(),
        "tokens_per_second": spread(rates["whole"]),
        "bare_tokens_per_second": spread(rates["bare"]),
        "share_of_bare": spread([whole / bare for whole, bare in zip(rates["whole"], rates["bare"], strict=True)]),
        "disk_bytes_per_second": spread(rates["disk"]),
    }


def _read(
    lm: LanguageModel, tokens: Tensor, layout: StoreLayout, size: int, shard: int, _: Sequence[int]
) -> Iterator[list[Tensor]]:
    rows = layout.geometry.sequences_of(shard)
    batches = tokens[rows.start : rows.stop].split(size)
    return readings([lm], ((batch, torch.full((len(batch),), batch.shape[1])) for batch in batches))


class _There(Exception):
    """The forward pass has come to the place that is read."""


def _bare_seconds(lm: LanguageModel, parts: list[Tensor] | tuple[Tensor, ...]) -> float:
    """Of the forward pass of each part as far as the harvest needs it."""

    def leave(*_: Any) -> None:
        raise _There

    hook = lm.module.get_submodule(lm.hook_path).register_forward_hook(leave)
    try:
        began = time.perf_counter()
        with torch.no_grad():
            for part in parts:
                with suppress(_There):
                    lm.module(input_ids=part.to(lm.device), use_cache=False)
        _wait(lm.device.type)
        return time.perf_counter() - began
    finally:
        hook.remove()


def _disk_seconds(layout: StoreLayout, path: Path) -> float:
    """Of writing the files of a store's shards again, one after another, by nothing but the system."""
    files = [layout.shard(shard).read_bytes() for shard in layout.measured]
    began = time.perf_counter()
    for content in files:
        with path.open("wb", buffering=0) as stream:
            stream.write(content)
            os.fsync(stream.fileno())
    return time.perf_counter() - began


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()
