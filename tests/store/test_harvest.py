from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.store.conftest import CONTEXT
from tsae.config.run import Counted, RunConfig
from tsae.data import contexts, tokenized
from tsae.lm import model
from tsae.lm.hook import proof_rows
from tsae.lm.model import load_language_model
from tsae.runtime import preemption
from tsae.runtime.errors import BrokenOff, TsaeError
from tsae.store import writer
from tsae.store.harvest import harvest, harvest_places
from tsae.store.layout import StoreLayout, is_harvested, store_path
from tsae.store.reader import Store
from tsae.store.verify import verify

Start = Callable[..., multiprocessing.Process]
Make = Callable[..., RunConfig]


def content(path: Path) -> dict[str, bytes]:
    """Every file of a store but its markers, which name their writers."""
    files = (file for file in path.rglob("*") if file.is_file() and file.parent.name != "shards")
    return {str(file.relative_to(path)): file.read_bytes() for file in files}


def written(path: Path) -> int:
    return len(list(path.glob("checksums/shards/*.json")))


def assert_same_store(path: Path, expected: Path) -> None:
    assert verify(path, deep=True) == []
    assert content(path) == content(expected)
    assert not [file for file in path.parent.iterdir() if file.name.endswith(".tmp")]


def test_store_holds_what_the_language_model_computes(harvested: Path, make_config: Make) -> None:
    store, lm = Store.open(harvested, make_config(harvested)), load_language_model(make_config(harvested).model)
    sequences = np.array([5, 0, store.n_sequences - 1])
    tokens, lengths = torch.from_numpy(store.tokens[sequences]), torch.from_numpy(store.lengths[sequences])
    real = torch.arange(store.context_length) < lengths[:, None]
    expected = lm.read(tokens, lengths)
    torch.testing.assert_close(store.read(sequences)[real].float(), expected[real], rtol=1e-2, atol=1e-3)
    assert (store.read(sequences)[~real] == 0).all()
    assert store.attributes["model"]["hook_path"] == "gpt_neox.layers.0"


