"""Training on a GPU: what a CPU computes, the same bits in every run, and no waiting. `pytest -m gpu` runs these."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tsae.config import run as configuration
from tsae.config.sections import KIND_SETTINGS
from tsae.store.moments import Moments
from tsae.training import resume
from tsae.training.resume import ResumeStates
from tsae.training.trainer import Trainer

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

DIM, BATCH = 64, 128
CASES = [("temporal", preset) for preset in ("predictive", "reference", "scale_free")]
CASES += [(kind, "predictive") for kind in KIND_SETTINGS if kind != "temporal"]


def trained(
    kind: str, preset: str, device: str, steps: int = 20, cuda_graphs: bool = True
) -> tuple[list[float], Trainer]:
    objective = {"preset": preset} if kind == "temporal" else {}
    training = {"batch_size": BATCH, "steps": 400, "dead_after": 5 * BATCH, "cuda_graphs": cuda_graphs}
    tree = {"sae": {"kind": kind, "dict_size": 1024, "k": 8}, "objective": objective, "training": training}
    moments = Moments(1, torch.zeros(DIM), torch.full((DIM,), 1 / DIM), 1.0)
    built = Trainer(configuration.from_mapping(tree, "test"), DIM, device=device, moments=moments)
    generator, losses = torch.Generator().manual_seed(0), []
    for step in range(steps):
        batch = torch.randn(BATCH, 1, DIM, generator=generator) + torch.randn(BATCH, 2, DIM, generator=generator)
        batch = batch.to(device)
        # The first step checks that the temporal term acts, or finds the first weight of a penalty.
        torch.cuda.set_sync_debug_mode("error" if step and device == "cuda" else "default")
        try:
            loss = built.step(batch).loss
        finally:
            torch.cuda.set_sync_debug_mode("default")
        losses.append(float(loss))
    return losses, built


@pytest.mark.parametrize(("kind", "preset"), CASES)
def test_a_gpu_trains_without_waiting_as_a_cpu_does(kind: str, preset: str) -> None:
    (expected, _), (found, one), (again, other) = (trained(kind, preset, where) for where in ("cpu", "cuda", "cuda"))
    assert found == pytest.approx(expected, rel=2e-3)
    assert found == again
    for name, value in one.dictionary.state_dict().items():
        assert torch.equal(value, other.dictionary.state_dict()[name]), name


@pytest.mark.parametrize(("kind", "preset"), [case for case in CASES if not KIND_SETTINGS[case[0]].penalised])
def test_what_is_recorded_is_what_runs_and_gives_the_same_bits(
    kind: str, preset: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    launches = 0
    replay = torch.cuda.CUDAGraph.replay

    def counted(graph: torch.cuda.CUDAGraph) -> None:
        nonlocal launches
        launches += 1
        replay(graph)

    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", counted)
    (found, one), before = trained(kind, preset, "cuda", steps=60), launches
    (expected, other) = trained(kind, preset, "cuda", steps=60, cuda_graphs=False)
    assert before == launches > 4 * 30  # the other run launched none
    assert found == expected
    assert not caplog.records
    for name, value in one.dictionary.state_dict().items():
        assert torch.equal(value, other.dictionary.state_dict()[name]), name


@pytest.mark.parametrize("room", [resume.MOST_OF_FREE, 0.0])
def test_a_state_is_that_of_its_step_whatever_is_trained_meanwhile(
    room: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resume, "MOST_OF_FREE", room)
    weights, states = torch.randn(4096, 4096, device="cuda"), ResumeStates(tmp_path, {}, keep=1)
    for step in range(1, 4):
        weights @= weights.clone()  # what is still under way belongs to the state
        states.save(step, {"trainer": {"weights": weights, "step": step}}, first=lambda: None)
        expected = weights.clone()
        for _ in range(100):
            weights.add_(1)
        states.wait()
        state = ResumeStates(tmp_path, {}, keep=1).load()
        assert state is not None
        assert torch.equal(state["trainer"]["weights"], expected.cpu())
        weights.div_(weights.norm())
