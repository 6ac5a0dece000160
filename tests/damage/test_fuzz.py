"""Every reader of a file of ours, fed with mutations of a real one: it refuses in one line, or tells what was written.

Bytes are flipped, cut, put in, taken out and doubled; values of JSON are replaced by others of every type, keys taken out
and added, with the digest that was there and, as in files of earlier versions, without one: such a file may tell something
else, but nothing that its reader falls over.

`TSAE_FUZZ=100000 pytest tests/damage/test_fuzz.py` tries more; a failure names the seed, which TSAE_FUZZ_SEED takes.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from tsae.checkpoint import CALIBRATION, RunFolder, load_dictionary
from tsae.config.run import Counted
from tsae.experiments.shared.journal import Journal
from tsae.interop.origin import origin_of
from tsae.report import training as report_training
from tsae.runtime import locks, metadata
from tsae.runtime.errors import TsaeError
from tsae.runtime.job import Call
from tsae.runtime.progress import SHAPE
from tsae.runtime.state import Record
from tsae.store import binding
from tsae.store.layout import StoreLayout
from tsae.store.moments import moments_of
from tsae.store.reader import Store
from tsae.sweep.attempt import Attempt
from tsae.sweep.queue.background import read_queue
from tsae.training.metrics import first_fve
from tsae.training.resume import ResumeStates
from tsae.training.splits import last_line

MUTATIONS = int(os.environ.get("TSAE_FUZZ", "2000"))
SEED = int(os.environ.get("TSAE_FUZZ_SEED", random.SystemRandom().randrange(2**32)))
VALUES = (
    *(None, True, 0, 1, -1, 7, 10**40, 0.5, -0.0, 1e308, float("nan"), float("inf"), "", "5", "text", "\x00", "ü" * 99),
    *([], [1], [None], [[]], {}, {"a": 1}, {"": None}),
)

Reader = Callable[[Path], Any]


def weights(path: Path) -> Any:
    dictionary, config = load_dictionary(path.parent)
    origin_of(config, path.parent)
    return config, {name: tensor.tolist() for name, tensor in dictionary.to_file().items()}


def store(path: Path) -> Any:
    opened = Store.open(path.parent)
    return opened.attributes, moments_of(opened, Counted(1)), opened.tokens[:].tolist(), repr(opened)


def resumed(path: Path) -> Any:
    origin = json.loads(ORIGIN.read_text())["belongs_to"]
    state = ResumeStates(path.parents[1], origin, 2).load()
    return state and state["metrics_bytes"]


def lines(path: Path) -> Any:
    return [*report_training._read(path), last_line(path), {"first": first_fve(path)}]


def journal(path: Path) -> Any:
    return list(Journal(path, "scores", "abc").records.values())


def resolved(path: Path) -> Any:
    run = RunFolder(path.parent)
    return run.training_hash(), run.load_config()


def provenance(path: Path) -> Any:
    run = RunFolder(path.parent)
    return binding.written_of(run), binding.commit_of(run), origin_of(run.read_config(), path.parent)


RUN, SWEEP = "home/checkpoints/world/trainer_0", "home/sweeps/sweep-world"
ORIGIN = Path("origin.json")
READERS: dict[str, tuple[str, Reader]] = {
    "store": ("home/stores/*/zarr.json", store),
    "frame": ("home/stores/*/activations/zarr.json", lambda path: store(path.parent)),
    "marker": ("home/stores/*/checksums/shards/000000.json", lambda path: StoreLayout(path.parents[2]).read_marker(0)),
    "config": (f"{RUN}/config.json", weights),
    "weights": (f"{RUN}/ae.pt", weights),
    "resolved": (f"{RUN}/resolved.yaml", resolved),
    "calibration": (f"{RUN}/calibration.json", lambda path: metadata.read(path, CALIBRATION)),
    "provenance": (f"{RUN}/provenance.json", provenance),
    "results": (f"{RUN}/eval_results.json", lambda path: RunFolder(path.parent).read_results()),
    "progress": (f"{RUN}/progress.json", lambda path: metadata.whole(path, SHAPE)),
    "metrics": (f"{RUN}/metrics.jsonl", lines),
    "state": ("home/checkpoints/part/trainer_0/resume/step_24/state.json", resumed),
    "record": (f"{SWEEP}/stages/train-k=3-*/state.json", lambda path: Record.of(path.parent)),
    "queue": (f"{SWEEP}/attempts/*/queue.json", lambda path: read_queue(Attempt(path.parent))),
    "jobs": (f"{SWEEP}/attempts/*/jobs.json", lambda path: Attempt(path.parent).jobs()),
    "call": ("call.json", Call.load),
    "lock": ("some.lock", locks.owner),
    "journal": ("scores.jsonl", journal),
}  # fmt: skip
MADE_AGAIN = ("marker", "results", "progress", "metrics", "state", "record", "queue", "lock", "journal")
"""Of these a reader may also tell some of it, or what it tells where there is no file: the rest is made again."""


@st.composite
def mutations(draw: st.DrawFn) -> Callable[[bytes], tuple[bytes, bool]]:
    """A change of a file's content; whether what it says of itself (its digest) is still in it."""
    kind = draw(st.sampled_from(("flip", "cut", "put in", "take out", "double", "replace", "drop", "add")))
    sealed = draw(st.booleans())
    place, length = draw(st.floats(0, 1, exclude_max=True)), draw(st.integers(1, 40))
    more, bit = draw(st.binary(min_size=1, max_size=8)), draw(st.integers(0, 7))
    value, choices = draw(st.sampled_from(VALUES)), draw(st.lists(st.integers(0, 2**16), min_size=8, max_size=8))

    def in_bytes(content: bytes) -> bytes:
        at = int(place * len(content))
        match kind:
            case "flip":
                return content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1 :]
            case "cut":
                return content[:at]
            case "put in":
                return content[:at] + more + content[at:]
            case "take out":
                return content[:at] + content[at + length :]
        return content[: at + length] + content[at:]

    def in_tree(tree: Any) -> None:
        inner = tree
        for choice in choices:
            keys = list(inner) if isinstance(inner, dict) else range(len(inner))
            key = keys[choice % len(keys)]
            if isinstance(inner[key], (dict, list)) and inner[key] and choice % 3:
                inner = inner[key]
                continue
            break
        if kind == "add" and isinstance(inner, dict):
            inner["added"] = value
        elif kind == "drop":
            del inner[key]
        else:
            inner[key] = value

    def mutate(content: bytes) -> tuple[bytes, bool]:
        if kind in ("replace", "drop", "add"):
            with suppress(ValueError):
                tree = json.loads(content)
                in_tree(tree)
                if not sealed and isinstance(tree, dict):
                    tree.pop("digest", None)
                    if isinstance(tree.get("attributes"), dict):
                        tree["attributes"].pop("digest", None)
                content = json.dumps(tree, indent=2).encode()
                return content, has_digest(content)
        content = in_bytes(content)
        return content, has_digest(content)

    return mutate


