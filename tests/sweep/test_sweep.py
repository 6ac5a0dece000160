"""`launch/sweep.py` as a user runs it: a tiny language model, local text, real processes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tsae.cli import main
from tsae.runtime import locks, processes

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def sweep_file(tmp_path_factory, tiny_model, text):
    """A sweep of two fractions on the tiny model; one point takes a second or two beyond its imports."""
    folder = tmp_path_factory.mktemp("sweep")
    base = {
        "model": {"name": str(tiny_model), "layer": 1},
        "data": {"source": str(text), "context_length": 32, "min_length": 8, "holdout": 0.2},
        "sae": {"dict_size": 64, "k": 6},
        "training": {"steps": 40, "batch_size": 64, "lr": 1e-3, "warmup_steps": 5, "resume_every": 10}
        | {"threshold_start_step": 10, "threshold_beta": 0.9, "pool_sequences": 64},
        "evaluation": {"sequences": 20, "loss_sequences": 4},
    }
    (folder / "tiny.yaml").write_text(yaml.safe_dump(base))
    path = folder / "fractions.yaml"
    # Work this small only loses by threads that wait for each other.
    one_core = {stage: {"cpus": 1} for stage in ("harvest", "train", "evaluate")}
    sweep = {"base": "tiny.yaml", "grid": {"sae.split_fraction": [0.25, 0.5]}, "resources": one_core}
    path.write_text(yaml.safe_dump(sweep))
    return path


@pytest.fixture(scope="session")
def raced(sweep_file, tmp_path_factory):
    """The TSAE_HOME and the outputs of two launchers that ran the same sweep at the same time."""
    folder = tmp_path_factory.mktemp("raced") / "home"
    environ = os.environ | {"TSAE_HOME": str(folder)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    pair = [subprocess.Popen(command(sweep_file), env=environ, **pipes) for _ in range(2)]
    outputs = [launcher.communicate() for launcher in pair]
    assert [launcher.returncode for launcher in pair] == [0, 0], outputs
    return folder, outputs


@pytest.fixture
def finished(raced, home):
    """The test's own copy of a TSAE_HOME with a finished sweep."""
    shutil.copytree(raced[0], home)
    return home


def command(*arguments, script="sweep.py"):
    return [sys.executable, str(REPOSITORY / "launch" / script), *map(str, arguments)]


def status(*arguments):
    """What `status.py` says, as lines."""
    done = subprocess.run(command(*arguments, script="status.py"), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def cells(lines, first):
    """The words of the line that begins with `first`."""
    return next(line for line in lines if line.startswith(first)).split()


def run(*arguments, code=0):
    done = subprocess.run(command(*arguments), capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    return done


def recorded_steps(run_folder):
    return [json.loads(line)["step"] for line in (run_folder / "metrics.jsonl").read_text().splitlines()]


def test_a_sweep_ends_in_a_report(raced):
    _, outputs = raced
    page = Path(outputs[0][0].splitlines()[-1].removeprefix("report: "))
    assert page.read_text().count("data:image/png;base64,") == 5
    points = json.loads(page.with_name("results.json").read_text())["points"]
    assert [point["name"] for point in points] == ["split_fraction=0.25", "split_fraction=0.5"]
    assert all(0 < point["results"]["l0"] < 64 for point in points)


def test_two_launchers_at_once_do_each_stage_once(raced):
    home, outputs = raced
    assert all("report: " in out for out, _ in outputs)
    for run_folder in home.glob("checkpoints/fractions-tiny/*/trainer_0"):
        assert recorded_steps(run_folder) == sorted(set(recorded_steps(run_folder)))
    assert not list(home.rglob("*.lock"))


def test_a_second_run_does_nothing_and_says_so(sweep_file, finished):
    run(sweep_file)
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()}
    again = run(sweep_file)
    assert "nothing to do, all 2 points are complete" in again.stderr
    assert "report: " in again.stdout
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()} == before


