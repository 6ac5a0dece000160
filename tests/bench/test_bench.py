"""`tsae bench` at tiny sizes: that it measures what it says and writes it down; never how long anything takes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tsae.bench import command, loop, rates, report, rounds
from tsae.bench.rounds import Plan, Result, measure
from tsae.bench.shape import PRESETS, Shape, batches
from tsae.cli import main
from tsae.runtime.errors import TsaeError
from tsae.runtime.phases import phase, record
from tsae.store import writer

TINY = ["-D", "16", "-F", "96", "-k", "4", "-B", "32", "--rounds", "3", "--warmup", "1", "--store-mb", "1"]
STEP_PHASES = {"encoder product", "selection", "decode", "contrast", "weight gradients", "optimizer", "other"}


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The results of one run with growth, and where they are."""
    folder = tmp_path_factory.mktemp("bench")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "SECONDS", 0.3)
        patch.setattr(loop, "ROUNDS", 1)
        assert main(["bench", *TINY, "--growth", "2", "--growth-rounds", "1", "--out", str(folder)]) == 0
    (path,) = folder.glob("*.json")
    return {"path": path, **json.loads(path.read_text())}


def test_writes_a_figure_beside_the_json(bench: dict[str, Any]) -> None:
    assert bench["path"].with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert bench["machine"]["torch"] == torch.__version__


def test_compares_sparse_dense_and_floor_with_medians_and_spread(bench: dict[str, Any]) -> None:
    contestants = {entry["name"]: entry for entry in bench["step"]["contestants"]}
    assert list(contestants) == ["sparse", "sparse-float32", "sparse+state", "dense", "floor"]
    for entry in contestants.values():
        seconds, ratio = entry["seconds"], entry["ratio_to_sparse"]
        assert len(seconds["rounds"]) == 3
        assert 0 < seconds["lowest"] <= seconds["median"] <= seconds["highest"]
        assert ratio["lowest"] <= ratio["highest"]
        assert ratio["median"] == pytest.approx(seconds["median"] / contestants["sparse"]["seconds"]["median"])
    assert contestants["sparse"]["encoded_per_second"] == pytest.approx(2 * contestants["sparse"]["pairs_per_second"])
    weights = 2 * 16 * 96 + 16 + 96
    assert contestants["sparse"]["state_bytes"] == 4 * 4 * weights


def test_tells_what_a_resumable_state_costs(bench: dict[str, Any]) -> None:
    seconds = {entry["name"]: entry["seconds"]["rounds"] for entry in bench["step"]["contestants"]}
    ratios = [with_state / plain for with_state, plain in zip(seconds["sparse+state"], seconds["sparse"], strict=True)]
    assert bench["resuming"]["every"] == 50
    assert bench["resuming"]["share_of_step_time"]["highest"] == pytest.approx((max(ratios) - 1) / 50)
    assert bench["resuming"]["resume_seconds"]["median"] > 0


@pytest.mark.parametrize(("objective", "encoded"), [("scale_free", 2), ("predictive", 1)])
def test_other_objectives_are_timed(objective: str, encoded: int, tmp_path: Path) -> None:
    arguments = [*TINY, "--objective", objective, "--rounds", "1", "--store-mb", "0", "--out", str(tmp_path)]
    assert main(["bench", *arguments]) == 0
    (path,) = tmp_path.glob(f"temporal-{objective}-*.json")
    sparse, *_, floor = json.loads(path.read_text())["step"]["contestants"]
    for entry in (sparse, floor):
        assert entry["encoded_per_second"] == pytest.approx(encoded * entry["pairs_per_second"])
    assert ("contrast" in sparse["phases"]) == (objective == "scale_free")


def test_products_in_tf32_are_a_contestant_of_their_own() -> None:
    shape = Shape(activation_dim=16, dict_size=96, k=4, batch_size=32)
    result = measure(["sparse", "dense+tf32"], shape, Plan(rounds=1, warmup=1))
    assert [entry.name for entry in result.measured] == ["sparse", "dense+tf32"]
    assert [entry.algorithm.endswith("TF32") for entry in result.measured] == [False, True]