def test_statistics_are_those_of_the_training_part(harvested: Path) -> None:
    store = Store.open(harvested)
    valid = store.valid(Counted(1))
    valid[store.heldout_range.start :] = False
    trained = store.read(range(store.n_sequences))[torch.from_numpy(valid)].double()
    statistics = store.attributes["statistics"]
    assert statistics["count"] == len(trained)
    np.testing.assert_allclose(store.mean, trained.mean(0), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(statistics["variance"], trained.var(0, correction=0), rtol=1e-9)
    np.testing.assert_allclose(statistics["mean_squared_norm"], trained.square().sum(1).mean(), rtol=1e-12)
    np.testing.assert_array_equal(statistics["max_abs"], trained.abs().amax(0))


def test_harvest_killed_at_any_moment_continues_to_the_same_store(
    tmp_path: Path, harvested: Path, make_config: Make, start_harvest: Start
) -> None:
    path, pick = tmp_path / "store", random.Random(0)
    config = make_config(path)
    shards = StoreLayout(harvested).geometry.shards
    assert shards >= 5
    moments = [
        lambda: any(".tmp" in file.name for file in tmp_path.iterdir()),
        lambda: path.exists(),
        *(lambda wanted=wanted: written(path) >= wanted for wanted in (1, 2, 4)),
    ]
    killed = 0
    for moment in moments:
        process = start_harvest(config)
        while process.is_alive() and not moment():
            time.sleep(0.0005)
        time.sleep(pick.uniform(0, 0.02))
        process.kill()
        process.join()
        killed += process.exitcode == -9
        if killed and not is_harvested(config):
            with pytest.raises(TsaeError, match=r"not finished|no activation store is here"):
                Store.open(path)
    assert killed >= 3
    harvest(config)
    assert is_harvested(config)
    assert_same_store(path, harvested)


PLACES: list[dict[str, Any]] = [
    {"layer": 1},
    {"layer": 0},
    {"hook_point": "gpt_neox.layers.0.attention.query_key_value"},  # three times as wide: cut into other shards
]


@pytest.fixture(scope="module")
def places_alone(tmp_path_factory: pytest.TempPathFactory, make_config: Make) -> list[Path]:
    """A store of each place, harvested alone."""
    folder = tmp_path_factory.mktemp("alone")
    return [harvest(make_config(folder / str(number), model=place)) for number, place in enumerate(PLACES)]


def test_several_places_are_read_together_and_each_store_comes_out_as_if_alone(
    tmp_path: Path, make_config: Make, places_alone: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenised: list[int] = []
    made = contexts.make_contexts
    monkeypatch.setattr(contexts, "make_contexts", lambda *given: tokenised.append(1) or made(*given))
    rows: Counter[int] = Counter()  # places of a forward pass → sequences that were read for so many
    read = model.begin_reading
    monkeypatch.setattr(
        model, "begin_reading", lambda *given: rows.update({len(given[0]): len(given[1])}) or read(*given)
    )
    configs = [make_config(tmp_path / str(number), model=place) for number, place in enumerate(PLACES)]
    harvest_places(configs)
    for config, alone in zip(configs, places_alone, strict=True):
        assert_same_store(store_path(config), alone)
    assert len(tokenised) == 1
    proofs = len(PLACES) * len(proof_rows(320, CONTEXT))
    sequences = StoreLayout(places_alone[0]).geometry.sequences
    assert rows == {2: sequences, 1: sequences + proofs}  # two that are cut alike, then the wide one

    lost = StoreLayout(store_path(configs[0]))
    lost.shard(2).unlink()
    rows.clear()
    harvest_places(configs)
    assert_same_store(lost.path, places_alone[0])
    assert rows == {1: len(lost.geometry.sequences_of(2)) + len(proof_rows(320, CONTEXT))}


def test_a_model_that_is_spread_over_memory_and_disk_makes_the_same_store(
    tmp_path: Path, harvested: Path, make_config: Make
) -> None:
    spread = make_config(tmp_path / "store", model={"device_map": "auto", "max_memory": "cpu=300kB"})
    assert "disk" in load_language_model(spread.model).module.hf_device_map.values()
    assert_same_store(harvest(spread), harvested)


def test_two_tasks_at_once_make_the_store_of_one(
    tmp_path: Path, harvested: Path, make_config: Make, start_harvest: Start
) -> None:
    path = tmp_path / "store"
    processes = [start_harvest(make_config(path), task, 2) for task in range(2)]
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert_same_store(path, harvested)


def test_one_task_of_two_leaves_the_store_incomplete(tmp_path: Path, make_config: Make) -> None:
    config = make_config(tmp_path / "store")
    harvest(config, 1, 2)
    assert not is_harvested(config)
    with pytest.raises(TsaeError, match="shards are missing"):
        Store.open(tmp_path / "store", config)


def test_complete_store_is_left_alone(harvested: Path, make_config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tsae.lm.model.load_language_model", lambda *_: pytest.fail("the model was loaded"))
    assert harvest(make_config(harvested)) == harvested


LOSSES: dict[str, Callable[[StoreLayout], object]] = {
    "a deleted shard": lambda layout: layout.shard(2).unlink(),
    "a truncated shard": lambda layout: os.truncate(layout.shard(2), 1000),
    "a deleted marker": lambda layout: layout.marker(2).unlink(),
    "a damaged marker": lambda layout: layout.marker(2).write_text("{"),
    "damaged checksums": lambda layout: os.truncate(layout.path / "checksums" / "c" / "0", 10),
}


@pytest.mark.parametrize("what", LOSSES)
def test_harvest_repairs_what_it_can(tmp_path: Path, harvested: Path, make_config: Make, what: str) -> None:
    path = tmp_path / "store"
    shutil.copytree(harvested, path)
    LOSSES[what](StoreLayout(path))
    assert not is_harvested(make_config(path))
    assert len(verify(path)) == 1
    harvest(make_config(path))
    assert_same_store(path, harvested)


def test_store_is_incomplete_from_the_loss_of_a_shard_to_its_return(
    tmp_path: Path, harvested: Path, make_config: Make
) -> None:
    path = tmp_path / "store"
    shutil.copytree(harvested, path)
    for shard in (0, 1):
        StoreLayout(path).shard(shard).unlink()
    harvest(make_config(path), 0, 2)
    with pytest.raises(TsaeError, match=r"1 of \d+ shards are missing \(1\)"):
        Store.open(path)
    harvest(make_config(path), 1, 2)
    assert_same_store(path, harvested)


def test_another_configuration_is_refused(tmp_path: Path, harvested: Path, make_config: Make) -> None:
    other = make_config(harvested, model={"layer": 1})
    for refuse in (harvest, lambda config: Store.open(harvested, config)):
        with pytest.raises(TsaeError, match=r"model.layer is 0 there, 1 here"):
            refuse(other)
    assert not is_harvested(other)
    (tmp_path / "notes.txt").touch()
    with pytest.raises(TsaeError, match="not an activation store"):
        harvest(make_config(tmp_path))


def test_store_begun_with_other_weights_is_not_continued(tmp_path: Path, harvested: Path, make_config: Make) -> None:
    path = tmp_path / "store"
    shutil.copytree(harvested, path)
    layout = StoreLayout(path)
    layout.shard(0).unlink()
    layout.set_attributes(model={**layout.attributes["model"], "dtype": "bfloat16"})
    with pytest.raises(TsaeError, match="dtype was 'bfloat16' and is now 'float32'"):
        harvest(make_config(path))


def test_default_path_follows_from_the_content(
    tmp_path: Path, make_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tsae.store.layout import store_path

    monkeypatch.setenv("TSAE_HOME", str(tmp_path))
    paths = {
        store_path(make_config(tmp_path, store={"path": None}, **sections))
        for sections in ({}, {"sae": {"k": 3}}, {"model": {"layer": 1}}, {"data": {"seed": 1}})
    }
    assert len(paths) == 3
    assert all(path.parent == tmp_path / "stores" for path in paths)


def test_a_harvest_ends_with_what_it_found_of_massive_tokens(
    tmp_path: Path, make_config: Make, caplog: pytest.LogCaptureFixture
) -> None:
    config = make_config(tmp_path / "store")
    harvest(config)
    [line] = caplog.messages
    assert "tokens (0 %) have norms above 6 times the median" in line
    harvest(config)
    assert caplog.messages == [line]
    beyond = make_config(tmp_path / "store", data={"exclude_tokens": [3, 320]})
    with pytest.raises(TsaeError, match=r"exclude_tokens: 320 is no token of .*; ids from 0 to 319 are possible"):
        harvest(beyond)
    with pytest.raises(TsaeError, match=r"exclude_tokens: 320 is no token"):
        Store.open(tmp_path / "store", beyond)
    fresh = make_config(tmp_path / "fresh", data={"exclude_tokens": [320]})
    with pytest.raises(TsaeError, match=r"exclude_tokens: 320 is no token"):
        harvest(fresh)
    assert not (tmp_path / "fresh").exists()


def test_ids_lie_beside_a_store_until_it_has_its_frame(
    tmp_path: Path, make_config: Make, harvested: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def texts() -> list[Path]:
        return [path for path in tmp_path.iterdir() if ".text-" in path.name]

    def stopped(*_: object, **__: object) -> None:
        raise error

    config, prepare = make_config(tmp_path / "store"), writer.prepare
    monkeypatch.setattr(writer, "prepare", stopped)
    for error in (preemption.Preempted(), KeyboardInterrupt(), BrokenOff("reading stopped"), OSError(28, "disk full")):
        with pytest.raises(type(error)):
            harvest(config)
        (folder,) = texts()
    begun = (folder / "tokens").stat()
    monkeypatch.setattr(writer, "prepare", prepare)
    made = tokenized._written
    monkeypatch.setattr(tokenized, "_written", lambda *_: pytest.fail("tokenised again"))
    harvest(config)
    assert begun.st_size > 0
    assert not texts()
    assert_same_store(store_path(config), harvested)

    monkeypatch.setattr(tokenized, "_written", made)
    monkeypatch.setattr(writer, "prepare", stopped)
    error = TsaeError("refused")
    with pytest.raises(TsaeError, match="refused"):
        harvest(make_config(tmp_path / "other"))
    assert not texts()


def test_ids_that_a_killed_process_left_beside_a_store_with_a_frame_go(
    tmp_path: Path, make_config: Make, harvested: Path
) -> None:
    config = make_config(tmp_path / "store")
    harvest(config)
    StoreLayout(store_path(config)).shard(0).unlink()
    left = tmp_path / "store.text-0123"
    left.mkdir()
    (left / "tokens").write_bytes(b"1234")
    harvest(config)
    assert not left.exists()
    assert_same_store(store_path(config), harvested)
