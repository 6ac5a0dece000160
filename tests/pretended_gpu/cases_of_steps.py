"""Steps of every kind on a GPU that is not there, through the kernels; `test_pretended_gpu.py` runs this file."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from tests.pretended_gpu.order import Order, Race, Waits
from tests.pretended_gpu.places import Misplaced, storage_of
from tests.training.device_cases import BATCH, CASES, batches, trainer
from tsae.sae.selection.top_k import Encoder
from tsae.training import recorded


@pytest.mark.parametrize(("kind", "objective"), CASES)
def test_a_step_and_codes_lie_where_they_should(kind: str, objective: dict[str, Any]) -> None:
    built = trainer(kind, objective, device="cuda", cuda_graphs=False)
    document = (torch.arange(BATCH) // 2).to("cuda")
    for batch in batches():
        terms = built.step(batch.to("cuda"), document)
    assert terms.loss.isfinite()
    for there, here in zip(terms, terms.on_host(), strict=True):
        if isinstance(there, torch.Tensor):
            assert torch.equal(there.cpu(), here)
            assert there.dtype == here.dtype
        else:
            assert there == here
    assert all(value.is_cuda for value in built.dictionary.parameters())
    x = batches(1)[0][:, 0].to("cuda")
    codes = built.dictionary.encode(x)
    assert codes.is_cuda
    assert built.dictionary.decode(codes).is_cuda


@pytest.mark.parametrize(
    ("kind", "objective"), [("temporal", {}), ("temporal", {"preset": "scale_free"}), ("topk", {})]
)
def test_what_is_recorded_waits_for_nothing(
    kind: str, objective: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(recorded, "EAGER", 1)
    launched, launch = [], torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: launched.append(graph) or launch(graph))
    built = trainer(kind, objective, device="cuda")
    document = (torch.arange(BATCH) // 2).to("cuda")
    for batch in batches(8):
        if guesses := built.engine.state()["guesses"]:  # none too high, so that no step is made again, as it stands
            built.engine.load_state({"guesses": [0.0 for _ in guesses]})
        built.step(batch.to("cuda"), document)
    assert len(set(launched)) >= 4
    assert not caplog.records


def test_what_cannot_be_recorded_runs_where_it_did_before(caplog: pytest.LogCaptureFixture) -> None:
    device, there = torch.device("cuda"), torch.ones(2, device="cuda")
    recordings = recorded.Recordings(recorded.on_cuda(device))
    for _ in range(recorded.EAGER):
        assert recordings.of("kind") is None
    before, part = torch.cuda.current_stream(device).number, recordings.of("kind")
    assert part is not None
    assert part.run("reads", lambda: there.sum().item()) == 2.0
    assert torch.cuda.current_stream(device).number == before
    assert "without CUDA graphs" in caplog.text


def test_memory_that_a_recorded_step_may_write_to_stays() -> None:
    encoder, weight = Encoder("float32"), torch.ones(4, 64, device="cuda")
    scratch = StorageWeakRef(storage_of(encoder.product(torch.ones(2, 4, device="cuda"), weight)))
    encoder.product(torch.ones(9, 4, device="cuda"), weight)
    assert not scratch.expired()


def test_what_a_gpu_would_refuse_is_refused(order: Order) -> None:
    there, here = torch.ones(2, device="cuda"), torch.ones(2)
    assert (there + torch.tensor(1.0)).is_cuda
    assert not there.cpu().is_cuda
    with pytest.raises(Misplaced, match="add"):
        there + here
    with pytest.raises(Misplaced, match="numpy"):
        there.numpy()
    with order.recording():
        for wait in (there.tolist, there[0].item, lambda: torch.tensor([1.0], device="cuda"), there.nonzero):
            with pytest.raises(Waits):
                wait()


def test_a_gradient_goes_back_to_the_place_of_what_it_is_of() -> None:
    weights = torch.ones(2, requires_grad=True)
    (3 * weights.to("cuda")).sum().backward()
    assert weights.grad is not None
    assert not weights.grad.is_cuda
    assert weights.grad.tolist() == [3.0, 3.0]


def test_what_nothing_orders_is_refused() -> None:
    stream = torch.cuda.Stream()
    there = torch.ones(2, device="cuda") + 1
    with torch.cuda.stream(stream):
        with pytest.raises(Race, match="mul does not wait for aten::add"):
            there * 2
        stream.wait_stream(torch.cuda.default_stream())
        there * 2
    with pytest.raises(Race, match="add_ does not wait for aten::mul"):
        there.add_(1)
    stream.synchronize()
    there.add_(1)
    pinned = torch.empty(2, pin_memory=True).copy_(there, non_blocking=True)
    with pytest.raises(Race, match="numpy does not wait for a copy"):
        pinned.numpy()
    torch.cuda.current_stream().synchronize()
    assert pinned.numpy().tolist() == there.tolist()
