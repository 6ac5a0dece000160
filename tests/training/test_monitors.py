"""What every line says of each split, and when a training warns of one."""

from __future__ import annotations

import copy

import pytest
import torch

from tsae.config import run as configuration
from tsae.training.metrics import living, measures_of
from tsae.training.trainer import Trainer

BATCH, DIM = 48, 12


def trainer(kind: str, engine: str, fractions: list[float]) -> Trainer:
    tree = {
        "sae": {"kind": kind, "dict_size": 60, "k": 4, "group_fractions": fractions},
        "training": {"engine": engine, "warmup_steps": 0, "lr": 0.01, "batch_size": BATCH, "normalize": "none"},
    }
    return Trainer(configuration.from_mapping(tree, "test"), DIM)


@pytest.mark.parametrize("engine", ["dense", "sparse"])
@pytest.mark.parametrize(
    ("kind", "fractions"),
    [("temporal", [0.2, 0.8]), ("temporal", [0.1, 0.3, 0.6]), ("matryoshka", [0.5, 0.5])],
)
def test_a_line_says_what_each_split_explains_alone_and_how_many_of_its_latents_fire(
    kind: str, fractions: list[float], engine: str
) -> None:
    built = trainer(kind, engine, fractions)
    generator = torch.Generator().manual_seed(0)
    batches = torch.randn(4, BATCH, 1, DIM, generator=generator) + torch.randn(4, BATCH, 2, DIM, generator=generator)
    for batch in batches[:3]:
        built.step(batch)
    before, x = copy.deepcopy(built.dictionary), batches[3, :, 0]
    line = measures_of(3, built.step(batches[3]), built.config, living(built))

    code = before.keep_largest(torch.relu(before.pre_activations(x))).detach()
    variance = (x - x.mean(dim=0)).square().sum()
    for group, latents in enumerate(before.group_slices):
        own = torch.zeros_like(code)
        own[:, latents] = code[:, latents]
        explained = 1 - (x - before.decode(own)).detach().square().sum() / variance
        assert line[f"fve_{group}"] == pytest.approx(float(explained), rel=1e-4)
        assert line[f"l0_{group}"] == pytest.approx(float((own > 0).sum() / BATCH), rel=1e-6)
        assert line[f"share_{group}"] == pytest.approx(float(own.sum() / code.sum()), rel=1e-5)
    assert sum(line[f"l0_{group}"] for group in range(len(fractions))) == pytest.approx(line["l0"]) == 4
    assert f"fve_{len(fractions)}" not in line


def test_a_dictionary_without_splits_has_no_numbers_of_them() -> None:
    built = trainer("batch_topk", "sparse", [0.2, 0.8])
    line = measures_of(0, built.step(torch.randn(BATCH, DIM)), built.config, living(built))
    assert not {"fve_0", "l0_0", "share_0"} & line.keys()
    assert {"fve", "l0", "alive_0"} <= line.keys()
