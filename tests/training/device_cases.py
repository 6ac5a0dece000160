"""Steps as a GPU takes them, through the kernels' branches; `test_device_step.py` runs this file in Triton's interpreter.

After the first step, which may look whether the temporal term acts at all, nothing is read back: see `device_watch.py`.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.interpreter import quicken
from tests.training import emulated_graphs
from tests.training.device_watch import Reads, Watch
from tests.training.recorded import record_gradients
from tsae.config import run as configuration
from tsae.config.sections import KIND_SETTINGS
from tsae.sae import sparse
from tsae.sae.kernels import candidates
from tsae.store.moments import Moments
from tsae.training import recorded as recorded_steps
from tsae.training.recorded import Recordings
from tsae.training.trainer import Terms, Trainer

quicken()
DIM, BATCH, STEPS = 8, 4, 3
SPLIT = {"group_fractions": [0.25, 0.5, 0.25]}
TEMPORAL: list[dict[str, Any]] = [
    {},
    {"preset": "reference"},
    {"preset": "scale_free"},
    {"preset": "scale_free", "temporal": "linear"},
    {"preset": "reference", "temporal": "l1"},
    {"preset": "scale_free", "temporal": "l2"},
    {"preset": "scale_free", "same_document": False},
]
LAUNCHES = {"temporal": 270, "matryoshka": 190, "batch_topk": 190, "topk": 200}
"""What a step may launch at most, 140 where nothing is said, of which recording its gradients takes up to 20."""
CASES = [("temporal", objective) for objective in TEMPORAL] + [
    (kind, {}) for kind in KIND_SETTINGS if kind != "temporal"
]


def trainer(kind: str, objective: dict[str, Any], device: str = "cpu", **training: Any) -> Trainer:
    sae = {"kind": kind, "dict_size": 24, "k": 3, **(SPLIT if kind in ("temporal", "matryoshka") else {})}
    # Some latents are dead by the last step, so that aux-k works; the thresholds are tracked.
    given = {"batch_size": BATCH, "dead_after": 2 * BATCH, "steps": 40, "threshold_start_step": 0, "warmup_steps": 1}
    tree = {"sae": sae, "objective": objective, "training": given | {"lr": 0.003} | training}
    moments = Moments(1, torch.zeros(DIM), torch.full((DIM,), 1 / DIM), 1.0)
    return Trainer(configuration.from_mapping(tree, "test"), DIM, device=device, moments=moments)


def batches(steps: int = STEPS) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(steps, BATCH, 1, DIM, generator=generator)
    return list(shared + torch.randn(steps, BATCH, 2, DIM, generator=generator))


def watch(built: Trainer) -> Watch:
    return Watch(strict=True, host=host(built))


def host(built: Trainer) -> list[Tensor]:
    return [each for each in built.dictionary.buffers() if not each.is_floating_point()]


def assert_near(found: Terms, expected: Terms) -> None:
    for name, value in expected._asdict().items():
        other = torch.as_tensor(found._asdict()[name])
        torch.testing.assert_close(other, torch.as_tensor(value), rtol=2e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize(("kind", "objective"), CASES)
def test_a_step_reads_nothing_back_and_is_that_of_a_cpu(
    kind: str, objective: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = [trainer(kind, objective) for _ in range(2)]
    gradients = [record_gradients(built) for built in pair]
    document = torch.arange(BATCH) // 2
    for batch in batches():
        watched = watch(pair[0])
        if pair[0].steps_done == 0:
            found = pair[0].step(batch, document)
        else:
            last = pair[0].steps_done == STEPS - 1
            if last and (state := pair[0].engine.state()).get("guesses"):
                pair[0].engine.load_state({"guesses": [0.0 for _ in state["guesses"]]})  # never too high
            with watched.watching():
                found = pair[0].step(batch, document)
            assert not watched.copies, watched.copies
            assert not last or watched.launched <= LAUNCHES.get(kind, 140), watched.launches
        with monkeypatch.context() as patched:
            patched.setattr(sparse, "interpreted", lambda: False)
            expected = pair[1].step(batch, document)
        assert_near(found, expected)
        for name, gradient in gradients[1].items():
            assert (gradients[0][name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-6, name
        assert torch.equal(*(built.tokens_since_fired for built in pair))
        pair[1].dictionary.load_state_dict(pair[0].dictionary.state_dict())
    assert found.auxk_loss > 0 or kind in ("jump_relu", "standard", "standard_april")


@pytest.mark.parametrize(
    ("kind", "objective"), [("temporal", {}), ("temporal", {"preset": "scale_free"}), ("topk", {})]
)
def test_a_recorded_step_is_few_launches_and_the_same_bits(
    kind: str, objective: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorded_steps, "EAGER", 1)
    plain, recorded = (trainer(kind, objective) for _ in range(2))
    recorded.recordings = Recordings(partial(emulated_graphs.record, host=host(recorded)))
    document = torch.arange(BATCH) // 2
    counts = []
    for step, batch in enumerate(batches(8)):
        guess = 30.0 if step == 3 else 0.0  # too high: what was recorded is made again as it stands
        for built in (plain, recorded):
            built.engine.load_state({"guesses": [guess for _ in built.engine.state()["guesses"]]})
        emulated_graphs.log.clear()
        watched = watch(recorded)
        if step:
            with watched.watching():
                found = recorded.step(batch, document)
        else:
            found = recorded.step(batch, document)
        if emulated_graphs.log == ["launched"] * 4:
            counts.append(4 + watched.launched)
        expected = plain.step(batch, document)
        for name, value in expected._asdict().items():
            assert torch.equal(torch.as_tensor(found._asdict()[name]), torch.as_tensor(value)), (step, name)
    assert found.auxk_loss > 0
    for (name, value), other in zip(flat(plain.state()), flat(recorded.state()), strict=True):
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(other[1])), name
    # Of what is launched one by one most is the update, to which the host gives a learning rate each time.
    assert counts
    assert max(counts) <= 25
    gc.collect()
    gc.disable()  # a GPU's memory is wanted before Python comes to look for cycles
    weights = weakref.ref(recorded.dictionary.W_enc)
    del recorded, built, watched
    gone = weights() is None
    gc.enable()
    assert gone


def flat(state: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """The numbers and tensors of a state, with their names."""
    if isinstance(state, dict | list | tuple):
        for key, value in state.items() if isinstance(state, dict) else enumerate(state):
            yield from flat(value, f"{name}.{key}")
    elif state is not None:
        yield name, state


def test_a_list_too_short_and_a_guess_too_high_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    def trained(guess: float | None, room: int) -> tuple[Trainer, int]:
        monkeypatch.setattr(candidates, "FIRST_ROOM", room)
        built, late = trainer("temporal", {"preset": "scale_free"}), 0
        for batch in batches():
            state = built.engine.state()["guesses"]
            if guess is not None:
                built.engine.load_state({"guesses": [guess for _ in state]})
            watched = watch(built)
            with watched.watching() if built.steps_done else monkeypatch.context():
                built.step(batch)
            late += sum(watched.late.values())
        return built, late

    plain, few = trained(None, 64)
    for guess, room in [(30.0, 64), (0.0, 1)]:
        other, many = trained(guess, room)
        assert many > few
        for name, value in plain.dictionary.state_dict().items():
            assert torch.equal(other.dictionary.state_dict()[name], value), name


def test_the_watch_sees_what_is_read() -> None:
    x = torch.arange(4.0)
    with Watch(strict=True).watching():
        for read in (
            lambda: float(x[0]),
            lambda: bool(x[0] > 1),
            lambda: x.tolist(),
            lambda: x.nonzero(),
            lambda: x[x > 1],
            lambda: x.masked_select(x > 1),
            lambda: x.unique(),
            lambda: torch.repeat_interleave(x, torch.tensor([1, 2, 1, 0])),
            lambda: x[: x[1].long()],
            lambda: torch.equal(x, x),
        ):
            with pytest.raises(Reads):
                read()
    watched = Watch(strict=True)
    with watched.watching():
        (x.view(2, 2).T + 1).sum()
    assert watched.launched == 2
