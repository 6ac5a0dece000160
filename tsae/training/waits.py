"""What a training on a window waited for: a line for each pool of contexts, and a picture of all of them.

`window.jsonl`, which every attempt at a run adds its lines to, and `window.png` are written when the training ends or
leaves. They are about time, so that no two runs have the same; nothing reads them but people.
"""

from __future__ import annotations

import json
import logging

from tsae.checkpoint import RunFolder
from tsae.plotting import PALETTE, figure
from tsae.runtime.files import write_atomically
from tsae.store.pairs import Waits
from tsae.store.window import Window

GIGABYTE = 1e9

log = logging.getLogger("tsae")


def write_waits(run: RunFolder, waits: Waits, window: Window) -> None:
    """Write what there is to tell of this attempt, if it came to a second pool, and draw all attempts.

    Where it cannot be written a warning says so: nothing that was trained depends on it, nor what comes next.
    """
    if not waits.pools or not run.path.is_dir():  # a run that was refused has no folder
        return
    try:
        _write(run, waits, window)
    except OSError as error:
        log.warning("%s: what it waited for cannot be written: %s", run.path, error)


def _write(run: RunFolder, waits: Waits, window: Window) -> None:
    path = run.path / "window.jsonl"
    before = path.read_bytes() if path.exists() else b""
    after = "".join(json.dumps(pool._asdict()) + "\n" for pool in waits.pools).encode()
    write_atomically(path, lambda stream: stream.write(before + after))
    lines = [json.loads(line) for line in (before + after).splitlines()]
    steps = [line["step"] for line in lines]
    with figure(run.path / "window.png", rows=2, size=(5.2, 4.2), sharex=True) as (_, (disk, time)):
        disk.plot(steps, [line["held_bytes"] / GIGABYTE for line in lines], color=PALETTE[0], label="on disk")
        disk.axhline(window.bytes / GIGABYTE, color=PALETTE[6], linestyle="--", label="window")
        disk.set(title="Shards of the training part on disk", ylabel="GB", ylim=(0, None))
        disk.legend(loc="lower right")
        for place, (name, who) in enumerate(
            {"training": "training, for the harvest", "harvest": "the harvest, for training"}.items()
        ):
            time.plot(steps, [line[f"{name}_waited"] for line in lines], color=PALETTE[place + 1], label=who)
        time.set(title="Who waits", xlabel="Step", ylabel="s per pool", ylim=(0, None))
        time.legend()
