"""What happens to small files: one line that names the file, and nothing that is used in silence.

Each case damages one file and gives one command. A command that needs the file ends with exit code 2 and one line; those
that only look (status, report, runs) go on without it and say so; what can be made again is made again, the same.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tsae.cli import main

STORE = "home/stores/*"
RUN = "home/checkpoints/world/trainer_0"
PART = "home/checkpoints/part/trainer_0"
POINT = "home/checkpoints/sweep-world/k=3/trainer_0"
LAUNCH = "home/sweeps/sweep-world/attempts/*"
COMMANDS = {
    "verify": ["store", "verify", "STORE"],
    "harvest": ["harvest", "world.yaml"],
    "train": ["train", "world.yaml", "--run-name", "new"],
    "continue": ["train", "world.yaml", "--run-name", "part"],
    "again": ["train", "world.yaml"],
    "evaluate": ["evaluate", "world.yaml", "evaluation.sequences=15"],
    "calibrate": ["calibrate", "home/checkpoints/world"],
    "export": ["export", "home/checkpoints/world", "--format", "sae_lens", "--out", "out"],
    "status": ["status", "sweep.yaml"],
    "report": ["report", "sweep.yaml"],
    "runs": ["runs"],
    "sweep": ["sweep", "sweep.yaml", "--executor", "debug"],
    "folder": ["status", "home/sweeps/sweep-world"],
}
Damage = Callable[[Path], object]
pytestmark = pytest.mark.usefixtures("folder")


def text(content: bytes | str) -> Damage:
    """Have this content."""
    return lambda path: path.write_bytes(content if isinstance(content, bytes) else content.encode())


def half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def edit(key: str, value: Any, sealed: bool = True) -> Damage:
    """Have another value at a key path, or none where it is `...`; not `sealed`: as a file of an earlier version."""

    def damage(path: Path) -> None:
        tree = json.loads(path.read_text())
        *parents, last = key.split(".")
        inner = tree
        for name in parents:
            inner = inner[name]
        if value is ...:
            del inner[last]
        else:
            inner[last] = value
        if not sealed:
            tree.pop("digest", None)
            tree.get("attributes", {}).pop("digest", None)
        path.write_text(json.dumps(tree, indent=2))

    return damage


def edited_k(path: Path) -> None:
    path.write_text(re.sub(r"^  k: \d$", "  k: 5", path.read_text(), count=1, flags=re.MULTILINE))
    assert "  k: 5\n" in path.read_text()


def replaced(before: str, after: str) -> Damage:
    def damage(path: Path) -> None:
        assert before in path.read_text()
        path.write_text(path.read_text().replace(before, after, 1))

    return damage


def weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Damage:
    def damage(path: Path) -> None:
        state = torch.load(path, weights_only=True)
        change(state)
        torch.save(state, path)

    return damage


def attribute(key: str, value: Any) -> list[tuple[str, Damage]]:
    """Edited with its digest, and in a file that has none."""
    return [
        (f"{key} {'edited' if sealed else 'of an earlier version'}", edit(f"attributes.{key}", value, sealed))
        for sealed in (True, False)
    ]


NO_JSON = {
    "half": half,
    "empty": text(""),
    "binary": text(b"\xff\xfe\x00"),
    "a number": text("5"),
    "a list": text("[1]"),
}
NESTED = {"deeply nested": text("[" * 100_000), "a number of 5000 digits": text('{"a": ' + "9" * 5000 + "}")}
ATTRIBUTES = [
    *NO_JSON.items(),
    *NESTED.items(),
    *(
        case
        for key in ("geometry", "complete", "statistics", "manifest", "digests", "label_names", "heldout", "identity")
        for case in attribute(key, ...)
    ),
    *attribute("geometry.dtype", "int8"),
    *attribute("geometry.sequences", 0),
    *attribute("geometry.activation_dim", "16"),
    *attribute("statistics.mean", [0.0]),
    *attribute("statistics.mean_squared_norm", float("nan")),
    *attribute("heldout", -1),
    *(
        (f"{key} edited", edit(f"attributes.{key}", value))
        for key, value in (
            ("geometry.foo", 1),
            ("dtype", "float16"),
            ("statistics.mean_squared_norm", 0.0),
            ("statistics.count", 7),
            ("heldout", 1),
            ("geometry.shard_sequences", 1),
            ("settings", {}),
            ("tokens", 3),
        )
    ),
]
CONFIG = [
    *NO_JSON.items(),
    ("norm_factor edited", edit("trainer.norm_factor", 3.0)),
    ("group_fractions edited", edit("trainer.group_fractions", [0.5, 0.5])),
    ("an extra key", edit("trainer.foo", 1)),
    ("calibration without keys", edit("calibration", {})),
    ("calibration without keys, of an earlier version", edit("calibration", {}, sealed=False)),
    ("k is text, of an earlier version", edit("trainer.k", "4", sealed=False)),
    ("no trainer", edit("trainer", ...)),
]
RESOLVED = [
    *NO_JSON.items(),
    ("k edited", edited_k),
    ("an evaluation setting edited", replaced("batch_size: 16\n", "batch_size: 15\n")),
    (
        "k edited, of an earlier version",
        lambda path: (edited_k(path), replaced("digest:", "#")(path)),
    ),
]
CALIBRATION = [*NO_JSON.items(), ("no keys", text("{}")), ("edited", edit("tracked_threshold", 0.5))]
WEIGHTS = [
    ("text", text("these are no weights")),
    *((name, NO_JSON[name]) for name in ("half", "empty", "binary")),
    ("W_enc transposed", weights(lambda state: state.update(W_enc=state["W_enc"].T.contiguous()))),
    ("a weight changed", weights(lambda state: state["W_dec"][0].mul_(2))),
    ("of another run", lambda path: shutil.copy(f"{POINT}/ae.pt", path)),
    ("of another moment", lambda path: shutil.copy(path.with_name("checkpoints") / "ae_10.pt", path)),
]
METRICS = [
    ("half", half),
    ("empty", text("")),
    ("binary", text(b"\xff\xfe\x00\n")),
    ("a number", lambda path: path.write_text(path.read_text() + "5\n")),
    ("half a line", lambda path: path.write_text(path.read_text() + '{"step": 3\n')),
    ("a number edited", replaced('"fve": 0.', '"fve": 1.')),
    ("no JSON", text("nothing\n" * 9)),
]
REFUSED = [
    *((f"{STORE}/zarr.json", what, command) for what in ATTRIBUTES for command in ("evaluate", "verify", "harvest")),
    *((f"{STORE}/zarr.json", what, "train") for what in ATTRIBUTES[-8:]),
    *((f"{RUN}/config.json", what, command) for what in CONFIG for command in ("evaluate", "export")),
    *((f"{RUN}/resolved.yaml", what, "calibrate") for what in RESOLVED),
    *((f"{RUN}/calibration.json", what, "calibrate") for what in CALIBRATION),
    *((f"{RUN}/ae.pt", what, "evaluate") for what in WEIGHTS),
    *((f"{RUN}/provenance.json", what, "evaluate") for what in [*NO_JSON.items(), ("edited", edit("host", "other"))]),
    (f"{RUN}/resolved.yaml", ("hash is a list", replaced("training_hash: ", "training_hash: [1, ")), "again"),
    (f"{PART}/metrics.jsonl", ("a number edited", replaced('"fve": ', '"fve": 1')), "continue"),
    (f"{PART}/metrics.jsonl", ("half", half), "continue"),
    (f"{STORE}/activations/zarr.json", ("dtype", replaced("uint16", "int16 ".strip())), "evaluate"),
    (f"{STORE}/activations/zarr.json", ("dtype", replaced("uint16", "int16 ".strip())), "verify"),
    (f"{LAUNCH}/launch.json", ("half", half), "folder"),
    (f"{LAUNCH}/launch.json", ("edited", edit("overrides", ["sae.k=5"])), "folder"),
]
GOES_ON = [
    *(
        (f"{POINT}/{name}", what, command)
        for name, damages in (
            ("config.json", CONFIG),
            ("eval_results.json", [*NO_JSON.items(), ("edited", edit("l0", 1.0))]),
            ("resolved.yaml", RESOLVED[:-1]),
            ("provenance.json", [*NO_JSON.items()]),
        )
        for what in damages
        for command in ("status", "report", "runs")[: 2 if name == "provenance.json" else 3]
    ),
    *(
        (f"{POINT}/metrics.jsonl", what, "report")
        for what in METRICS
        if what[0] not in ("half", "empty", "a number edited")
    ),
    (f"{LAUNCH}/jobs.json", ("half", half), "status"),
    (f"{LAUNCH}/jobs.json", ("wrong types", edit("entries", [{"stage": 5}], sealed=False)), "status"),
]
SAME = [
    *((f"{STORE}/checksums/shards/000000.json", what, "harvest") for what in [
        *NO_JSON.items(), ("no checksums", edit("checksums", ...)), ("no summary", edit("summary", ...)),
        ("no summary, of an earlier version", edit("summary", ..., sealed=False)),
    ]),
    *((f"{PART}/resume/latest/state.json", what, "continue") for what in [
        *NO_JSON.items(), ("no belongs_to", edit("belongs_to", ...)),
        ("no belongs_to, of an earlier version", edit("belongs_to", ..., sealed=False)),
    ]),
    *((f"{POINT}/eval_results.json", what, "sweep") for what in [*NO_JSON.items(), ("edited", edit("l0", 1.0))]),
    *((f"{LAUNCH}/queue.json", what, "sweep") for what in [*NO_JSON.items(), ("numbers", text('{"a": 5}'))]),
    *((f"{POINT}/progress.json", what, "status") for what in NO_JSON.items()),
    *((f"{POINT}/metrics.jsonl", what, "report") for what in METRICS),
]  # fmt: skip


def find(pattern: str) -> Path:
    if "/latest/" in pattern:
        folder, _, name = pattern.partition("/latest/")
        return Path(folder) / Path(folder, "latest").read_text().strip() / name
    return next(iter(sorted(Path().glob(pattern)))).absolute()


def give(command: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Exit code and all that was said."""
    capsys.readouterr()
    code = main([str(find(STORE)) if word == "STORE" else word for word in COMMANDS[command]])
    said = capsys.readouterr()
    return code, said.out + said.err


