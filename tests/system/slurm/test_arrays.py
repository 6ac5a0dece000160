"""Stages become arrays that wait for each other element by element, on the resources that were asked for."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.system.slurm.slurm_sweep import SweepOnSlurm
from tsae.runtime.errors import TsaeError
from tsae.sweep.attempt import attempts, newest_jobs
from tsae.sweep.schedulers.base import Limits
from tsae.sweep.schedulers.slurm.scheduler import Slurm

HERE = Path(__file__).parent


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def test_a_chain_runs_in_order_and_one_failure_costs_its_own_point_only(sweep: SweepOnSlurm) -> None:
    """Three points: one is well, one fails in training, one dies without a word; the report comes after all."""
    notes = sweep.home / "notes"
    work: dict[str, tuple[Any, ...]] = {
        "a": ("tests.system.slurm.errands:note", str(notes / "train a"), 0.5),
        "b": ("tests.system.slurm.errands:fail", "no luck\ntoday"),
        "c": ("tests.system.slurm.errands:die",),
    }
    harvest = sweep.stage("h", "tests.system.slurm.errands:note", str(notes / "harvest"), kind="harvest")
    trains = [sweep.stage(f"t{name}", *does, after=("h",)) for name, does in work.items()]
    evaluates = [
        sweep.stage(
            f"e{name}",
            "tests.system.slurm.errands:note",
            str(notes / f"e{name}"),
            kind="evaluate",
            after=("h", f"t{name}"),
        )
        for name in work
    ]
    report = sweep.stage(
        "r",
        "tests.system.slurm.errands:note",
        str(notes / "report"),
        kind="report",
        after=("ea", "eb", "ec"),
        after_failures=True,
    )
    jobs = sweep.submit(harvest, *trains, *evaluates, report)
    assert len({entry.job.partition("_")[0] for entry in jobs.values()}) == 4
    sweep.wait_until_over()
    order = [read(notes / name) for name in ("harvest", "train a", "ea", "report")]
    assert all(before["ended"] <= after["began"] for before, after in itertools.pairwise(order))
    assert sorted(path.name for path in notes.iterdir()) == ["ea", "harvest", "report", "train a"]
    assert sweep.state("ta")["state"] == "done"
    assert (sweep.state("tb")["state"], sweep.state("tb")["error"]) == ("failed", "ValueError: no luck today")
    assert sweep.state("tc")["state"] == "running"  # it could not tell; Slurm does
    seen = {name: sweep.queue()[jobs[name].job][0] for name in jobs}
    assert seen == {
        **dict.fromkeys(("h", "ta", "ea", "r"), "COMPLETED"),
        **dict.fromkeys(("tb", "tc"), "FAILED"),
        **dict.fromkeys(("eb", "ec"), "CANCELLED"),
    }
    assert "raise ValueError(words)" in Path(jobs["tb"].log).read_text()
    assert sweep.state("tb")["log"] == jobs["tb"].log
    assert newest_jobs(sweep.folder) == jobs


def test_an_array_never_runs_more_jobs_than_it_may_and_is_cut_where_the_cluster_says(
    sweep: SweepOnSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = Slurm().limits()
    monkeypatch.setattr(Slurm, "limits", lambda _self: Limits(known.cluster, 4))
    names = [f"s{number}" for number in range(6)]
    stages = [sweep.stage(name, "tests.system.slurm.errands:note", str(sweep.home / name), 0.7) for name in names]
    later = [
        sweep.stage(
            f"l{name}", "tests.system.slurm.errands:note", str(sweep.home / f"l{name}"), kind="evaluate", after=(name,)
        )
        for name in names
    ]
    jobs = sweep.submit(*stages, *later, max_parallel=2)
    assert len({jobs[name].job.partition("_")[0] for name in names}) == 2
    sweep.wait_until_over()
    for part in (names[:4], names[4:]):
        spans = [read(sweep.home / name) for name in part]
        assert max(sum(s["began"] <= span["began"] < s["ended"] for s in spans) for span in spans) == 2
    for name in names:
        assert read(sweep.home / name)["ended"] <= read(sweep.home / f"l{name}")["began"]


def test_jobs_get_what_they_ask_for_and_keep_the_gpus_that_slurm_allots(sweep: SweepOnSlurm) -> None:
    notes = [str(sweep.home / name) for name in "abc"]
    common = {"partition": "main", "extra": {"nodelist": "n1", "comment": "mine"}}
    jobs = sweep.submit(
        sweep.stage(
            "first", "tests.system.slurm.errands:note", notes[0], 8.0, gpus=2, tasks=1, cpus=3, mem="1G", **common
        ),
        sweep.stage(
            "second",
            "tests.system.slurm.errands:note",
            notes[1],
            gpus=2,
            tasks=1,
            time="2h",
            gres="gpu:{gpus}",
            **common,
        ),
        sweep.stage("third", "tests.system.slurm.errands:note", notes[2], gpus=0, tasks=1, kind="harvest"),
        environment={"MY_OWN": "a b"},
        setup=("export MY_SETUP=$((1 + 1))",),
    )
    sweep.wait_until_over()
    first, second, third = (read(Path(path))["environment"] for path in notes)
    assert {first["CUDA_VISIBLE_DEVICES"], second["CUDA_VISIBLE_DEVICES"]} == {"0,1", "2,3"}
    assert "CUDA_VISIBLE_DEVICES" not in third
    assert (first["SLURM_CPUS_PER_TASK"], first["SLURM_MEM_PER_NODE"]) == ("3", "1024")
    assert (first["MY_OWN"], first["MY_SETUP"]) == ("a b", "2")
    assert sweep.state("first")["gpus"] == first["CUDA_VISIBLE_DEVICES"]
    assert sweep.state("second")["host"] == "n1"
    text = next(Path(jobs["second"].log).parent.glob("*_submission.sh")).read_text()
    assert "#SBATCH --gres=gpu:2" in text
    assert "#SBATCH --comment=mine" in text
    assert "#SBATCH --time=120" in text


def test_jobs_run_the_code_of_their_attempt_whatever_happens_to_the_checkout(sweep: SweepOnSlurm) -> None:
    note = sweep.home / "note"
    jobs = sweep.submit(sweep.stage("s", "tests.system.slurm.errands:note", str(note)))
    sweep.wait_until_over()
    (attempt,) = attempts(sweep.folder)
    assert Path(read(note)["code"]) == attempt.code / "tsae" / "runtime" / "preemption.py"
    record = read(attempt.folder / "provenance.json")
    assert len(record["commit"]) == 40
    assert {"torch", "submitit", "tsae"} <= set(record["packages"])
    assert (attempt.folder / "sweep.yaml").read_text() == "name: tiny"
    assert attempt.jobs() == list(jobs.values())


def test_jobs_find_what_the_launching_shell_and_the_site_s_modules_put_on_pythonpath(
    sweep: SweepOnSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The copy of the code wins over both, and over a package of its name that stands there."""
    places = {name: sweep.home / name for name in ("shell", "module")}
    for name, place in places.items():
        (place / f"my_{name}").mkdir(parents=True)
        (place / f"my_{name}" / "__init__.py").touch()
        (place / "tsae").mkdir()
        (place / "tsae" / "__init__.py").write_text("raise SystemExit('the wrong one')")
    monkeypatch.chdir(sweep.home)
    monkeypatch.setenv("PYTHONPATH", ":shell:")
    errand = "tests.system.slurm.errands:note_package"
    stages = [sweep.stage(name, errand, str(sweep.home / f"{name}.json"), f"my_{name}") for name in places]
    submission = sweep.submission(setup=(f'export PYTHONPATH={places["module"]}:"$PYTHONPATH"',))
    submission.submit(stages)
    sweep.wait_until_over()
    for name, place in places.items():
        seen = read(sweep.home / f"{name}.json")
        assert Path(seen["package"]).is_relative_to(place)
        assert Path(seen["code"]).is_relative_to(submission.attempt.code)
        own = submission.cluster.environment["PYTHONPATH"]
        assert seen["path"].split(":") == [
            str(submission.attempt.code),
            own,
            str(places["module"]),
            str(places["shell"]),
        ]


