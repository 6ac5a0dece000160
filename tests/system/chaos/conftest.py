"""A user's folder in which every command was given once, one after another, and what the folder held after each."""

from __future__ import annotations

import json
import multiprocessing
import random
import re
import shutil
import socket
import time
from collections.abc import Iterator, Sequence
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.experiments.answers.chat_server import Server
from tests.experiments.conftest import labelled_text
from tests.system.chaos.commands import COMMANDS, Command
from tests.system.conftest import PRELOADED, joined
from tests.system.dying import in_folder

__all__ = ["labelled_text"]

RUN: dict[str, Any] = {
    "model": {"name": "model", "layer": 1, "device": "cpu", "batch_size": 8},
    "data": {"source": "labelled.jsonl", "context_length": 32, "holdout": 0.2},
    "sae": {"dict_size": 48, "k": 4},
    "training": {
        **{"steps": 60, "batch_size": 64, "lr": 3e-3, "warmup_steps": 5, "threshold_start_step": 10, "device": "cpu"},
        **{"threshold_beta": 0.9, "log_every": 3, "save_steps": [20, 41], "resume_every": 7},
    },
    "evaluation": {"sequences": 16, "batch_size": 4, "loss_sequences": 8},
    "experiments": {
        "texts": {"count": 60, "context_length": 32, "min_characters": 20},
        "probe": {
            "dataset": "labelled.jsonl",
            "tasks": ["semantics", "context"],
            "seeds": 1,
            "features": [1, 5],
            "tokens": 200,
        },
        "tsne": {
            "dataset": "labelled.jsonl",
            "tagger": "surface",
            "texts": 12,
            "tokens": 8,
            "seeds": 1,
            "perplexity": 5,
        },
        "sequences": {"dataset": "labelled.jsonl", "passage_tokens": 10, "splices": 10, "bootstrap": 100},
        "align": {"dataset": "pairs.jsonl", "pairs": 40, "min_pairs": 5, "max_tokens": 40, "bootstrap": 100},
        "steer": {
            **{"dataset": "labelled.jsonl", "max_concepts": 2, "multiples": [1], "text_prompts": 2, "tokens": 6},
            **{"classifier_texts": 20, "bootstrap": 100},
        },
        "explain": {
            **{"answers": {"backend": "endpoint", "model": "reader"}, "latents": 3, "window": 8},
            **{"tests": 4, "examples": 6},
        },
    },
}
LONG = {
    **RUN,
    "data": {**RUN["data"], "source": "long.jsonl", "holdout": 0.1},
    "store": {"window": "600kB"},
    "training": {**RUN["training"], "batch_size": 512, "pool_sequences": 150},
}
CLOCKED = ("provenance.json", "progress.json", "window.jsonl", "window.png")
SWEEP = {"base": "run.yaml", "grid": {"sae.k": [3, 4]}, "stages": ["harvest", "train", "evaluate", "report"]}


class Line:
    """The folder, which is always at one place since results hold paths, and its copies from after each command."""

    def __init__(self, root: Path) -> None:
        self.folder, self._kept = root / "place", root / "kept"
        self.seconds: dict[str, float] = {}
        self._processes = multiprocessing.get_context("forkserver")
        self._processes.set_forkserver_preload(PRELOADED)

    def keep(self, name: str) -> None:
        """Remember the folder as it is now as what `name` leaves."""
        shutil.copytree(self.folder, self._kept / name)

    def back_to(self, name: str) -> None:
        """Have the folder as `name` left it."""
        shutil.rmtree(self.folder)
        shutil.copytree(self._kept / name, self.folder)

    def left_by(self, name: str) -> dict[str, bytes]:
        """What `contents` gave when `name` had ended."""
        return contents(self._kept / name)

    def start(self, arguments: Sequence[str], rank: int = 0, world: int = 1, port: int = 0, **dies: Any) -> Any:
        """A process that runs a `tsae` command there; `dies` is what `in_folder` takes."""
        process = self._processes.Process(
            target=in_folder, args=(self.folder, [*arguments], rank, world, port), kwargs=dies
        )
        process.start()
        return process

    def run(
        self, command: Command, seconds: float | None = None, number: int = 0, killed: int = 0, **place: Any
    ) -> list[int]:
        """The exit codes of its processes; process `killed` gets signal `number` after so many seconds."""
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        return ended_together(
            [
                self.start(
                    command.arguments,
                    rank,
                    command.processes,
                    port,
                    **({"seconds": seconds, "number": number} if rank == killed else {}),
                    **place,
                )
                for rank in range(command.processes)
            ]
        )

    def said(self) -> str:
        """What the last processes said on stderr."""
        return "".join(path.read_text() for path in sorted(self.folder.parent.glob("rank*.err")))


