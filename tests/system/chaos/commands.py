"""The commands that are disturbed."""

from __future__ import annotations

from typing import NamedTuple


class Command(NamedTuple):
    """A `tsae` command, given in the folder as another one left it."""

    arguments: list[str]
    after: str
    processes: int = 1


RUN = ["--run-name", "one"]
FOLDER = "home/checkpoints/one"
EXPERIMENTS = ("probe", "tsne", "sequences", "align", "steer", "features", "explain")
COMMANDS = {
    "harvest": Command(["harvest", "run.yaml"], "nothing"),
    "train": Command(["train", "run.yaml", *RUN], "harvest"),
    "train in two processes": Command(["train", "run.yaml", "training.processes=2", *RUN], "harvest", 2),
    "train on a window": Command(["train", "long.yaml", *RUN], "nothing"),
    "calibrate": Command(["calibrate", FOLDER, "--target-l0", "3"], "train"),
    "evaluate": Command(["evaluate", FOLDER], "calibrate"),
    **{name: Command([name, *RUN], "evaluate") for name in EXPERIMENTS},
    "export": Command(["export", FOLDER, "--format", "sae_lens", "--out", "exported"], "train"),
    "sweep": Command(["sweep", "sweep.yaml", "--executor", "debug"], "nothing"),
    "report": Command(["report", "sweep.yaml"], "sweep"),
}