def test_a_dry_run_shows_the_scripts_that_are_submitted(sweep: SweepOnSlurm) -> None:
    stages = [sweep.stage(name, "tests.system.slurm.errands:note", str(sweep.home / name)) for name in "ab"]
    stages.append(
        sweep.stage("c", "tests.system.slurm.errands:note", str(sweep.home / "c"), kind="evaluate", after=("a", "b"))
    )
    submission = sweep.submission()
    texts = submission.texts(stages)
    submission.submit(stages)
    scripts = sorted(submission.attempt.folder.glob("*/*_submission.sh"))
    ids = {f"<{path.parent.name}>": path.name.partition("_")[0] for path in scripts}
    for text, path in zip(texts, scripts, strict=True):
        for words, job in ids.items():
            text = text.replace(f"'afterok:{words}'", f"afterok:{job}")
        assert text == path.read_text()
    sweep.wait_until_over()


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"partition": "nowhere"}, "nvalid partition"),
        ({"gpus": 9}, "Requested node configuration is not available"),
        ({"extra": {"frobnicate": 1}}, "unrecognized option"),
    ],
)
def test_what_slurm_refuses_is_one_line_and_leaves_nothing_submitted(
    sweep: SweepOnSlurm, asked: dict[str, Any], words: str, capfd: pytest.CaptureFixture[str]
) -> None:
    good = sweep.stage("h", "tests.system.slurm.errands:note", str(sweep.home / "h"), kind="harvest")
    with pytest.raises(TsaeError, match=words) as caught:
        sweep.submit(
            good, sweep.stage("t", "tests.system.slurm.errands:note", str(sweep.home / "t"), after=("h",), **asked)
        )
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")
    # Slurm keeps a record of some jobs that it did not take.
    assert "CANCELLED" in {state for state, _ in sweep.queue().values()} <= {"CANCELLED", "FAILED"}
    assert attempts(sweep.folder) == []
    assert not sweep.state("h")