class Stub:
    """A contestant's process; but for `sparse` they run out of memory in their second step, which no test is to do."""

    def __init__(self, name: str) -> None:
        self.name = self.library = name
        self.left = 9 if name == "sparse" else 1
        self.described = {"library": "tsae", "algorithm": "", "encoded": 1, "state_bytes": 1}

    def ask(self, _: dict[str, Any]) -> dict[str, Any]:
        self.left -= 1
        if self.left < 0:
            raise TsaeError(f"bench: {self.name}: OutOfMemoryError")
        return {"seconds": 1.0, "phases": {"other": 1.0}, "peak_bytes": 1}


def test_what_has_not_the_memory_is_left_out() -> None:
    shape, plan = Shape(activation_dim=16, dict_size=96, k=4, batch_size=32), Plan(rounds=3, warmup=0)
    missing: dict[str, str] = {}
    workers: list[Any] = [Stub("sparse"), Stub("dense")]
    left = Result(rounds._rounds(workers, shape, plan, missing), missing)
    assert [entry.name for entry in left.measured] == ["sparse"]
    assert missing == {"dense": "bench: dense: OutOfMemoryError"}
    record = report.record_of(shape, plan, left)
    assert "OutOfMemoryError" in report.table(record)
    cells = report.growth_table([record]).splitlines()[1].split()
    assert cells == ["96", "32", "1", "-", "-", "-", "0"]
    workers = [Stub("sparse"), Stub("sparse+state")]
    with pytest.raises(TsaeError, match="state: OutOfMemory"):  # without it nothing could be said of states
        rounds._rounds(workers, shape, plan, {})


def test_what_the_host_asks_of_a_gpu_is_counted() -> None:
    host = ["cudaLaunchKernel", "cuLaunchKernelEx", "cudaGraphLaunch", "cudaMemcpyAsync", "cudaStreamSynchronize"]
    gpu = ["Memcpy HtoD (Pinned -> Device)", "_weighted_rows", "_weighted_rows", "Memset (Device)"]
    events = [(name, True) for name in (*host, "aten::add", "cudaDeviceSynchronize")] + [(name, False) for name in gpu]
    assert rounds.tally(events) == {"launches": 2, "graphs": 1, "waits": 1, "copies": 1, "kernels": 2}


