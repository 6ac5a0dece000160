"""What is started at the same time on the same files ends with the bytes of one after the other, or in one line."""

from __future__ import annotations

import pytest

from tests.system.chaos.commands import COMMANDS, FOLDER, RUN
from tests.system.chaos.conftest import Line, contents, different


def test_two_sweeps_on_one_store_and_the_same_runs(line: Line) -> None:
    line.back_to("nothing")
    sweep = COMMANDS["sweep"].arguments
    both = [line.start(sweep, rank) for rank in range(2)]
    for process in both:
        process.join()
    # One launcher decides at a time; whatever the other finds at work it says in a line, and the next launch has it.
    assert {process.exitcode for process in both} <= {0, 1}, line.said()
    assert line.run(COMMANDS["sweep"]) == [0]
    assert different(line.left_by("sweep"), contents(line.folder)) == []


def test_two_trainings_of_one_run(line: Line) -> None:
    line.back_to("harvest")
    both = [line.start(COMMANDS["train"].arguments, rank) for rank in range(2)]
    for process in both:
        process.join()
    assert sorted(process.exitcode for process in both) in ([0, 0], [0, 2])
    if {process.exitcode for process in both} == {0, 2}:
        assert "train one: process " in line.said()
        assert "is already working on it; wait for it or end it" in line.said()
    assert different(line.left_by("train"), contents(line.folder)) == []


@pytest.mark.parametrize(
    ("writer", "reader", "codes"),
    [
        ("train", ["evaluate", "run.yaml", *RUN], {0, 2}),
        ("train", ["status", "home/checkpoints"], {2}),
        ("train", ["runs"], {0, 2}),
        ("train", ["features", *RUN], {0, 2}),
        ("harvest", ["store", "verify", "STORE", "--deep"], {0, 1, 2}),
        ("calibrate", ["evaluate", FOLDER], {0, 2}),
        ("calibrate", ["export", FOLDER, "--format", "reference", "--out", "{n}"], {0, 2}),
    ],
)
def test_what_reads_while_another_writes_is_right_or_one_line(
    line: Line, writer: str, reader: list[str], codes: set[int]
) -> None:
    command = COMMANDS[writer]
    line.back_to(command.after)
    expected = line.left_by(writer)
    writing, said = line.start(command.arguments), []
    while writing.exitcode is None:
        store = next(iter(line.folder.glob("home/stores/*layer1*[0-9a-f]")), line.folder / "home/stores/none")
        words = [word.format(n=f"out{len(said)}") for word in reader]
        reading = line.start([str(store) if word == "STORE" else word for word in words], rank=1)
        reading.join()
        said.append((reading.exitcode, (line.folder.parent / "rank1.err").read_text()))
    assert writing.exitcode == 0, line.said()
    for code, text in said:
        assert code in codes, text
        assert "Traceback" not in text
    found = contents(line.folder)
    assert [name for name in expected if found.get(name) != expected[name]] == []
