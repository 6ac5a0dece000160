"""Every command, ended at random moments by SIGKILL or SIGTERM, leaves the bytes of one that was left alone.

`TSAE_CHAOS=500 pytest tests/system/chaos` is the longer mode: so many signals, over all commands. A failure prints the
seed, which TSAE_CHAOS_SEED takes.
"""

from __future__ import annotations

import os
import random
import signal

import pytest

from tests.system.chaos.commands import COMMANDS
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
        assert set(codes) <= ended, (codes, line.said())
        assert "Traceback" not in line.said()
        if codes != [0] * command.processes:
            left -= 1
            continue
        assert different(expected, contents(line.folder)) == []
        line.back_to(command.after)
    assert line.run(command) == [0] * command.processes, line.said()
    assert different(expected, contents(line.folder)) == []
