"""Which steps are recorded, and what happens where that fails; what a recorded step does is in `device_cases.py`."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tsae.runtime import phases
from tsae.training.recorded import EAGER, MOST, Recording, Recordings


def counting(found: list[str]) -> Callable[[Callable[[], Any]], Recording]:
    def record(part: Callable[[], Any]) -> Recording:
        found.append("recorded")
        return part(), lambda: found.append("launched")

    return record


def test_a_kind_of_step_is_recorded_when_it_has_been_met() -> None:
    found: list[str] = []
    recordings = Recordings(counting(found))
    for number in range(EAGER + 3):
        recorded = recordings.of("kind")
        assert (recorded is None) == (number < EAGER)
        assert recorded is None or recorded.run("part", lambda number=number: number) == EAGER
        assert recordings.of(None) is None
    assert found == ["recorded", "launched", "launched", "launched"]
    with phases.record(lambda: 0.0):
        assert recordings.of("kind") is None


def test_what_is_not_of_every_step_is_recorded_when_it_has_run() -> None:
    found: list[str] = []
    recordings = Recordings(counting(found))
    for _ in range(EAGER):
        assert recordings.of("kind") is None
    recorded = recordings.of("kind")
    assert recorded is not None
    told = [recorded.run("tell", lambda number=number: number, always=False) for number in range(EAGER + 2)]
    assert told == [*range(EAGER), EAGER, EAGER]
    assert found == ["recorded", "launched", "launched"]


def test_what_a_step_is_given_lies_in_one_place() -> None:
    recordings = Recordings(counting([]))
    for _ in range(EAGER):
        assert recordings.of("kind") is None
    places = set()
    for number in range(3):
        given = torch.full((3,), float(number))
        recorded = recordings.of("kind")
        assert recorded is not None
        placed = recorded.fixed("batch", given)
        assert torch.equal(placed, given)
        assert placed is not given
        given.zero_()  # whoever gave it may use it for something else
        assert torch.equal(placed, torch.full((3,), float(number)))
        places.add(placed.data_ptr())
    assert len(places) == 1


def test_of_too_many_kinds_the_one_that_was_met_least_recently_is_recorded_again() -> None:
    found: list[str] = []
    recordings = Recordings(counting(found))
    for kind in (*range(MOST), 0, MOST, 0, 1):
        for _ in range(EAGER + 1):
            recorded = recordings.of(kind)
        assert recorded is not None
        recorded.run("part", lambda: 1)
    assert found.count("recorded") == MOST + 2


def test_where_nothing_can_be_recorded_steps_run_as_they_stand(caplog: pytest.LogCaptureFixture) -> None:
    tries = []

    def record(part: Callable[[], Any]) -> Recording:
        tries.append(part)
        raise RuntimeError("operation not permitted when stream is capturing")

    recordings = Recordings(record)
    for _ in range(EAGER):
        assert recordings.of("kind") is None
    recorded = recordings.of("kind")
    assert recorded is not None
    assert [recorded.run(name, lambda: 5) for name in ("one", "two")] == [5, 5]
    assert recordings.of("kind") is None
    assert len(tries) == 1
    assert "without CUDA graphs" in caplog.text
    assert "not permitted" in caplog.text


@pytest.mark.parametrize("end", ["their trainer is gone", "another cannot be recorded"])
def test_what_recordings_keep_is_free_when(end: str) -> None:
    def record(part: Callable[[], Any]) -> Recording:
        if (result := part()) == 5:
            raise RuntimeError("operation not permitted when stream is capturing")
        return result, lambda: None

    recordings = Recordings(record)
    for _ in range(EAGER + 1):
        recorded = recordings.of("kind")
    assert recorded is not None
    kept = weakref.ref(recorded.run("part", lambda: torch.ones(())))
    assert kept() is not None
    gc.disable()  # a GPU's memory is wanted before Python comes to look for cycles
    try:
        del recorded
        if end == "their trainer is gone":
            del recordings
        else:
            for _ in range(EAGER + 1):
                failing = recordings.of("another")
            assert failing is not None
            assert failing.run("fails", lambda: 5) == 5
            assert recordings.of("kind") is None
        assert kept() is None
    finally:
        gc.enable()