def has_digest(content: bytes) -> bool:
    """False if this is JSON, or a line of it is, that one could take for an earlier version's: without a digest."""
    for text in (content, *content.splitlines()):
        with suppress(ValueError, RecursionError):
            tree = json.loads(text)
            attributes = tree.get("attributes") if isinstance(tree, dict) else None
            if isinstance(tree, dict) and "digest" not in {
                **tree,
                **(attributes if isinstance(attributes, dict) else {}),
            }:
                return False
    return True


@pytest.fixture(scope="module")
def whole(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    copy = shutil.copytree(made, tmp_path_factory.mktemp("fuzz") / "made")
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(copy)
        lock = locks.Lock(copy / "some.lock", "a lock")
        (copy / "kept.lock").write_bytes((copy / "some.lock").read_bytes())
        lock.release()
        (copy / "kept.lock").rename(copy / "some.lock")
        Call(record="here", function="a:b", arguments=[1, "x"], label="train k=3").save(copy / "call.json")
        kept = Journal(copy / "scores.jsonl", "scores", "abc")
        kept.add(*({"latent": n, "detection": {"score": n / 7}} for n in range(5)))
        state = copy / "home/checkpoints/part/trainer_0/resume/step_24/state.json"
        (copy / ORIGIN).write_bytes(state.read_bytes())
    return copy


def parts(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def plain(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=repr)


@pytest.mark.parametrize("kind", READERS)
def test_a_mutated_file_is_refused_or_tells_what_was_written(
    whole: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(whole)
    monkeypatch.setenv("TSAE_HOME", "home")
    pattern, read = READERS[kind]
    path = next(iter(sorted(whole.glob(pattern))))
    content, before = path.read_bytes(), read(path)
    assert before
    print(f"TSAE_FUZZ_SEED={SEED}")

    @seed(SEED)
    @settings(
        max_examples=MUTATIONS // len(READERS) + 1,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(mutations())
    def mutated(mutate: Callable[[bytes], tuple[bytes, bool]]) -> None:
        changed, sealed = mutate(content)
        path.unlink(missing_ok=True)
        path.write_bytes(changed)
        refusal, found = "", None
        try:
            found = read(path)
        except TsaeError as error:
            refusal = str(error)
        if refusal:
            assert "\n" not in refusal
            assert str(path.parent.parent) in refusal
            return
        if not sealed or plain(found) == plain(before):
            return
        assert kind in MADE_AGAIN, changed
        assert {*map(plain, parts(found))} <= known, changed

    path.unlink()
    known = {*map(plain, parts(before)), *map(plain, parts(read(path)) if kind in MADE_AGAIN else [])}
    path.write_bytes(content)
    try:
        mutated()
    finally:
        path.unlink(missing_ok=True)
        path.write_bytes(content)
