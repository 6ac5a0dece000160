"""A store of which only a window is on disk gives what the whole store gives, whatever is killed, removed or shared."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tsae.config.run import Counted, RunConfig, replace
from tsae.runtime.errors import TsaeError
from tsae.store.harvest import harvest
from tsae.store.layout import StoreLayout, is_harvested
from tsae.store.massive import describe
from tsae.store.moments import moments_of
from tsae.store.pairs import PairStream
from tsae.store.reader import Store
from tsae.store.rolling import open_store
from tsae.store.verify import verify
from tsae.store.window import held

Make = Callable[..., RunConfig]
MOST = 1_200_000
"""Bytes of the window: four of 40 shards."""
STEPS = 320
"""More than two epochs."""
PAIRS = {"rule": "within:3", "batch_size": 256, "seed": 5, "counted": Counted(1, 6.0), "pool_sequences": 300}


@pytest.fixture(scope="module")
def rolling(make_config: Make, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    config = make_config(tmp_path_factory.mktemp("rolling") / "store", store={"window": f"{MOST // 1000}kB"})
    harvest(config)
    return config


@pytest.fixture(scope="module")
def full(make_config: Make, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    config = make_config(tmp_path_factory.mktemp("full") / "store")
    harvest(config)
    return config


@pytest.fixture
def copied(rolling: RunConfig, tmp_path: Path) -> RunConfig:
    """The same store in another place."""
    shutil.copytree(str(rolling.store.path), tmp_path / "store")
    return replace(rolling, store={"path": str(tmp_path / "store")})


def hashes(config: RunConfig, steps: range = range(STEPS), **more: Any) -> list[str]:
    stream = PairStream(open_store(config), **{**PAIRS, **more})
    return [sha256(batch.numpy().tobytes()).hexdigest() for batch in stream.iterate(steps.start, steps.stop)]


def bytes_that_roll(layout: StoreLayout) -> int:
    """As a listing of the folder has it, files in writing too; 0 if it changed meanwhile."""
    found, before = 0, set(os.listdir(layout.shards))
    with suppress(FileNotFoundError):
        for name in before:
            if int(name) not in layout.kept:
                found += sum(file.stat().st_size for file in (layout.shards / name).rglob("*") if file.is_file())
    return found if set(os.listdir(layout.shards)) == before else 0


@contextmanager
def watched(layout: StoreLayout) -> Iterator[list[int]]:
    """What the shards that come and go take up, again and again while the block runs."""
    seen, over = [bytes_that_roll(layout)], threading.Event()

    def watch() -> None:
        while not over.wait(0.002):
            seen.append(bytes_that_roll(layout))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield seen
    finally:
        over.set()
        watcher.join()


def test_batches_are_those_of_the_full_store_and_the_disk_holds_a_window(rolling: RunConfig, full: RunConfig) -> None:
    layout = StoreLayout(str(rolling.store.path))
    with watched(layout) as seen:
        found = hashes(rolling)
    assert len(set(found)) == STEPS
    assert found == hashes(full)
    assert len(seen) > 20
    assert MOST - layout.geometry.shard_bytes(0) < max(seen) <= MOST
    assert len(held(layout)) == MOST // layout.geometry.shard_bytes(0)


def test_the_size_of_the_window_changes_no_batch(copied: RunConfig) -> None:
    expected = hashes(copied, range(150, 200))
    for window in ("600kB", 30_000, "1GB", "all"):
        assert hashes(replace(copied, store={"window": window}), range(150, 200)) == expected
    layout = StoreLayout(str(copied.store.path))
    hashes(replace(copied, store={"window": "all"}), range(STEPS))
    assert len(held(layout)) == layout.kept.start


def test_what_is_trained_by_several_processes_is_the_same(copied: RunConfig) -> None:
    steps, alone = range(0, 160, 20), open_store(copied)
    whole = PairStream(alone, **PAIRS)
    expected = [whole[step] for step in steps]
    for world in (2, 3):
        more = {**PAIRS, "batch_size": 256 if world == 2 else 255}
        expected = [PairStream(alone, **more)[step] for step in steps]
        ranks = [PairStream(open_store(copied), **more, rank=rank, world=world) for rank in range(world)]
        for step, batch in zip(steps, expected, strict=True):
            assert torch.equal(torch.cat([rank[step] for rank in ranks]), batch)


def test_shards_are_made_again_with_the_same_bits_by_whoever_reads_them(copied: RunConfig, full: RunConfig) -> None:
    layout, store = StoreLayout(str(copied.store.path)), open_store(copied)
    before = {shard: layout.shard(shard).read_bytes() for shard in held(layout)}
    for shard in before:
        shutil.rmtree(layout.shards / str(shard))
    assert torch.equal(store.read(range(1485)).float(), Store.open(str(full.store.path)).read(range(1485)).float())
    for shard in before:
        store.read(layout.geometry.sequences_of(shard))
        assert layout.shard(shard).read_bytes() == before[shard]
    with pytest.raises(TsaeError, match="has left the window, and nothing makes it again here"):
        Store.open(layout.path).read(range(1300))


def test_two_trainings_share_a_window(copied: RunConfig) -> None:
    layout, orders = StoreLayout(str(copied.store.path)), (5, 6)
    expected = {seed: hashes(copied, range(160), seed=seed) for seed in orders}
    found: dict[int, list[str]] = {}
    with watched(layout) as seen:
        threads = [
            threading.Thread(target=lambda seed=seed: found.update({seed: hashes(copied, range(160), seed=seed)}))
            for seed in orders
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found == expected
    assert max(seen) <= MOST


def test_a_rolling_store_is_complete_with_its_held_out_part_alone(rolling: RunConfig, full: RunConfig) -> None:
    layout, whole = StoreLayout(str(rolling.store.path)), Store.open(str(full.store.path))
    assert is_harvested(rolling)
    assert verify(layout.path, deep=True) == []
    store = Store.open(layout.path)
    assert torch.equal(store.read(store.heldout_range).float(), whole.read(whole.heldout_range).float())
    np.testing.assert_array_equal(store.norms[store.heldout_range.start :], whole.norms[whole.heldout_range.start :])
    assert f"of {layout.kept.start} shards of the training part are on disk" in describe(store)
    layout.shard(layout.kept[0]).unlink()
    assert not is_harvested(rolling)
    harvest(rolling)
    assert verify(layout.path, deep=True) == []


def test_statistics_are_of_the_sample(make_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tsae.store.writer.SAMPLE_TOKENS", 200 * 64)
    config = make_config(tmp_path / "store", store={"window": "600kB"})
    harvest(config)
    store = open_store(config)
    assert store.attributes["statistics"]["of"].startswith("the first 200 sequences, ")
    assert store.layout.measured == (*range(7), *store.layout.kept)
    counted = Counted(1, 1.05)
    x, first = store.read(range(200)), store.norms[:200]
    belongs = store.valid(Counted(1), slice(200))
    assert store.limit(counted) == pytest.approx(1.05 * np.median(first[belongs]))
    kept = torch.from_numpy(belongs & (first <= store.limit(counted)))
    assert 0 < int(kept.sum()) < belongs.sum()
    found = moments_of(store, counted)
    assert found.tokens == int(kept.sum())
    torch.testing.assert_close(found.mean.double(), x[kept].double().mean(0), rtol=1e-5, atol=1e-7)
    store.layout.shards.joinpath("0").exists()
    assert store.attributes["statistics"]["count"] == belongs.sum()


def test_tokens_above_the_limit_are_left_out_once_they_are_known(rolling: RunConfig) -> None:
    store = open_store(rolling)
    counted = Counted(1, 1.02)
    limit, everything = store.limit(counted), store.read(store.train).float()
    stream = PairStream(store, **{**PAIRS, "counted": counted})
    norms = torch.linalg.vector_norm(
        everything[torch.from_numpy(store.valid(Counted(1), slice(len(store.train))))], dim=-1
    )
    assert 0.05 < float((norms > limit).float().mean()) < 0.95
    batches = torch.cat([stream[step] for step in range(0, stream.steps_per_epoch, 10)])
    assert float(torch.linalg.vector_norm(batches, dim=-1).max()) <= limit * 1.0001
    with pytest.raises(TsaeError, match=r"leaves out all tokens of a part of a pool"):
        PairStream(store, **{**PAIRS, "counted": Counted(1, 0.1)})[0]


@pytest.mark.parametrize(
    ("window", "words"),
    [
        ("200kB", r"store.window: 200kB is impossible; one batch of the language model fills 0.27 MB"),
        ("2 gigabytes", r"store.window: 2 gigabytes is impossible; a size such as 200GB"),
        (0, r"store.window: 0 is impossible; a size such as 200GB"),
    ],
)
def test_an_impossible_window_is_refused_before_anything_is_written(
    make_config: Make, tmp_path: Path, window: object, words: str
) -> None:
    with pytest.raises(TsaeError, match=words):
        harvest(make_config(tmp_path / "store", store={"window": window}))
    assert list(tmp_path.iterdir()) == []