def ended_together(processes: list[Any]) -> list[int]:
    """The exit codes of processes of which, as under srun and torchrun, none outlives for long another that failed.

    Before they have met, one cannot know that the other is gone.
    """
    running = {process.sentinel for process in processes}
    while running and not any(process.exitcode for process in processes):
        if not (ended := wait(running, timeout=120)):
            break  # they wait for ever, which `joined` says
        running.difference_update(ended)
    if any(process.exitcode for process in processes):
        for process in processes:
            process.join(timeout=30)
            if process.exitcode is None:
                process.kill()
    return joined(processes)


def contents(folder: Path) -> dict[str, bytes]:
    """Bytes of every file but those that hold a clock; of markers without who wrote them, of reports without their time and
    which copy of the sweep's file they were made from."""
    found = {}
    for path in folder.rglob("*"):
        name = str(path.relative_to(folder))
        if (
            path.is_file()
            and path.name not in CLOCKED
            and not name.startswith(("home/contents/", "home/answers/"))
            and not re.match("home/sweeps/[^/]*/(attempts|stages)/", name)
        ):
            found[name] = path.read_bytes()
            if path.name == "report.html":
                found[name] = re.sub(rb"\d+ \w+ \d{4}, \d\d:\d\d|Made from <code>[^<]*", b"", found[name])
            if path.parent.name == "shards" or name.endswith("report/results.json"):
                marker = json.loads(found[name])
                found[name] = json.dumps(
                    {key: marker[key] for key in marker.keys() - {"written_by", "made_from", "digest"}}, sort_keys=True
                ).encode()
    return found


def different(expected: dict[str, bytes], found: dict[str, bytes]) -> list[str]:
    """The files that differ, or that only one of both has.

    Which shards a window holds when its training is over depends on when that was killed; that they are as many does not.
    """
    names = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    stores = [name.removesuffix("zarr.json") for name in expected if b'"rolling": {' in expected[name]]
    alone = [name for name in names if name.startswith(tuple(f"{store}activations/c/" for store in stores))]
    gone, more = ([name for name in alone if name not in files] for files in (found, expected))
    return [
        name for name in names if name not in alone or len(gone) != len(more) or name in expected.keys() & found.keys()
    ]


def says(request: dict[str, Any]) -> str:
    """An endpoint's answers: one explanation for all latents, and every other text fits it."""
    system, user = (message["content"] for message in request["messages"])
    if "EXPLANATION:" in system:
        return "EXPLANATION: words"
    return json.dumps([index % 2 for index, _ in enumerate(re.findall(r"^Text \d+: ", user, re.MULTILINE))])


@pytest.fixture(scope="session")
def line(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, labelled_text: Path) -> Iterator[Line]:
    """The folder with a model, texts, pairs, a run's YAML and a sweep's, and every command given in it."""
    line = Line(tmp_path_factory.mktemp("chaos"))
    shutil.copytree(tiny_model, line.folder / "model")
    shutil.copy(labelled_text, line.folder / "labelled.jsonl")
    words, generator = (
        [json.loads(row)["text"].split() for row in labelled_text.read_text().splitlines()],
        random.Random(3),
    )
    with (line.folder / "pairs.jsonl").open("w") as stream:
        for _ in range(60):
            opening, chosen, rejected = (" ".join(generator.choice(words)[: generator.randint(4, 9)]) for _ in range(3))
            pair = {
                key: f"\n\nHuman: {opening}\n\nAssistant: {end}"
                for key, end in (("chosen", chosen), ("rejected", rejected))
            }
            stream.write(json.dumps(pair) + "\n")
    rows = (" ".join(word for text in generator.sample(words, 2) for word in text) for _ in range(600))
    (line.folder / "long.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    (line.folder / "long.yaml").write_text(yaml.safe_dump(LONG))
    (line.folder / "sweep.yaml").write_text(yaml.safe_dump(SWEEP))
    with Server(says) as server, pytest.MonkeyPatch.context() as patched:
        patched.setenv("NO_PROXY", "127.0.0.1")  # before the first process is started
        RUN["experiments"]["explain"]["answers"]["base_url"] = server.base_url
        (line.folder / "run.yaml").write_text(yaml.safe_dump(RUN))
        line.keep("nothing")
        for name, command in COMMANDS.items():
            line.back_to(command.after)
            begun = time.monotonic()
            assert line.run(command) == [0] * command.processes, line.said()
            line.seconds[name] = time.monotonic() - begun
            line.keep(name)
        yield line
