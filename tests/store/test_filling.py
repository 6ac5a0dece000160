"""Filling a store: what one thread reads another writes, and what goes wrong with either leaves whole shards alone."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tsae.config.sections import StoreConfig
from tsae.data.contexts import Contexts
from tsae.runtime.errors import TsaeError
from tsae.store import writer
from tsae.store.filling import write_missing
from tsae.store.layout import StoreLayout
from tsae.store.reader import Store
from tsae.store.writer import prepare

DIM, BATCH = 64, 50
Given = Iterator[Sequence[torch.Tensor]]


@pytest.fixture
def layout(contexts_of: Callable[..., Contexts], ragged: np.ndarray, tmp_path: Path) -> StoreLayout:
    """A store of several shards, none of which is there yet."""
    layout = prepare(tmp_path / "store", contexts_of(ragged), DIM, store=StoreConfig(dtype="float32", shard_mb=1))
    assert layout.geometry.shards > 3
    return layout


@pytest.fixture
def expected(ragged: np.ndarray, speak: Callable[..., torch.Tensor]) -> torch.Tensor:
    return speak(ragged, DIM)


def batches(layout: StoreLayout, activations: torch.Tensor, shard: int) -> Given:
    rows = layout.geometry.sequences_of(shard)
    return ([block] for block in activations[rows.start : rows.stop].split(BATCH))


def fill(layout: StoreLayout, activations: Callable[[int, Sequence[int]], Given]) -> None:
    write_missing([layout], range(layout.geometry.shards), activations)


def drafts(layout: StoreLayout) -> list[Path]:
    return [path for path in layout.path.rglob("*") if path.name.startswith(".") and path.is_file()]


ON_A_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=ON_A_GPU)])
def test_a_store_holds_what_was_read(layout: StoreLayout, expected: torch.Tensor, device: str) -> None:
    def read(shard: int, _: Sequence[int]) -> Given:
        for (block,) in batches(layout, expected, shard):
            # Made there by a product that takes a while: what is copied before it is done would show.
            one = torch.eye(DIM, device=device)
            yield [block.to(device) @ torch.linalg.matrix_power(one, 64)]

    fill(layout, read)
    store = Store.open(layout.path)
    real = torch.arange(expected.shape[1]) < torch.from_numpy(np.array(store.lengths))[:, None]
    assert torch.equal(store.read(range(store.n_sequences)), torch.where(real[..., None], expected, 0))


def test_the_next_batch_is_read_while_one_is_written(
    layout: StoreLayout, expected: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    written, gone_on, real = threading.Event(), threading.Event(), writer._storable

    def held(*arguments: object) -> torch.Tensor:
        written.set()
        assert gone_on.wait(60)  # were it read only afterwards, nobody would ever say so
        return real(*arguments)  # type: ignore[arg-type]

    def read(shard: int, _: Sequence[int]) -> Given:
        for number, blocks in enumerate(batches(layout, expected, shard)):
            if number:
                assert written.wait(60)
                gone_on.set()
            yield blocks

    monkeypatch.setattr(writer, "_storable", held)
    fill(layout, read)
    assert Store.open(layout.path).n_sequences == len(expected)


def test_what_goes_wrong_in_writing_ends_the_reading(layout: StoreLayout, expected: torch.Tensor) -> None:
    def endless(shard: int, numbers: Sequence[int]) -> Given:
        del numbers
        yield from batches(layout, expected, shard)
        while shard == 1:  # more than the shard has room for
            yield [expected[:1]]

    with pytest.raises(ValueError, match="more sequences were given"):
        fill(layout, endless)
    assert [layout.is_written(shard) for shard in range(3)] == [True, False, False]
    assert not drafts(layout)


@pytest.mark.parametrize("batches_a_shard", [1, 2, 3])
def test_what_goes_wrong_in_any_shard_is_told(
    layout: StoreLayout, expected: torch.Tensor, batches_a_shard: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, under_way, most = writer._storable, list[int](), 0

    def full(at: StoreLayout, first: int, *rest: Any) -> torch.Tensor:
        if first >= at.geometry.sequences_of(1).start:
            raise OSError(errno.ENOSPC, "No space left on device", "here")
        return real(at, first, *rest)

    def read(shard: int, _: Sequence[int]) -> Given:
        nonlocal most
        under_way.append(shard)
        most = max(most, sum(not layout.is_written(each) for each in under_way))
        rows = layout.geometry.sequences_of(shard)
        size = -(-len(rows) // batches_a_shard)
        return ([block] for block in expected[rows.start : rows.stop].split(size))

    monkeypatch.setattr(writer, "_storable", full)
    with pytest.raises(OSError, match="No space left"):
        fill(layout, read)
    assert layout.is_written(0)
    assert len(under_way) <= 3
    assert not drafts(layout)
    monkeypatch.setattr(writer, "_storable", real)
    under_way.clear()
    fill(layout, read)
    assert most <= 2  # no more than one waits behind the one that is written
    assert Store.open(layout.path).n_sequences == len(expected)


def test_what_goes_wrong_in_reading_leaves_whole_shards_alone(layout: StoreLayout, expected: torch.Tensor) -> None:
    def breaks_off(shard: int, numbers: Sequence[int]) -> Given:
        del numbers
        yield next(batches(layout, expected, shard)) if shard else [expected[: len(layout.geometry.sequences_of(0))]]
        if shard:
            raise TsaeError("no more")

    with pytest.raises(TsaeError, match="no more"):
        fill(layout, breaks_off)
    assert [layout.is_written(shard) for shard in range(3)] == [True, False, False]
    assert not drafts(layout)
    fill(layout, lambda shard, _: batches(layout, expected, shard))
    assert Store.open(layout.path).n_sequences == len(expected)
