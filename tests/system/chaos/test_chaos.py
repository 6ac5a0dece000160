"""Every command, ended at random moments by SIGKILL or SIGTERM, leaves the bytes of one that was left alone.

`TSAE_CHAOS=500 pytest tests/system/chaos` is the longer mode: so many signals, over all commands. A failure prints the
seed, which TSAE_CHAOS_SEED takes. What is started at the same time on the same files ends with the bytes of one after
the other, or in one line.
"""

from __future__ import annotations

import os
import random
import signal

import pytest

from tests.system.chaos.commands import COMMANDS, FOLDER, RUN
from tests.system.chaos.conftest import Line, contents, different
from tsae.runtime.preemption import REQUEUE

SIGNALS = int(os.environ.get("TSAE_CHAOS", "40"))
SEED = int(os.environ.get("TSAE_CHAOS_SEED", random.randrange(2**32)))


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_that_is_ended_at_random_moments_leaves_the_same_bytes(line: Line, name: str) -> None:
    print(f"TSAE_CHAOS_SEED={SEED}")
    command, moments = COMMANDS[name], random.Random(f"{SEED} {name}")
    expected = line.left_by(name)
    line.back_to(command.after)
    left = -(-SIGNALS // len(COMMANDS))
    while left:
        number = moments.choice((signal.SIGKILL, signal.SIGTERM))
        codes = line.run(command, moments.uniform(0, line.seconds[name]), number, moments.randrange(command.processes))
        # Of two processes the other one ends, too, with a line that says why.
        ended = {0, -number, REQUEUE} if command.processes == 1 else {0, 2, -number, -signal.SIGKILL, REQUEUE}
        ended |= {130} if name == "sweep" else set()  # a launcher that is asked to leave says it was interrupted
        assert set(codes) <= ended, (codes, line.said())
        assert "Traceback" not in line.said()
        if codes != [0] * command.processes:
            left -= 1
            if name == "export" and (line.folder / "exported").exists():  # whole, and another one is refused
                assert different(expected, contents(line.folder)) == []
                line.back_to(command.after)
            continue
        assert different(expected, contents(line.folder)) == []
        line.back_to(command.after)
    assert line.run(command) == [0] * command.processes, line.said()
    assert different(expected, contents(line.folder)) == []


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
