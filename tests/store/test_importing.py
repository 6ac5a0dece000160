"""Activations of any model, from arrays in memory and in files, become a store that trains like any other."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
import zarr
from safetensors.torch import save_file

from tests.store.test_harvest import assert_same_store
from tsae import cli
from tsae.config.sections import StoreConfig
from tsae.runtime.errors import TsaeError
from tsae.store import importing
from tsae.store.importing import import_arrays, open_array
from tsae.store.reader import Store

S, L, D = 60, 9, 16
FLOAT32 = StoreConfig(dtype="float32", shard_mb=1)
random = np.random.default_rng(0)
SEQUENCES = random.normal(size=(S, L, D)).astype(np.float32)
LENGTHS = random.integers(1, L + 1, S)
VECTORS = random.normal(size=(2000, D)).astype(np.float32)
DOCUMENTS = np.sort(random.integers(0, 40, 2000)) * 3


def zarr_group(path: Path) -> Path:
    group = zarr.create_group(path)
    group.create_array("other", data=np.zeros(3))
    group.create_array("acts", data=VECTORS, chunks=(150, D), shards=(600, D))
    return path


def zarr_array(path: Path, values: np.ndarray) -> Path:
    zarr.create_array(path, data=values, chunks=(500, D), overwrite=True)
    return path


def saved(path: Path, array: np.ndarray) -> Path:
    np.save(path, array)
    return path


def in_safetensors(path: Path) -> Path:
    save_file({"acts": torch.from_numpy(VECTORS), "other": torch.zeros(3)}, path)
    return path


FORMS: dict[str, Callable[[Path], list[Any]]] = {
    "numpy": lambda _: [VECTORS],
    "torch": lambda _: [torch.from_numpy(VECTORS)],
    "two .npy": lambda folder: [
        open_array(saved(folder / f"{name}.npy", part)) for name, part in (("a", VECTORS[:700]), ("b", VECTORS[700:]))
    ],
    ".safetensors": lambda folder: [open_array(in_safetensors(folder / "a.safetensors"), "acts")],
    "zarr": lambda folder: [open_array(zarr_group(folder / "a.zarr"), "acts")],
}


@pytest.mark.parametrize("form", FORMS)
def test_vectors_are_cut_where_a_document_ends_and_come_back_as_they_were(tmp_path: Path, form: str) -> None:
    labels = np.where(DOCUMENTS % 2, "odd", "even")
    given = {"documents": DOCUMENTS, "labels": labels, "context_length": 32, "holdout": 0.2, "store": FLOAT32}
    store = Store.open(import_arrays(FORMS[form](tmp_path), tmp_path / "store", **given))  # type: ignore[arg-type]
    numbers = list(dict.fromkeys(DOCUMENTS.tolist()))
    x, found = store.read(np.arange(store.n_sequences)).numpy(), []
    for row, length in enumerate(store.lengths):
        (document,) = set(store.document[row, :length].tolist())
        first = int(np.flatnonzero((x[row, 0] == VECTORS).all(1))[0])
        np.testing.assert_array_equal(x[row, :length], VECTORS[first : first + length])
        assert (x[row, length:] == 0).all()
        assert set(DOCUMENTS[first : first + length]) == {numbers[document]}
        assert store.label_names[store.label[document]] == labels[first]
        found += range(first, first + length)
    assert sorted(found) == list(range(len(VECTORS)))
    assert found != sorted(found)
    trained, held_out = (
        set(store.document[rows].ravel().tolist()) - {-1} for rows in (store.train, store.heldout_range)
    )
    assert not trained & held_out
    assert 0.2 <= store.heldout / store.n_sequences < 0.3
    assert max(store.lengths) == 32


def test_sequences_keep_their_lengths_and_are_documents_of_their_own(tmp_path: Path) -> None:
    path = import_arrays([SEQUENCES], tmp_path / "store", lengths=LENGTHS, store=FLOAT32)
    store = Store.open(path)
    x = store.read(np.arange(S)).numpy()
    order = [int(np.flatnonzero((SEQUENCES[:, 0] == row[0]).all(1))[0]) for row in x]
    assert sorted(order) == list(range(S))
    np.testing.assert_array_equal(store.lengths, LENGTHS[order])
    inside = np.arange(L) < store.lengths[:, None]
    np.testing.assert_array_equal(x, np.where(inside[..., None], SEQUENCES[order], 0))
    np.testing.assert_array_equal(store.document, np.where(inside, np.array(order)[:, None], -1))
    assert "no layer" in repr(store)


def test_an_import_that_broke_off_goes_on_and_a_complete_one_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = np.repeat(VECTORS, 40, axis=0)
    whole = import_arrays([large], tmp_path / "whole", store=FLOAT32)
    written: list[int] = []
    read = importing._Reading.activations

    def breaks_off(self: Any, shard: int, numbers: Any) -> Any:
        written.append(shard)
        if len(written) == 3:
            raise KeyboardInterrupt
        return read(self, shard, numbers)

    monkeypatch.setattr(importing._Reading, "activations", breaks_off)
    with pytest.raises(KeyboardInterrupt):
        import_arrays([large], tmp_path / "store", store=FLOAT32)
    with pytest.raises(TsaeError, match="not finished"):
        Store.open(tmp_path / "store")
    import_arrays([large], tmp_path / "store", store=FLOAT32)
    assert_same_store(tmp_path / "store", whole)
    assert sorted(written) == sorted([*range(max(written) + 1), 2])
    del written[:]
    import_arrays([large], tmp_path / "store", store=FLOAT32)
    assert written == []
    changed = large.copy()
    changed[-1, -1] += 1
    others = [{"arrays": [changed]}, {"context_length": 64}, {"holdout": 0.5}, {"seed": 1}, {"store": StoreConfig()}]
    for other in [*others, {"documents": np.arange(len(large)) // 100}, {"arrays": [large[:-1]]}]:
        with pytest.raises(TsaeError, match="holds other activations"):
            import_arrays(**{"arrays": [large], "path": tmp_path / "store", "store": FLOAT32, **other})


def test_a_file_is_known_by_its_content(tmp_path: Path) -> None:
    for make in (
        lambda values: saved(tmp_path / "a.npy", values),
        lambda values: zarr_array(tmp_path / "a.zarr", values),
    ):
        place = tmp_path / "store"
        path = make(VECTORS)
        import_arrays([open_array(path)], place)
        stamp = path.stat()
        make(VECTORS + 1)
        os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
        with pytest.raises(TsaeError, match="holds other activations"):
            import_arrays([open_array(path)], place)
        shutil.rmtree(place)


def test_a_run_on_imported_activations_from_the_command_line_to_a_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TSAE_HOME", "home")
    saved(Path("a.npy"), VECTORS)
    Path("documents.txt").write_text("\n".join(map(str, DOCUMENTS)))
    brought = ["store", "import", "a.npy", "--documents", "documents.txt", "--context-length", "32", "--out", "acts"]
    assert cli.main(brought) == 0
    assert "2,000 tokens" in capfd.readouterr().out
    run = {
        "data": {"source": "store", "skip_positions": 0},
        "store": {"path": "acts"},
        "sae": {"dict_size": 64, "k": 4},
        "training": {"steps": 20, "batch_size": 64, "device": "cpu", "warmup_steps": 2, "threshold_start_step": 5},
    }
    Path("run.yaml").write_text(yaml.safe_dump(run))
    sweep = {"base": "run.yaml", "grid": {"sae.k": [4, 5]}, "stages": ["train", "evaluate", "report"]}
    Path("sweep.yaml").write_text(yaml.safe_dump(sweep))
    assert cli.main(["sweep", "sweep.yaml", "--executor", "debug"]) == 0
    results = json.loads(Path("home/checkpoints/sweep-run/k=4/trainer_0/eval_results.json").read_text())
    assert results["tokens"] > 100
    assert "stored activations" in Path("home/sweeps/sweep-run/report/report.html").read_text()
    assert cli.main(["train", "run.yaml"]) == 0
    capfd.readouterr()
    assert cli.main(["features", "--run-name", "run"]) == 2
    assert (
        "features: the run is trained on stored activations, without text to experiment with" in capfd.readouterr().err
    )

    shutil.rmtree("acts")
    saved(Path("a.npy"), VECTORS + 1)
    assert cli.main(brought) == 0
    capfd.readouterr()
    assert cli.main(["evaluate", "run.yaml", "evaluation.sequences=5"]) == 2
    assert "was trained on other data: store.path: " in capfd.readouterr().err


def test_what_is_not_finite_is_named_and_leaves_the_place_free(tmp_path: Path) -> None:
    broken = SEQUENCES.copy()
    broken[7, 3] = np.nan
    with pytest.raises(TsaeError, match="not finite"):
        import_arrays([broken], tmp_path / "store")
    import_arrays([SEQUENCES], tmp_path / "store")


BAD: dict[str, tuple[Callable[[Path], dict[str, Any]], str]] = {
    "numbers": (lambda _: {"arrays": [np.zeros((4, 4), np.int64)]}, r"is int64 \[4, 4\]; floating-point arrays"),
    "one dimension": (lambda _: {"arrays": [np.zeros(4)]}, r"is float64 \[4\]; floating-point"),
    "one position": (lambda _: {"arrays": [SEQUENCES[:, :1]]}, "sequences of one position"),
    "widths": (lambda _: {"arrays": [VECTORS, VECTORS[:, 1:]]}, r"array 0 \[2000, 16\], array 1 \[2000, 15\]"),
    "none": (lambda _: {"arrays": []}, "not none"),
    "documents": (lambda _: {"arrays": [VECTORS], "documents": DOCUMENTS[1:]}, "one for each of the 2000 vectors"),
    "one document": (lambda _: {"arrays": [VECTORS], "documents": 0 * DOCUMENTS}, "at least two are needed"),
    "lengths": (lambda _: {"arrays": [SEQUENCES], "lengths": LENGTHS + 9}, "whole numbers from 1 to 9"),
    "labels": (lambda _: {"arrays": [VECTORS], "labels": np.arange(2000)}, "all of a document must have the same"),
    "a file": (
        lambda folder: {"arrays": [open_array(folder / "none.npy")]},
        "none.npy: cannot be read as an array: .*No such file",
    ),
    "a cut file": (
        lambda folder: {"arrays": [open_array(cut(saved(folder / "a.npy", VECTORS)))]},
        "a.npy: cannot be read",
    ),
    "a cut tensor": (
        lambda folder: {"arrays": [open_array(cut(in_safetensors(folder / "a.safetensors")))]},
        "a.safetensors: cannot be read as an array",
    ),
    "a pickle": (
        lambda folder: {"arrays": [open_array(pickled(folder / "a.npy"))]},
        "a.npy: cannot be read as an array: .*Python objects",
    ),
    "a key": (
        lambda folder: {"arrays": [open_array(zarr_group(folder / "a.zarr"), "act")]},
        "has acts, other; name one with --key",
    ),
}


def pickled(path: Path) -> Path:
    np.save(path, np.array([{"runs": "code"}], object), allow_pickle=True)
    return path


def cut(path: Path) -> Path:
    os.truncate(path, path.stat().st_size // 2)
    return path


@pytest.mark.parametrize("what", BAD)
def test_what_cannot_be_imported_is_one_line_and_nothing_is_left(tmp_path: Path, what: str) -> None:
    make, said = BAD[what]
    with pytest.raises(TsaeError, match=said):
        import_arrays(path=tmp_path / "store", **make(tmp_path))
    assert not (tmp_path / "store").exists()