def test_a_point_that_cannot_train_does_not_take_the_others_with_it_and_is_tried_again_only_when_asked(
    sweep_file, finished
):
    foreign = finished / "checkpoints" / "fractions-tiny" / "split_fraction=0.5" / "trainer_0" / "ae.pt"
    shutil.rmtree(foreign.parent)
    foreign.parent.mkdir()
    foreign.write_bytes(b"somebody's weights")
    done = run(sweep_file, "--executor", "local", code=1)
    assert "train split_fraction=0.5: FAILED" in done.stderr
    assert "1 of 2 points are not complete" in done.stderr
    log = done.stderr.partition("log: ")[2].splitlines()[0]
    assert "holds weights but no resolved.yaml" in Path(log).read_text()
    assert "split_fraction=0.5  (not trained)" in done.stdout.replace("   ", "  ")
    assert "split_fraction=0.25    0." in done.stdout
    assert foreign.read_bytes() == b"somebody's weights"

    foreign.unlink()
    seen = status(sweep_file)
    assert cells(seen, "train") == ["train", "1/2", "1"]
    assert cells(seen, "split_fraction=0.5")[1:3] == ["train", "failed"]
    assert any("holds weights but no resolved.yaml" in line for line in seen)
    again = run(sweep_file, code=1)
    assert "train split_fraction=0.5: failed before: " in again.stderr
    assert "--retry-failed" in again.stderr
    assert not foreign.exists()
    assert "report: " in run(sweep_file, "--retry-failed").stdout
    assert foreign.exists()
    assert cells(status(sweep_file), "train") == ["train", "2/2"]


def test_a_detached_sweep_is_seen_from_another_shell_and_ended_by_its_name_alone(sweep_file, finished):
    endless = (sweep_file, "training.steps=1000000")
    bystander = (sweep_file, "training.steps=1000001")
    for sweep in (endless, bystander):
        assert "python launch/status.py" in run(*sweep, "--detach").stderr
    for sweep in (endless, bystander):
        wait_for(
            lambda sweep=sweep: ("running" in "".join(status(*sweep)) and " steps" in "".join(status(*sweep))) or None
        )
    point = cells(status(*endless), "split_fraction=0.25")
    assert point[1:3] == ["train", "running"]
    assert "tokens/s" in point
    assert cells(status(*endless), "evaluate") == ["evaluate", "0/2", "2"]
    assert any("already" in line or "step" in line for line in status(*endless, "--logs", "split_fraction=0.25"))

    assert "ended a local queue with 2 running" in run(*endless, "--cancel").stdout
    assert cells(status(*endless), "split_fraction=0.25")[1:3] == ["train", "interrupted"]
    assert cells(status(*bystander), "split_fraction=0.25")[1:3] == ["train", "running"]
    assert "nothing is running or queued" in run(*endless, "--cancel").stdout
    run(*bystander, "--cancel")
    assert not [lock for lock in finished.rglob("*.lock") if locks.owner(lock)]


def test_a_sweep_survives_its_terminal(sweep_file, finished):
    next(finished.rglob("split_fraction=0.5/trainer_0/eval_results.json")).unlink()
    with subprocess.Popen(command(sweep_file), stderr=subprocess.PIPE, text=True, start_new_session=True) as launcher:
        assert any("points" in line for line in launcher.stderr)
        os.killpg(launcher.pid, signal.SIGHUP)
    assert launcher.returncode == -signal.SIGHUP
    assert cells(status(sweep_file), "split_fraction=0.5")[1] == "evaluate"
    wait_for(lambda: cells(status(sweep_file), "report") == ["report", "1/1"] or None)
    assert "nothing to do" in run(sweep_file).stderr


@pytest.mark.usefixtures("finished")
def test_a_point_trains_in_as_many_processes_as_the_sweep_asks_for(sweep_file):
    asked = {"grid": {"sae.split_fraction": [0.25]}, "resources": {"train": {"tasks": 2, "cpus": 1}}}
    path = sweep_file.with_name("fractions-of-two.yaml")
    path.write_text(yaml.safe_dump(yaml.safe_load(sweep_file.read_text()) | asked))
    assert "report: " in run(path, "training.processes=2").stdout


def test_a_launcher_and_a_job_that_are_killed_are_continued(sweep_file, finished):
    sweep = yaml.safe_load(sweep_file.read_text()) | {"grid": {"sae.split_fraction": [0.25]}}
    sweep_file.with_name("one.yaml").write_text(yaml.safe_dump(sweep))
    long = (sweep_file.with_name("one.yaml"), "training.steps=600", "training.resume_every=150")
    with subprocess.Popen(command(*long), stderr=subprocess.DEVNULL) as launcher:
        lock = wait_for(lambda: next(iter((finished / "checkpoints").rglob("train.lock")), None))
        wait_for(lambda: any((lock.parent / "resume").glob("*")) or None)
        launcher.send_signal(signal.SIGKILL)
    holder = locks.owner(lock)
    os.kill(holder.pid, signal.SIGKILL)
    assert "report: " in run(*long).stdout
    assert (lock.parent / "eval_results.json").exists()
    assert recorded_steps(lock.parent) == sorted(set(recorded_steps(lock.parent)))
    assert recorded_steps(lock.parent)[-1] == 599


