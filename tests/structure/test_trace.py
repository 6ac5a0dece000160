"""How far one has to walk to follow a training step."""

from __future__ import annotations

import sys
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

import tsae
from tsae.config import run as configuration
from tsae.sae.selection import top_k
from tsae.store.moments import Moments
from tsae.training.trainer import Trainer

PACKAGE = Path(tsae.__file__).parent
DIM, BATCH = 16, 64


@pytest.mark.parametrize("screened", [False, True])
def test_a_default_training_step_passes_ten_files_at_most(screened: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    # As on a processor with matrix units, or as on one without.
    monkeypatch.setattr(top_k, "screens_on_cpu", lambda *_: screened)
    # Some latents are dead by the last step, so that aux-k works.
    training = {"batch_size": BATCH, "dead_after": 2 * BATCH, "steps": 20}
    config = configuration.from_mapping({"sae": {"dict_size": 256, "k": 4}, "training": training}, "test")
    trainer = Trainer(config, DIM, moments=Moments(1, torch.zeros(DIM), torch.full((DIM,), 1 / DIM), 1.0))
    generator = torch.Generator().manual_seed(0)
    for _ in range(12):
        terms = trainer.step(torch.randn(BATCH, 2, DIM, generator=generator))
    assert terms.auxk_loss > 0
    assert terms.threshold > 0
    entered: dict[str, set[str]] = {}

    def profile(frame: FrameType, event: str, _: Any) -> None:
        path = Path(frame.f_code.co_filename)
        if event == "call" and path.is_relative_to(PACKAGE):
            entered.setdefault(str(path.relative_to(PACKAGE)), set()).add(frame.f_code.co_name)

    batch = torch.randn(BATCH, 2, DIM, generator=generator)
    sys.setprofile(profile)
    try:
        trainer.step(batch)
    finally:
        sys.setprofile(None)
    assert "training/trainer.py" in entered
    listed = "\n".join(f"{path}: {', '.join(sorted(names))}" for path, names in sorted(entered.items()))
    assert len(entered) <= 10, listed
