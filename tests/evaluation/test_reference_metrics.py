"""Measures against numbers recorded from the reference implementation (tests/golden)."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tsae.evaluation.results import ALL, FIRST_GROUP, HIGH, LOW, SECOND_GROUP, summarise
from tsae.evaluation.scores import Scores
from tsae.evaluation.smoothness import active_code, in_reference, latents_of, smoothness, split_ranges
from tsae.sae.dictionary import Dictionary
from tsae.sae.kinds import from_state

GOLDEN = Path(__file__).parents[1] / "golden"
RUNS = {
    "temporal_contrastive_w": ("TemporalMatryoshkaBatchTopKSAE", (25, 103)),
    "matryoshka_w": ("MatryoshkaBatchTopKSAE", (25, 103)),
    "batchtopk": ("BatchTopKSAE", (128,)),
    "temporal_contrastive_3groups": ("TemporalMatryoshkaBatchTopKSAE", (25, 38, 65)),
}
MEASURES = {
    "lipschitz_cont": "lipschitz",
    "fft_smoothness": "fft",
    "wavelet_smoothness": "wavelet",
    "multiscale_smoothness": "multiscale",
}
TOLERANCE = 2e-6


@pytest.fixture(scope="module")
def recorded() -> dict[str, Any]:
    return json.loads((GOLDEN / "metrics.json").read_text())


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "metrics.safetensors")


def dictionary(run: str) -> Dictionary:
    prefix = "after30."
    state = {
        name.removeprefix(prefix): tensor
        for name, tensor in load_file(GOLDEN / f"{run}.safetensors").items()
        if name.startswith(prefix) and not name.endswith("num_tokens_since_fired")
    }
    return from_state(RUNS[run][0], state, None, run)


def numbers(recorded_value: Any) -> list[float]:
    values = recorded_value if isinstance(recorded_value, list) else [recorded_value]
    return [float(value) for value in values]


@pytest.mark.parametrize("codes", ["sae", "random"])
@pytest.mark.parametrize("length", [64, 33, 9, 2])
@pytest.mark.parametrize("run", RUNS)
def test_smoothness_of_one_context_is_the_references(
    recorded: dict[str, Any], tensors: dict[str, torch.Tensor], run: str, length: int, codes: str
) -> None:
    sizes = RUNS[run][1]
    code = active_code(tensors[f"{run}.{codes}.f"][:length])
    measured = in_reference(latents_of(code, tensors["ctx"][0, :length]), code.slices(split_ranges(sizes)))
    expected = recorded[f"{run}.T{length}.{codes}"]

    several = len(sizes) > 1
    places = [HIGH, LOW] if several else [ALL]
    variation = numbers(expected["smoothness_tv"])[: len(places)]
    assert measured.total_variation[places].tolist() == pytest.approx(variation, rel=TOLERANCE)
    places = [ALL, FIRST_GROUP, SECOND_GROUP] if several else [ALL]
    for reference_name, name in MEASURES.items():
        values = numbers(expected[reference_name])[: len(places)]
        assert getattr(measured, name)[places].tolist() == pytest.approx(values, rel=TOLERANCE, nan_ok=True), name


@pytest.mark.parametrize("length", [64, 33])
@pytest.mark.parametrize("run", RUNS)
def test_results_of_several_contexts_are_the_references(
    recorded: dict[str, Any], tensors: dict[str, torch.Tensor], run: str, length: int
) -> None:
    scores = Scores(dictionary(run))
    # Batches of unequal numbers of contexts: the cut must not matter.
    contexts = tensors["ctx"][:, :length]
    scores.add(contexts[:2].reshape(2 * length, -1), [length, length], [0, 1])
    scores.add(contexts[2], [length], [2])
    results = summarise(scores)
    expected = recorded[f"{run}.evaluate.T{length}"]

    # Explained variance is 1 minus a ratio: near 0 only the ratio's own rounding (1e-7) can be asked for.
    assert results["reference"] == pytest.approx(expected, rel=TOLERANCE, abs=1e-7)
    assert set(expected) <= set(results)
    for name, value in expected.items():
        second_group_only = len(RUNS[run][1]) == 3 and name.endswith(("_l", "_low"))
        if len(RUNS[run][1]) == 1 and name.endswith(("_h", "_l", "_high", "_low")):
            assert results[name] is None, "one group has no splits"
        elif not second_group_only:
            assert results[name] == pytest.approx(value, rel=TOLERANCE, abs=1e-7), name
    if len(RUNS[run][1]) == 3:
        # Total variation is the one measure of which the reference sums all groups but the first.
        assert results["smoothness_tv_l"] == pytest.approx(expected["smoothness_tv_l"], rel=TOLERANCE)
        for name in ("lipschitz_cont", "fft", "wavelet", "multiscale"):
            assert results[f"{name}_group"][1] == pytest.approx(expected[f"{name}_l"], rel=TOLERANCE)


def test_silent_group_is_undefined_where_the_reference_raises(
    recorded: dict[str, Any], tensors: dict[str, torch.Tensor]
) -> None:
    measured = smoothness(active_code(tensors["edge.group1_silent.f"]), tensors["ctx"][0], split_ranges((25, 103)))
    expected = recorded["edge.group1_silent"]

    assert expected["fft_smoothness"] == "raises RuntimeError"
    for name in ("lipschitz", "fft", "wavelet", "multiscale", "relative_variation"):
        values = getattr(measured, name)
        assert math.isnan(values[LOW])
        assert values[ALL] == values[HIGH]
        assert math.isfinite(values[HIGH])
    assert measured.total_variation[[HIGH, LOW]].tolist() == pytest.approx(numbers(expected["smoothness_tv"]))
    assert measured.lipschitz[HIGH] == pytest.approx(numbers(expected["lipschitz_cont"])[1], rel=TOLERANCE)
    assert measured.multiscale[HIGH] == pytest.approx(numbers(expected["multiscale_smoothness"])[1], rel=TOLERANCE)
