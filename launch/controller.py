"""What a local job's session runs: submitit's controller, which also passes on that the task was preempted."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from submitit.local.local import Controller

from tsae.preemption import REQUEUE


class TellingController(Controller):
    """Remembers how its tasks ended."""

    exit_codes: Sequence[int | None] = ()

    def wait(self, freq: int = 24) -> Sequence[int | None]:
        """As submitit's; kept for the exit code of this process."""
        self.exit_codes = super().wait(freq)
        return self.exit_codes


if __name__ == "__main__":
    controller = TellingController(Path(sys.argv[1]))
    # Slurm sends USR2 to every process of a job; the default would end this one and leave its task behind.
    signal.signal(signal.SIGUSR2, lambda number, _frame: controller._forward_signal(signal.Signals(number)))
    controller.run()
    sys.exit(REQUEUE if REQUEUE in controller.exit_codes else 0)