def test_an_interrupted_launcher_leaves_no_process_behind(sweep_file, finished):
    endless = command(sweep_file, "training.steps=1000000")
    with subprocess.Popen(endless, stderr=subprocess.PIPE, text=True) as launcher:
        lock = wait_for(lambda: next(iter(finished.rglob("train.lock")), None))
        holder = wait_for(lambda: locks.owner(lock))
        launcher.send_signal(signal.SIGINT)
        said = launcher.stderr.read()
    assert launcher.returncode == 130
    assert "the same command continues" in said
    assert processes.started_at(holder.pid) == ""
    assert locks.owner(lock) is None


def test_a_dry_run_shows_everything_and_writes_nothing(sweep_file, home):
    shown = run(sweep_file, "--dry-run").stdout
    assert "2 points" in shown
    assert "6 stages, 6 to run" in shown
    assert {path.name for path in home.glob("*")} <= {"contents"}  # hashes of files, which cost time


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "SWEEP: the sweep's YAML is missing"),
        (("nowhere.yaml",), "nowhere.yaml: cannot be read"),
        (("split_fractoin",), "split_fractoin: no file, and no shipped sweep; did you mean 'split_fraction'"),
        ((".",), ".: a folder without attempts/"),
        (("{sweep}", "sae.kk=3"), "command line: sae.kk: unknown key; did you mean 'k'"),
        (("{sweep}", "model.layer=3"), "model.layer: 3 is impossible"),
        (("{sweep}", "--base", "pythia"), "did you mean 'pythia-160m'"),
        (("{sweep}", "--executor", "slurm"), "no controller answers"),
        (("{sweep}", "--cluster", "nowhere.yaml", "--dry-run"), "nowhere.yaml: cannot be read"),
        (("{sweep}", "--container", "nowhere.sif", "--dry-run"), "--container nowhere.sif: "),
    ],
)
def test_bad_input_is_one_line_and_code_2(sweep_file, home, arguments, message):
    done = run(*(argument.format(sweep=sweep_file) for argument in arguments), code=2)
    assert message in done.stderr
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1
    assert {path.name for path in home.glob("*")} <= {"contents"}  # hashes of files, which cost time


def test_help_loads_nothing_heavy():
    script = "import sys; from tsae.cli import _parser; _parser()\n"
    script += (
        "print([name for name in ('torch', 'numpy', 'submitit', 'matplotlib', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert "--dry-run" in run("--help").stdout


def wait_for(look):
    """What `look` finds, as soon as it finds something."""
    deadline = time.monotonic() + 120
    while (found := look()) is None:
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)
    return found


def test_what_a_job_that_was_killed_after_its_work_left_is_cleared_by_the_next_launch(sweep_file, finished):
    folders = sorted((finished / "checkpoints").rglob("trainer_0"))
    for folder in folders:
        (folder / "resume" / "step_39").mkdir(parents=True)
        (folder / "eval_results.json").unlink()
        hold = f"import pathlib, os\nfrom tsae.runtime import locks\nlocks.Lock(pathlib.Path({str(folder / 'train.lock')!r}), 'x')"
        subprocess.run([sys.executable, "-c", hold + "\nos._exit(0)"], check=True)
        assert (folder / "train.lock").exists()
    run(sweep_file)
    for folder in folders:
        assert (folder / "eval_results.json").exists()
        assert not (folder / "resume").exists()
        assert not (folder / "train.lock").exists()


def test_runs_sweeps_and_stores_are_listed(finished, capsys):
    (finished / "stores" / "notes.txt").write_text("no store")
    assert main(["runs"]) == 0
    runs, sweeps, stores = (part.splitlines() for part in capsys.readouterr().out.strip().split("\n\n"))
    (store,) = (path for path in (finished / "stores").iterdir() if path.is_dir())
    assert len(runs) - 2 == len(list(finished.glob("checkpoints/*/*/trainer_0")))
    assert sweeps[0].startswith("sweeps ")
    assert stores[0].startswith("stores ")
    name, tokens, *_, state = stores[2].split()
    assert name == store.name
    assert int(tokens.replace(",", "")) > 0
    assert f" {len(runs) - 2} " in stores[2]
    assert state == "whole"
    next(path for path in (store / "activations" / "c").rglob("*") if path.is_file()).unlink()
    assert main(["runs"]) == 0
    assert capsys.readouterr().out.rstrip().endswith("not finished")
    (store / "zarr.json").write_text("{")
    assert main(["runs"]) == 0
    assert "damaged: " in capsys.readouterr().out.splitlines()[-1]