def test_a_cancelled_job_stays_cancelled_and_others_are_left_alone(sweep: SweepOnSlurm) -> None:
    """Both count; the one that is cancelled saves its count, and is not queued again as a preempted one would be."""
    counters = [sweep.home / name for name in ("mine", "yours")]
    jobs = sweep.submit(
        sweep.stage("mine", "tests.system.slurm.errands:count_up", str(counters[0]), 1000),
        sweep.stage("yours", "tests.system.slurm.errands:count_up", str(counters[1]), 60),
    )
    sweep.wait(lambda: sweep.state("mine") and sweep.state("yours"))
    Slurm().cancel([jobs["mine"].job])
    sweep.wait_until_over()
    assert sweep.queue()[jobs["mine"].job][0] == "CANCELLED"
    assert 0 < read(counters[0])["counted"] < 1000
    assert read(counters[1])["counted"] == 60
    Slurm().cancel([jobs["mine"].job])  # a second time does no harm


def test_a_sweep_can_be_submitted_from_inside_a_job(sweep: SweepOnSlurm) -> None:
    """The inner job has its own size, whatever the outer one's variables say."""
    inner = sweep.home / "inner"
    script = sweep.home / "outer.py"
    script.write_text(
        f"""\
from pathlib import Path
from tests.system.slurm.slurm_sweep import SweepOnSlurm
sweep = SweepOnSlurm(Path({str(sweep.home / "outer")!r}))
sweep.submit(sweep.stage("inner", "tests.system.slurm.errands:note", {str(inner)!r}, tasks=1, cpus=2))
"""
    )
    command = [sys.executable, str(script)]
    environment = {**os.environ, "PYTHONPATH": str(HERE.parents[2])}
    subprocess.run(["srun", "--ntasks=1", "--cpus-per-task=5", "--mem=300M", *command], env=environment, check=True)
    SweepOnSlurm(sweep.home / "outer").wait_until_over()
    seen = read(inner)["environment"]
    assert (seen["SLURM_CPUS_PER_TASK"], seen["SLURM_MEM_PER_NODE"]) == ("2", "200")


def test_a_job_waits_while_another_process_works_on_its_output(sweep: SweepOnSlurm) -> None:
    free = sweep.home / "free"
    jobs = sweep.submit(sweep.stage("s", "tests.system.slurm.errands:wait_for_lock", str(free)))
    log = Path(jobs["s"].log)
    sweep.wait(lambda: log.exists() and "somebody is working on it" in log.read_text())
    assert sweep.state("s")["state"] == "running"
    free.touch()
    sweep.wait_until_over()
    assert sweep.state("s")["state"] == "done"
