"""FVE without massive tokens, with them, and its median over contexts: against a direct computation."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.evaluation.test_driver import run_folder
from tsae.checkpoint import RunFolder, load_dictionary
from tsae.config import run as configuration
from tsae.config.run import Counted, RunConfig
from tsae.data.labelled import LabelledText
from tsae.evaluation.calibration import calibrate
from tsae.evaluation.driver import evaluate
from tsae.experiments.shared.firings import collect
from tsae.experiments.shared.subject import Subject
from tsae.experiments.shared.texts import harvest_texts
from tsae.runtime import files
from tsae.store.harvest import harvest
from tsae.store.reader import Store
from tsae.store.writer import finalise, write_shard

LIMIT = 6.0


@pytest.fixture
def planted(config: RunConfig, tmp_path: Path) -> tuple[RunConfig, RunFolder, list[tuple[int, int]]]:
    """A run whose store has massive tokens: at position 1 and inside two held-out contexts, and in a training one."""
    own = configuration.replace(
        config,
        data={"max_norm_multiple": LIMIT},
        store={"path": str(tmp_path / "store")},
        evaluation={"loss_recovered": False},
    )
    shutil.copytree(harvest(config), own.store.path)
    store = Store.open(own.store.path, own)
    x = store.read(range(store.n_sequences))
    long = [row for row in store.heldout_range if store.lengths[row] >= 20]
    places = [(0, 2), (long[0], 1), (long[1], 9)]
    for place in places:
        x[place] *= 300
    for shard in range(store.layout.geometry.shards):
        rows = store.layout.geometry.sequences_of(shard)
        write_shard(store.layout, shard, [x[rows.start : rows.stop]])
    finalise(store.layout)
    return own, run_folder(own, tmp_path / "run"), places


def fve(parts: list[torch.Tensor], reconstruct: object) -> tuple[list[float], float]:
    """Of each context, and pooled."""
    of_each = [1 - float((x - reconstruct(x)).var(0).sum() / x.var(0).sum()) for x in parts]  # type: ignore[operator]
    x = torch.cat(parts)
    error = (x - reconstruct(x)).square().sum()  # type: ignore[operator]
    return of_each, 1 - float(error / (x - x.mean(0)).square().sum())


@torch.no_grad()
def test_fve_with_and_without_massive_tokens(planted: tuple[RunConfig, RunFolder, list[tuple[int, int]]]) -> None:
    config, run, places = planted
    results = evaluate(config, run)
    store, dictionary = Store.open(config.store.path, config), load_dictionary(run.path)[0]
    valid, every, without = store.valid(Counted(1)), [], []
    for row in store.heldout_range:
        x = store.read([row])[0].float()
        every.append(x[torch.from_numpy(valid[row])])
        cuts = [position for at, position in places if at == row]
        last = int(np.flatnonzero(valid[row])[-1]) + 1
        for first, end in zip([1, *(cut + 1 for cut in cuts)], [*cuts, last], strict=True):
            if end - first >= 2:
                without.append(x[first:end])
    of_each, pooled = fve(without, dictionary)
    assert results["contexts"] == len(without) == len(store.heldout_range) + 1
    assert results["tokens_left_out"] == 2
    assert results["frac_variance_explained"] == pytest.approx(np.mean(of_each), abs=1e-5)
    assert results["frac_variance_explained_median"] == pytest.approx(np.median(of_each), abs=1e-5)
    assert results["frac_variance_explained_pooled"] == pytest.approx(pooled, abs=1e-5)
    of_each, pooled = fve(every, dictionary)
    assert results["frac_variance_explained_with_all"] == pytest.approx(np.mean(of_each), rel=1e-4)
    assert results["frac_variance_explained_pooled_with_all"] == pytest.approx(pooled, rel=1e-4)
    for name in ("median", "with_all", "pooled_with_all"):
        assert results["half_width_95"][f"frac_variance_explained_{name}"] > 0


def test_without_a_limit_all_tokens_count_and_nothing_is_told_apart(
    planted: tuple[RunConfig, RunFolder, list[tuple[int, int]]], tmp_path: Path
) -> None:
    config, _, _ = planted
    unlimited = configuration.replace(config, data={"max_norm_multiple": None})
    results = evaluate(unlimited, run_folder(unlimited, tmp_path / "unlimited"))
    assert results["tokens_left_out"] == 0
    assert results["tokens"] == Store.open(config.store.path).valid(Counted(1))[-results["contexts"] :].sum()
    assert not [name for name in results if name.endswith("with_all")]


def test_calibration_and_experiments_pass_the_same_tokens_over(
    planted: tuple[RunConfig, RunFolder, list[tuple[int, int]]],
) -> None:
    config, run, places = planted
    store = Store.open(config.store.path, config)
    held_out = store.valid(Counted(1))[store.heldout_range.start :].sum()
    assert calibrate(run, config, 3.0)["tokens"] == held_out - 2
    subject = Subject(config, run)
    firings = collect(subject, store, range(store.n_sequences), "test")
    assert [firings.document[place] for place in places] == [-1, -1, -1]
    assert firings.n_tokens == store.valid(Counted(1)).sum() - 3
    assert subject.norm_limit == store.limit(config.counted)
    row, position = places[1]
    x = store.read([row])[0].float()
    assert np.flatnonzero(~subject.counts(store.tokens[row], x)).tolist() == [position]
    chosen = configuration.replace(
        config, data={"exclude_tokens": (int(store.tokens[row, 5]),), "max_norm_multiple": None}
    )
    counting = Subject(chosen, run).counts(store.tokens[row], x)
    np.testing.assert_array_equal(counting, store.tokens[row] != store.tokens[row, 5])


def test_labelled_texts_are_read_by_the_limit_of_the_run(
    planted: tuple[RunConfig, RunFolder, list[tuple[int, int]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TSAE_HOME", str(tmp_path / "home"))
    config, run, _ = planted
    texts = [LabelledText(" ".join(["kaba", "lodo", "mife"] * 5), "one", number) for number in range(3)]
    every = harvest_texts(Subject(config, run), texts, 16)
    np.testing.assert_array_equal(every.valid[:, 1:15], True)
    norms = np.asarray(every.store.norms)
    files.write_json(run.provenance, {"norm_limit": float(np.median(norms[norms > 0]))})
    some = harvest_texts(Subject(config, run), texts, 16)
    np.testing.assert_array_equal(some.valid, every.valid & (norms <= np.median(norms[norms > 0])))
    assert 0 < some.valid.sum() < every.valid.sum()