def named(case: tuple[str, tuple[str, Damage], str]) -> str:
    return f"{Path(case[0]).name}: {case[1][0]}: {case[2]}"


@pytest.mark.parametrize("case", REFUSED, ids=named)
def test_a_damaged_file_is_one_line(capsys: pytest.CaptureFixture[str], case: Any) -> None:
    pattern, (_, damage), command = case
    path = find(pattern)
    damage(path)
    left = path.read_bytes()
    code, said = give(command, capsys)
    assert code in ((1, 2) if command == "verify" else (2,)), said
    assert "Traceback" not in said
    lines = [line for line in said.splitlines() if f"{path.parent.name}/{path.name}" in line]
    assert len(lines) == 1, said
    assert path.read_bytes() == left


@pytest.mark.parametrize("case", GOES_ON, ids=named)
def test_what_only_looks_goes_on_without_it_and_says_so(capsys: pytest.CaptureFixture[str], case: Any) -> None:
    pattern, (_, damage), command = case
    path = find(pattern)
    damage(path)
    code, said = give(command, capsys)
    assert code == 0, said
    page = Path("home/sweeps/sweep-world/report/report.html")
    told = said + page.read_text() if command == "report" else said
    assert path.name in told
    assert "damaged" in told
    assert "k=4" in told


@pytest.mark.parametrize("case", SAME, ids=named)
def test_what_can_be_made_again_is(capsys: pytest.CaptureFixture[str], case: Any) -> None:
    pattern, (_, damage), command = case
    path = find(pattern)
    damage(path)
    if "shards" in pattern:
        (path.parents[2] / "activations/c/1/0/0").unlink(missing_ok=True)
    code, said = give(command, capsys)
    assert code == 0, said
    if command == "harvest":
        assert give("verify", capsys)[0] == 0
    if command == "continue":  # the same settings, never interrupted
        undisturbed = torch.load(POINT.replace("k=3", "k=4") + "/ae.pt", weights_only=True)
        for name, tensor in torch.load(f"{PART}/ae.pt", weights_only=True).items():
            assert torch.equal(tensor, undisturbed[name])
