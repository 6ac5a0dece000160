"""What is on disk counts only for what it was made from: what changed, against whoever reads it.

Changed: the text (also with equal size and time), the middle of the language model's weights, the commit of a hub model, the
threshold, the weights, labelled texts, a measure. Readers: harvest, train, evaluate, experiments, calibrate, sweep,
status, report, runs, push.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import yaml

from tsae.checkpoint import RunFolder
from tsae.cli import main
from tsae.evaluation import measures
from tsae.experiments import registry

SWEEP = "sweep.yaml"


class Place:
    """A user's folder: a model, a text, labelled texts, a run's YAML and a sweep over it, all complete."""

    def __init__(self, root: Path) -> None:
        self.root, self.home = root, root / "home"
        self.text, self.model, self.labelled = root / "text.jsonl", root / "model", root / "labelled.jsonl"
        self.run = RunFolder.of(self.home / "checkpoints" / "sweep-run", "k=4")

    def results(self) -> dict[str, object]:
        """Content of eval_results.json."""
        return json.loads(self.run.eval_results.read_text())

    def probing(self) -> dict[str, object]:
        """Content of the probes' results."""
        return json.loads(self.run.result("probing_chunk0", "json").read_text())


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, text: Path) -> Path:
    """A place with a complete sweep of one point, made once."""
    root = tmp_path_factory.mktemp("identity") / "place"
    shutil.copytree(tiny_model, root / "model")
    shutil.copy(text, root / "text.jsonl")
    words = [json.loads(line)["text"] for line in text.read_text().splitlines()]
    rows = [{"text": text, "label": "ab"[index % 2]} for index, text in enumerate(words)]
    (root / "labelled.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    probe = {"dataset": "labelled.jsonl", "tasks": ["semantics"], "seeds": 2}
    run = {
        "model": {"name": "model", "layer": 1, "device": "cpu"},
        "data": {"source": "text.jsonl", "context_length": 16},
        "store": {"shard_mb": 1},
        "sae": {"dict_size": 32, "k": 4},
        "training": {"steps": 20, "batch_size": 32, "device": "cpu", "threshold_beta": 0.5},
        "evaluation": {"sequences": 8, "loss_sequences": 4, "ablation": "mean"},
        "experiments": {"probe": probe, "texts": {"min_characters": 8, "count": 40, "context_length": 16}},
    }
    (root / "run.yaml").write_text(yaml.safe_dump(run))
    sweep = {"base": "run.yaml", "grid": {"sae.k": [4]}, "stages": ["harvest", "train", "evaluate", "probe", "report"]}
    (root / SWEEP).write_text(yaml.safe_dump(sweep))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setenv("TSAE_HOME", str(root / "home"))
        assert main(["sweep", SWEEP, "--executor", "debug"]) == 0
    return Path(shutil.move(root, root.with_name("finished")))


@pytest.fixture
def place(finished: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    """A copy of it where it was made, in which commands are given."""
    root = finished.with_name("place")
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(finished, root)
    monkeypatch.chdir(root)
    monkeypatch.setenv("TSAE_HOME", str(root / "home"))
    return Place(root)


def same_size(path: Path) -> None:
    """Another text of equal size, with the times of the old one."""
    status = path.stat()
    content = path.read_bytes()
    middle = len(content) // 2
    path.write_bytes(content[:middle] + content[middle:].replace(b"ka", b"lo").replace(b"mi", b"ru"))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert path.stat().st_size == status.st_size


def longer(path: Path) -> None:
    """Some more documents."""
    path.write_bytes(path.read_bytes() + b"".join(path.read_bytes().splitlines(keepends=True)[:20]))


def fine_tuned(folder: Path) -> None:
    """A weight in the middle of the file is another, in place."""
    path = folder / "model.safetensors"
    size, weights = path.stat().st_size, safetensors.torch.load_file(path)
    name = "gpt_neox.layers.0.mlp.dense_h_to_4h.weight"
    weights[name] = -3 * weights[name]
    safetensors.torch.save_file(weights, path, {"format": "pt"})
    assert path.stat().st_size == size


CHANGES: dict[str, tuple[Callable[[Place], None], str]] = {
    "text": (lambda place: longer(place.text), "data.source: {root}/text.jsonl"),
    "text-of-equal-size-and-time": (lambda place: same_size(place.text), "data.source: {root}/text.jsonl"),
    "model": (lambda place: fine_tuned(place.model), "model.name: {root}/model"),
}
RUN = ["--checkpoints-path", "home/checkpoints/sweep-run", "--run-name", "k=4"]
READERS = {
    "train": ["train", "run.yaml", *RUN],
    "evaluate": ["evaluate", "run.yaml", *RUN],
    "calibrate": ["calibrate", "home/checkpoints/sweep-run/k=4", "--target-l0", "2"],
    "sweep": ["sweep", SWEEP, "--executor", "debug"],
    "dry-run": ["sweep", SWEEP, "--executor", "debug", "--dry-run"],
    "features": ["features", *RUN],
    "explain": ["explain", *RUN],
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("change", CHANGES)
def test_a_run_is_not_read_on_data_that_it_was_not_trained_on(
    place: Place, capsys: pytest.CaptureFixture[str], change: str, reader: str
) -> None:
    make, named = CHANGES[change]
    before = {path: path.read_bytes() for path in place.run.path.iterdir() if path.is_file()}
    stores = set(place.home.glob("stores/*"))
    make(place)
    assert main(READERS[reader]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"trained on other data: {named.format(root=place.root)}" in said
    assert "has another content now" in said
    assert "--accept-new-data" in said
    kept = {path: path.read_bytes() for path in place.run.path.iterdir() if path.is_file()}
    assert {path: kept[path] for path in before} == before
    assert set(place.home.glob("stores/*")) == stores


@pytest.mark.parametrize("change", CHANGES)
def test_status_and_report_say_it_and_show_what_was_measured(
    place: Place, capsys: pytest.CaptureFixture[str], change: str
) -> None:
    make, named = CHANGES[change]
    make(place)
    assert main(["status", SWEEP]) == 0
    said, named = capsys.readouterr().out, named.format(root=place.root)
    assert f"trained on other data: k=4: {named} has another content now" in said
    assert main(["report", SWEEP]) == 0
    page = (place.home / "sweeps/sweep-run/report/report.html").read_text()
    assert f"k=4: {named} has another content now" in page


@pytest.mark.parametrize("change", CHANGES)
def test_accepted_data_are_harvested_and_measured_and_the_results_say_so(place: Place, change: str) -> None:
    weights, before, probing = place.run.weights.read_bytes(), place.results(), place.probing()
    CHANGES[change][0](place)
    assert main([*READERS["sweep"], "--accept-new-data"]) == 0
    assert len(list(place.home.glob("stores/model-layer1-*"))) == 2
    after = place.results()
    assert place.run.weights.read_bytes() == weights
    assert after["frac_variance_explained"] != before["frac_variance_explained"]
    assert after["made_from"]["data"] != before["made_from"]["data"]
    assert (before["trained_on_other_data"], after["trained_on_other_data"]) == (False, True)
    assert (place.probing()["headline"] != probing["headline"]) == (change == "model")
    page = (place.home / "sweeps/sweep-run/report/report.html").read_text()
    assert "k=4: measured on other data than it was trained on" in page
    # Decided once: the next command has nothing to do, and does not ask again.
    assert main(READERS["evaluate"]) == 0
    assert place.results() == after


def test_what_was_restored_is_the_old_data_again(place: Place) -> None:
    before, content = place.results(), place.text.read_bytes()
    longer(place.text)
    assert main([*READERS["evaluate"][:2], *RUN]) == 2
    place.text.write_bytes(content)
    assert main(READERS["evaluate"]) == 0
    assert place.results() == before


def test_accepting_and_going_back_is_a_decision_too(place: Place) -> None:
    before, content = place.results(), place.text.read_bytes()
    longer(place.text)
    assert main(["harvest", "run.yaml"]) == 0
    assert main([*READERS["evaluate"], "--accept-new-data"]) == 0
    place.text.write_bytes(content)
    assert main(READERS["evaluate"]) == 2
    assert main([*READERS["evaluate"], "--accept-new-data"]) == 0
    assert place.results() == before


def test_a_training_that_was_begun_is_not_continued_on_other_data(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    place.run.weights.unlink()
    (place.run.resume / "step_10").mkdir(parents=True)
    longer(place.text)
    for more in ([], ["--accept-new-data"]):
        assert main([*READERS["train"], *more]) == 2
        said = capsys.readouterr().err.strip().splitlines()[-1]
        assert "/text.jsonl has another content now; train under another name, or remove the folder" in said


@pytest.mark.parametrize("change", ["text", "model"])
def test_a_changed_text_matters_to_probes_only_where_the_model_is_another(
    place: Place, capsys: pytest.CaptureFixture[str], change: str
) -> None:
    before = place.probing()
    CHANGES[change][0](place)
    assert main(["probe", *RUN]) == (2 if change == "model" else 0)
    assert place.probing() == before
    assert ("was trained on another language model" in capsys.readouterr().err) == (change == "model")


def test_a_calibrated_run_is_measured_again_by_all(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    before, probing = place.results(), place.probing()
    assert main(READERS["calibrate"]) == 0
    capsys.readouterr()
    assert main(["runs"]) == 0
    assert "evaluated" not in capsys.readouterr().out
    assert main(["push", "home/checkpoints/sweep-run/k=4", "me/sae", "--dry-run"]) == 0
    assert "Not evaluated" in capsys.readouterr().out
    assert main(READERS["dry-run"]) == 0
    assert "5 stages, 3 to run" in capsys.readouterr().out  # evaluate, probe, report
    assert main(["report", SWEEP]) == 0
    table = (place.home / "sweeps/sweep-run/report/table.csv").read_text()
    assert "trained, not evaluated" in table
    assert main(READERS["sweep"]) == 0
    after = place.results()
    assert after["l0"] < before["l0"]
    assert after["made_from"]["weights"] == place.probing()["made_from"]["weights"]
    assert place.probing()["made_from"]["weights"] != probing["made_from"]["weights"]


def test_weights_of_another_run_are_other_weights(place: Place) -> None:
    assert main(["train", "run.yaml", "training.seed=1", "--run-name", "other"]) == 0
    shutil.copy(place.home / "checkpoints/other/trainer_0/ae.pt", place.run.weights)
    before = place.results()
    assert main(READERS["evaluate"]) == 2  # config.json beside them is not theirs
    assert place.results() == before
    # As one does who changed them on purpose.
    written = {key: value for key, value in place.run.read_config().items() if key != "weights"}
    place.run.config_json.write_text(json.dumps(written))
    assert main(READERS["sweep"]) == 0
    assert place.results()["made_from"]["weights"] != before["made_from"]["weights"]
    assert place.results()["frac_variance_explained"] != before["frac_variance_explained"]


def test_a_run_folder_that_was_moved_keeps_its_results(place: Place) -> None:
    before = place.results()
    shutil.copytree(place.run.path.parent, place.home / "checkpoints/moved")
    assert main(["evaluate", "run.yaml", "--run-name", "moved"]) == 0
    assert json.loads((place.home / "checkpoints/moved/trainer_0/eval_results.json").read_text()) == before


def test_edited_labelled_texts_are_probed_again(place: Place) -> None:
    before = place.probing()
    same_size(place.labelled)
    assert main(["probe", *RUN]) == 0
    assert place.probing()["made_from"]["texts"] != before["made_from"]["texts"]
    assert place.probing()["headline"] != before["headline"]


@pytest.mark.parametrize("added", [False, True])
@pytest.mark.usefixtures("place")
def test_a_measure_that_is_new_or_mended_makes_old_results_incomplete(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], added: bool
) -> None:
    mended = measures.Measure(f"{measures.FVE}{'_added' if added else ''}", "FVE", "in another way", version=2)
    monkeypatch.setitem(measures.REGISTRY, mended.key, mended)
    monkeypatch.setitem(registry.EXPERIMENTS, "probe", registry.EXPERIMENTS["probe"]._replace(version=99))
    assert main(READERS["dry-run"]) == 0
    shown = [line.split() for line in capsys.readouterr().out.splitlines()]
    states = [words for words in shown if words[1:2] == ["k=4"]]
    stages = {words[0]: " ".join(words[3:]) for words in states}
    assert stages == {"train": "complete", "evaluate": "to run", "probe": "to run"}


@pytest.fixture
def hub(place: Place, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub, of which nothing else is asked."""
    folder = place.root / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return folder


@pytest.fixture
def tsae(capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> Callable[..., tuple[int, str]]:
    """The exit code of a command, and what it says on stderr."""

    def run(*words: str) -> tuple[int, str]:
        capsys.readouterr()
        caplog.clear()
        code = main([*words])
        return code, capsys.readouterr().err + caplog.text

    return run


def test_a_hub_model_whose_branch_moved_is_read_at_the_commit_of_the_training(
    place: Place, hub: Path, tsae: Callable[..., tuple[int, str]]
) -> None:
    model = hub / "models--me--tiny"
    for commit in ("a" * 40, "b" * 40):
        shutil.copytree(place.model, model / "snapshots" / commit)
        fine_tuned(place.model)
    (model / "refs").mkdir()
    (model / "refs/main").write_text("a" * 40)

    given = ["run.yaml", "model.name=me/tiny", "--run-name", "hub"]
    run = RunFolder.of(place.home / "checkpoints", "hub")
    assert tsae("train", *given)[0] == 0
    assert tsae("evaluate", *given)[0] == 0
    first = json.loads(run.eval_results.read_text())
    (model / "refs/main").write_text("b" * 40)
    run.eval_results.unlink()
    code, said = tsae("evaluate", *given)
    assert code == 0, said
    assert json.loads(run.eval_results.read_text())["loss_original"] == first["loss_original"]
    assert f"me/tiny is read at commit {'a' * 40}" in said
    assert "model.revision" in said
    run.eval_results.unlink()
    stores = place.home / "stores"
    shutil.move(stores, place.root / "kept")
    assert tsae("harvest", *given[:2])[0] == 0
    code, said = tsae("evaluate", *given)
    assert code == 2
    assert "was harvested anew, with another commit" in said
    code, said = tsae("evaluate", *given, "--accept-new-data")
    assert code == 0, said
    assert json.loads(run.eval_results.read_text())["loss_original"] != first["loss_original"]
    shutil.rmtree(stores)
    shutil.move(place.root / "kept", stores)
    shutil.rmtree(model / "snapshots" / ("a" * 40))
    code, said = tsae("evaluate", *given, "--accept-new-data")
    assert code == 2
    assert f"me/tiny at commit {'a' * 40}, with which this was made, cannot be loaded" in said


def test_a_hub_data_set_that_moved_is_other_text_once_it_is_harvested_anew(
    place: Place, hub: Path, tsae: Callable[..., tuple[int, str]]
) -> None:
    texts = hub / "datasets--me--texts"
    for commit, change in (("a" * 40, None), ("b" * 40, same_size)):
        if change:
            change(place.text)
        (texts / "snapshots" / commit).mkdir(parents=True)
        shutil.copy(place.text, texts / "snapshots" / commit / "train.jsonl")
    (texts / "refs").mkdir()
    given = ["run.yaml", "data.source=me/texts", "--run-name", "hub"]
    (texts / "refs/main").write_text("a" * 40)
    code, said = tsae("train", *given)
    assert code == 0, said
    (texts / "refs/main").write_text("b" * 40)
    assert tsae("evaluate", *given)[0] == 0  # the store that was trained on is there
    shutil.rmtree(place.home / "stores")
    assert tsae("harvest", *given[:2])[0] == 0
    code, said = tsae("evaluate", *given)
    assert code == 2
    assert "was harvested anew, with other text or other held-out documents" in said


def test_content_that_is_known_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tsae.runtime import contents

    monkeypatch.setenv("TSAE_HOME", str(tmp_path / "home"))
    path = tmp_path / "file"
    path.write_bytes(b"one")
    os.utime(path, (1e9, 1e9))
    first = contents.sha256_of(path)
    reads = []
    read = contents._read
    monkeypatch.setattr(contents, "_read", lambda *about: reads.append(about) or read(*about))
    contents._known.clear()  # as another process
    assert contents.sha256_of(path) == first
    assert reads == []
    path.write_bytes(b"two")
    os.utime(path, (1e9, 1e9))
    assert contents.sha256_of(path) != first
    assert len(reads) == 1
