"""How long work takes, from a few seconds of it on this machine: a language model's reading, and steps of training."""

from __future__ import annotations

import dataclasses
import socket
import time
from collections.abc import Callable, Sequence

from tsae.config import schema
from tsae.config.run import RunConfig
from tsae.config.sections import KIND_SETTINGS
from tsae.lm.size import size_of
from tsae.lm.source import in_cache, local_path
from tsae.runtime.errors import TsaeError
from tsae.sweep.cost import Work, store_of

SECONDS = 3.0
"""Of each rate."""


def probe(works: Sequence[Work]) -> list[str]:
    """Lines that say how long the harvests and trainings of `works` would take one after another, at the rates of now.

    Raises TsaeError for a language model that is not on this machine.
    """
    lines, rates, total = [], dict[str, float](), 0.0
    for work in works:
        config = work.config
        if work.kind == "harvest" and not config.without_text:
            store, key = store_of(config), schema.stable_hash(schema.to_plain(config.model))
            rates[key] = rates.get(key) or _tokens_per_second(config)
            share = store.missing / max(1, store.bytes) if store else 1
            tokens = round(store.positions * share) if store else None
            lines.append(f"harvest: {rates[key]:,.0f} tokens/s{_duration(tokens and tokens / rates[key])}")
            total += tokens / rates[key] if tokens else 0
        elif work.kind == "train":
            shape = dataclasses.replace(config.training, steps=2, seed=0, save_steps=(), trackers=())
            key = schema.stable_hash([schema.to_plain(part) for part in (config.sae, config.objective, shape)])
            rates[key] = rates.get(key) or _steps_per_second(config)
            seconds = config.training.steps / rates[key]
            lines.append(f"train {work.folder.parent.name}: {1 / rates[key]:.3g} s a step{_duration(seconds)}")
            total += seconds
    lines = list(dict.fromkeys(lines))
    return [*lines, f"probed on {socket.gethostname()}, one after another: {_words(total)}"]


def _duration(seconds: float | None) -> str:
    return f", {_words(seconds)}" if seconds else ""


def _words(seconds: float) -> str:
    """Seconds as people say them."""
    for unit, name in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * unit or (unit == 3600 and seconds >= unit):
            return f"{seconds / unit:.1f} {name}"
    return f"{seconds:.0f} s"


def _tokens_per_second(config: RunConfig) -> float:
    """Of the language model, on batches as a harvest reads them."""
    import torch

    from tsae.lm.model import load_language_model

    if local_path(config.model) is None and in_cache(config.model) is None:
        raise TsaeError(
            f"--probe: {config.model.name} is not on this machine; fetch it first: hf download {config.model.name}"
        )
    lm = load_language_model(config.model)
    shape = (config.model.batch_size, config.data.context_length)
    tokens = torch.randint(lm.vocabulary, shape, generator=torch.Generator().manual_seed(0))
    lengths = torch.full(shape[:1], shape[1])
    return tokens.numel() * _per_second(lambda: lm.read(tokens, lengths).sum().item())


def _steps_per_second(config: RunConfig) -> float:
    """Of a training step on random activations."""
    import torch
    from accelerate import Accelerator

    from tsae.store.moments import Moments
    from tsae.training.trainer import Trainer

    store, size = store_of(config), size_of(config.model)
    width = store.width if store else size.width if size else None
    if width is None:
        raise TsaeError(
            f"--probe: {config.model.name} is not on this machine; fetch it first: hf download {config.model.name}"
        )
    device = Accelerator(cpu=config.training.device == "cpu").device
    moments = Moments(1, torch.zeros(width), torch.ones(width, dtype=torch.float64), float(width))
    trainer = Trainer(config, width, device=device, moments=moments)
    pairs = (2, width) if KIND_SETTINGS[config.sae.kind].temporal else (width,)
    batch = torch.randn(config.training.batch_size, *pairs, generator=torch.Generator().manual_seed(0)).to(device)
    document = torch.arange(config.training.batch_size, device=device)
    return _per_second(lambda: float(trainer.step(batch, document).loss))


def _per_second(work: Callable[[], object]) -> float:
    """How often `work` is done in a second, after once for warming up."""
    work()
    began, done = time.perf_counter(), 0
    while (passed := time.perf_counter() - began) < SECONDS:
        work()
        done += 1
    return done / passed if done else 1 / passed
