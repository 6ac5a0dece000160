"""What every line says of each split, and when a training warns of one."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch

from tsae.config import run as configuration
from tsae.config.run import RunConfig
from tsae.training.metrics import living, measures_of
from tsae.training.splits import last_line, trouble, window
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


def config_of(kind: str, fraction: float = 0.2, preset: str = "scale_free") -> RunConfig:
    sae = {"kind": kind, "dict_size": 1000, "k": 20, "split_fraction": fraction}
    return configuration.from_mapping({"sae": sae, "objective": preset}, "test")


def line_of(alive: list[float], shares: list[float], fve: list[float], tokens: int = 10**6) -> dict[str, float]:
    values = {"alive": alive, "share": shares, "fve": fve}
    named = {f"{name}_{group}": value for name, each in values.items() for group, value in enumerate(each)}
    return {"step": 9, "tokens": tokens, **named}


STRONG, WEAK, RATE = "lower objective.temporal_alpha", "raise objective.temporal_alpha", "lower training.lr"


@pytest.mark.parametrize(
    ("kind", "alive", "shares", "fve", "told"),
    [
        # As on SmolLM2-135M: runs that read well ...
        ("temporal", [0.91, 1.0], [0.45, 0.55], [0.40, 0.4], []),
        ("temporal", [1.0, 0.98], [0.69, 0.31], [0.67, 0.2], []),
        ("matryoshka", [1.0, 0.99], [0.78, 0.22], [0.72, 0.1], []),
        # ... a good one on a world with few slow features ...
        ("temporal", [1.0, 0.77], [0.28, 0.72], [0.07, 0.6], []),
        # ... and those that lost their high-level split, or whose split did not keep anything out.
        (
            "temporal",
            [0.34, 1.0],
            [0.12, 0.88],
            [0.09, 0.7],
            ["(group 0) is 34% alive, has 12% of the activity with 20% of the latents, explains 0.09 of", STRONG],
        ),
        (
            "temporal",
            [0.47, 1.0],
            [0.2, 0.8],
            [0.09, 0.7],
            ["the high-level split (group 0) is 47% alive, exp", STRONG],
        ),
        ("temporal", [0.98, 1.0], [0.04, 0.96], [0.05, 0.7], ["the high-level split (group 0) has 4%", STRONG]),
        ("temporal", [1.0, 0.98], [0.86, 0.14], [0.75, 0.1], ["the high-level split (group 0) has 86%", WEAK]),
        (
            "temporal",
            [0.3, 0.4],
            [0.3, 0.7],
            [0.2, 0.3],
            ["(group 0) is 30%", "the low-level split (group 1) is 40%", RATE],
        ),
        ("matryoshka", [1.0, 0.2], [0.7, 0.3], [0.7, 0.1], ["the low-level split (group 1) is 20% alive", RATE]),
        (
            "matryoshka",
            [1.0, 1.0],
            [0.95, 0.05],
            [0.7, 0.1],
            ["the low-level split (group 1) has 5%", "group_weights"],
        ),
        ("batch_topk", [0.33], [], [], ["the dictionary is 33% alive; lower training.lr"]),
        ("batch_topk", [0.97], [], [], []),
    ],
)
def test_a_split_that_is_unwell_is_named_with_the_setting_that_changes_it(
    kind: str, alive: list[float], shares: list[float], fve: list[float], told: list[str]
) -> None:
    found = trouble(line_of(alive, shares, fve), config_of(kind))
    assert (found is None) == (not told)
    assert all(part in str(found) for part in told)
    assert "\n" not in str(found)


@pytest.mark.parametrize(
    ("alive", "share", "told"),
    [
        ([0.9, 0.9], 0.33, ""),
        ([0.9, 0.9], 0.1, "has 10% of the activity with 20% of the latents; raise objective.high_share"),
        ([0.9, 0.9], 0.9, "has 90% of the activity with 20% of the latents; lower objective.high_share"),
        ([0.5, 0.9], 0.33, "is 50% alive; the temporal term is too strong: lower objective.temporal_alpha"),
    ],
)
def test_where_active_latents_are_reserved_their_share_is_what_to_change(
    alive: list[float], share: float, told: str
) -> None:
    found = trouble(line_of(alive, [share, 1 - share], []), config_of("temporal", preset="predictive"))
    assert str(found or "").removeprefix("the high-level split (group 0) ").startswith(told)
    assert bool(found) == bool(told)


def test_a_share_of_k_is_measured_by_itself_and_not_by_the_latents() -> None:
    config = config_of("temporal", 0.5, "predictive")
    assert trouble(line_of([0.9, 0.9], [0.18, 0.82], []), config) is None
    assert "has 14% of the activity" in str(trouble(line_of([0.9, 0.9], [0.14, 0.86], []), config))


@pytest.mark.parametrize(("share", "unwell"), [(0.83, True), (0.82, False), (0.31, False), (0.22, True)])
def test_shares_are_held_against_those_of_the_latents(share: float, unwell: bool) -> None:
    line = line_of([1.0, 1.0], [share, 1 - share], [])
    assert bool(trouble(line, config_of("temporal", fraction=0.3))) == unwell
    assert trouble(line, config_of("matryoshka", fraction=0.3)) is None


def test_being_alive_is_judged_once_every_latent_has_had_its_chance() -> None:
    config = config_of("temporal")
    dying = [[0.3, 1.0], [0.4, 0.6], [0.3, 0.7]]
    assert window(config) == 100 * 1000 // 20
    assert trouble(line_of(*dying, tokens=window(config) - 1), config) is None
    assert trouble(line_of(*dying, tokens=window(config)), config) is not None


def test_lines_of_older_versions_are_read(tmp_path: Path) -> None:
    config, path = config_of("temporal"), tmp_path / "metrics.jsonl"
    assert last_line(path) == {}
    path.write_text("")
    assert trouble(last_line(path), config) is None
    before = {"step": 0, "tokens": 10**6, "share_0": 0.5, "share_1": 0.5}
    after = before | {"share_0": 0.02, "share_1": 0.98}
    path.write_text(json.dumps(before) + "\n" + json.dumps(after) + "\n" + json.dumps(before)[:20])
    assert last_line(path) == after
    assert str(trouble(last_line(path), config)).startswith(
        "the high-level split (group 0) has 2% of the activity with 20% of the latents; the temporal term is too strong"
    )