def test_several_processes_are_put_beside_one(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *TINY, "--processes", "2", "--steps", "4", "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("processes-*.json")
    alone, plain, sharded = json.loads(path.read_text())["groups"]
    for several in (plain, sharded):
        assert several["processes"] == 2
        assert several["loss"] == pytest.approx(alone["loss"], rel=1e-5)
        assert min(several["bytes_handed"]) > several["gradient_bytes"]
    assert sharded["state_bytes"] < 0.8 * plain["state_bytes"]
    assert alone["state_bytes"] == pytest.approx(0.75 * plain["state_bytes"], rel=0.02)  # no gradients of matrices
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert "shard" in capfd.readouterr().out


def test_bfloat16_is_that_of_the_encoder_product(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = [*TINY, "--dtype", "bfloat16", "--rounds", "1", "--store-mb", "0", "--out", str(tmp_path)]
    assert main(["bench", *arguments]) == 0
    (path,) = tmp_path.glob("*.json")
    contestants = {entry["name"]: entry for entry in json.loads(path.read_text())["step"]["contestants"]}
    assert "rounded to bfloat16" in contestants["sparse"]["algorithm"]
    assert "in bfloat16" in contestants["floor"]["algorithm"]
    assert "bfloat16" not in contestants["dense"]["algorithm"]
    assert contestants["sparse"]["state_bytes"] == contestants["dense"]["state_bytes"]
    assert "bfloat16" in capfd.readouterr().out


def test_names_every_phase_of_both_paths(bench: dict[str, Any]) -> None:
    for entry in bench["step"]["contestants"][:4]:
        assert set(entry["phases"]) >= STEP_PHASES
        assert all(entry["phases"][name] > 0 for name in STEP_PHASES)


def test_measures_rates_and_growth(bench: dict[str, Any]) -> None:
    rates = bench["rates"]
    spreads = [value for value in rates.values() if isinstance(value, dict) and "median" in value]
    assert len(spreads) == 3
    assert all(0 < value["lowest"] <= value["median"] for value in spreads)
    shapes = [record["shape"] for record in bench["growth"]]
    assert [(shape["dict_size"], shape["batch_size"]) for shape in shapes] == [(96, 32), (192, 32), (96, 64)]


def test_measures_training_and_harvest_from_end_to_end(bench: dict[str, Any]) -> None:
    training, harvest = bench["rates"]["training"], bench["rates"]["harvest"]
    assert training["batch_size"] == 32
    assert training["pairs_per_second"]["lowest"] > 0
    assert (harvest["model"], harvest["hook_path"]) == ("embedded", "gpt_neox.layers.2")
    assert harvest["tokens"] == 4 * harvest["batch_size"] * harvest["context_length"]
    assert 2 * 128 < harvest["bytes_per_token"] < 2.1 * 128  # bfloat16, and checksums
    assert not list(bench["path"].parent.glob("rates-*"))


def test_a_step_of_a_training_is_what_a_longer_one_takes_more(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shape = Shape(activation_dim=16, dict_size=96, k=4, batch_size=32)
    told = iter([9.0, 3.0, 5.0, 4.0, 2.0, 3.0, 7.0])  # the first is not counted; in one round the longer was as fast
    monkeypatch.setattr(loop, "_seconds_of_training", lambda *_: next(told))
    monkeypatch.setattr(loop, "SECONDS", 0.0)
    found = loop.training_rates(shape, None, tmp_path)  # type: ignore[arg-type]
    n = found["steps"]
    assert found["pairs_per_second"] == {"median": 32 * n * 0.75, "lowest": 32 * n * 0.5, "highest": 32 * n}
    assert found["start_and_end_seconds"] == {"median": 1.5, "lowest": 1.0, "highest": 2.0}
    monkeypatch.setattr(loop, "_seconds_of_training", lambda *_: 1.0)
    with pytest.raises(TsaeError, match="too busy"):
        loop.training_rates(shape, None, tmp_path)  # type: ignore[arg-type]


@pytest.mark.parametrize("window", [None, "1MB"])
def test_another_language_model_is_harvested(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, window: str | None
) -> None:
    monkeypatch.setattr(loop, "SECONDS", 0.01)
    monkeypatch.setattr(writer, "SAMPLE_TOKENS", 64)
    tree = {"model": {"name": str(tiny_model), "layer": 1, "batch_size": 4}, "data": {"context_length": 16}}
    (tmp_path / "run.yaml").write_text(json.dumps({**tree, "store": {"window": window}}))
    config = command._read_by_harvest(str(tmp_path / "run.yaml"), "cpu")
    found = loop.harvest_rates(config, tmp_path)
    assert (found["hook_path"], found["batch_size"], found["context_length"]) == ("gpt_neox.layers.1", 4, 16)
    assert 2 * 32 < found["bytes_per_token"] < 2.2 * 32
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plain", "run.yaml"]


def test_contexts_that_are_too_long_for_the_model_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    tree = {"model": {"name": str(tiny_model), "layer": 1}, "data": {"context_length": 128}}
    (tmp_path / "run.yaml").write_text(json.dumps(tree))
    with pytest.raises(TsaeError, match=r"128 is impossible; .* has 64 positions"):
        loop.harvest_rates(command._read_by_harvest(str(tmp_path / "run.yaml"), "cpu"), tmp_path)


def test_what_a_small_store_has_not_is_not_asked_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "SECONDS", 0.3)
    monkeypatch.setattr(loop, "ROUNDS", 1)
    shape = Shape(activation_dim=16, dict_size=96, k=4, batch_size=200_000, kind="batch_topk", dtype="float64")
    found = rates.measure(shape, 1, 1, command._read_by_harvest(None, "cpu"), tmp_path)
    assert 1000 < found["training"]["batch_size"] < 30_000
    assert not list(tmp_path.iterdir())


def test_phases_sum_to_the_step_and_nested_time_counts_once() -> None:
    ticks = iter(range(100))

    @phase("inner")
    def inner() -> None:
        """Takes one tick."""

    with record(lambda: next(ticks)) as times, phase("outer"):
        inner()
        inner()
    # The clock is read at 0 and then at each border: outer, inner, inner's end, …
    assert times.seconds == {"other": 2, "outer": 3, "inner": 2}


def test_phases_sum_to_the_steps_of_every_contestant() -> None:
    shape = Shape(activation_dim=16, dict_size=96, k=4, batch_size=32, dead=0.2)
    result = measure(["sparse", "dense"], shape, Plan(rounds=2, warmup=2))
    for entry in result.measured:
        assert entry.median_phases()["aux-k"] > 0
        for seconds, phases in zip(entry.seconds, entry.phases, strict=True):
            assert sum(phases.values()) == pytest.approx(seconds, rel=0.3)


def test_a_library_that_is_not_there_costs_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # A module of that name that cannot be imported stands for one that is not installed.
    (tmp_path / "sae_lens.py").write_text("raise ImportError('No module named sae_lens')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    arguments = ["bench", *TINY, "--store-mb", "0", "--out", str(tmp_path), "--against", "sae_lens"]
    assert main(arguments) == 0
    lines = [line for line in capfd.readouterr().out.splitlines() if "sae_lens" in line]
    assert len(lines) == 1
    assert "not installed here" in lines[0]
    assert "--against sae_lens=" in lines[0]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--against", "sae_lenz"], "did you mean 'sae_lens'?"),
        (["--against", "sae_lens=/nowhere/python"], "is not a file"),
        (["--kind", "temporl"], "temporal"),
        (["-k", "1000"], "sae.k"),
        (["--rounds", "0"], "at least 1"),
        (["--warmup", "-1"], "at least 0"),
        (["--device", "tpu"], "allowed: cpu, cuda, cuda:N"),
        (["--device", "cuda:99"], "no such GPU"),
        (["--dead", "1.5"], "share"),
        (
            ["--kind", "matryoshka", "--objective", "scale_free"],
            "--objective scale_free: a matryoshka SAE has no temporal",
        ),
        (["--growth", "2,x"], "positive numbers"),
        (["--processes", "2,1.5"], "whole numbers"),
        (["--processes", "3"], "cannot be shared by 3 processes"),
        (["--out", "/dev/null/results"], "/dev/null"),
        (["--config", "/nowhere.yaml"], "/nowhere.yaml"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *TINY, *arguments]) == 2
    complaint = capsys.readouterr().err
    assert said in complaint
    assert complaint.count("\n") == 1


def test_every_contestant_sees_the_same_batches() -> None:
    shape = Shape(activation_dim=8, dict_size=64, k=2, batch_size=16)
    for one, other in zip(batches(shape, 2), batches(shape, 2), strict=True):
        assert torch.equal(one, other)
    assert one.shape == (16, 2, 8)


def test_presets_are_possible_runs() -> None:
    for sizes in PRESETS.values():
        assert Shape(**sizes).run_config("sparse").sae.dict_size == sizes["dict_size"]


def test_the_command_line_does_not_load_torch() -> None:
    code = "import sys, tsae.cli; tsae.cli._parser(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_one_that_is_ended_leaves_nothing_behind(tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    words = [sys.executable, "-m", "tsae", "bench", *TINY, "--rounds", "200000", "--out", str(tmp_path / "out")]
    with subprocess.Popen(words, env={**os.environ, "TMPDIR": str(scratch)}, stderr=subprocess.PIPE) as process:
        deadline = time.monotonic() + 120
        while not list(scratch.iterdir()) and not list(tmp_path.glob("out/rates-*")):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.terminate()
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"Traceback" not in said
    assert not list(scratch.iterdir())
    assert not list(tmp_path.glob("out/*"))
