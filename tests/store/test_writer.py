from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from hypothesis import given
from hypothesis import strategies as st

from tsae.config.run import Counted
from tsae.config.sections import StoreConfig
from tsae.data.contexts import Contexts
from tsae.runtime.errors import TsaeError
from tsae.store import geometry
from tsae.store.reader import Store
from tsae.store.writer import finalise, prepare, write_shard

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
WriteStore = Callable[..., Store]


def real_positions(store: Store) -> torch.Tensor:
    return torch.arange(store.context_length) < torch.from_numpy(store.lengths)[:, None]


@pytest.mark.parametrize("dtype", DTYPES)
def test_store_returns_what_was_written_and_zarr_sees_the_same(
    write_store: WriteStore, speak: Callable[..., torch.Tensor], ragged: np.ndarray, dtype: str
) -> None:
    store = write_store(ragged, dtype=dtype, heldout=100)
    assert store.layout.geometry.shards > 2
    expected = torch.where(real_positions(store)[..., None], speak(ragged, 64), 0).to(DTYPES[dtype])
    found = store.read(range(store.n_sequences))
    assert found.dtype == DTYPES[dtype]
    assert torch.equal(found, expected)
    group = zarr.open(str(store.path), mode="r")
    assert group["activations"].attrs["dtype"] == dtype
    assert torch.equal(torch.from_numpy(group["activations"][:]).view(DTYPES[dtype]), expected)
    np.testing.assert_array_equal(group["tokens"][:], store.tokens)
    np.testing.assert_array_equal(group["document"][:], ragged)


def test_a_store_tells_what_it_is(write_store: WriteStore, ragged: np.ndarray) -> None:
    store = write_store(ragged, dtype="bfloat16", heldout=100)
    tokens = int(store.lengths.sum())
    assert repr(store) == (
        f"Store {store.path}: complete\nunknown model, no layer: {tokens:,} tokens in 1,003 contexts of 32 (100 held out), "
        "64 dimensions, bfloat16"
    )
    store.layout.set_attributes(complete=False, model={"name": "embedded", "hook_path": "gpt_neox.layers.2"})
    assert repr(store).startswith(f"Store {store.path}: not finished\nembedded, gpt_neox.layers.2: ")


def test_store_is_an_ordinary_zarr_group(write_store: WriteStore, ragged: np.ndarray) -> None:
    store = write_store(ragged)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        members = dict(zarr.open_group(str(store.path), mode="r").members(max_depth=None))
    assert set(members) == {"activations", "checksums", "norms", "tokens", "lengths", "document", "label"}
    assert members["activations"].shape == (1003, 32, 64)
    np.testing.assert_array_equal(members["checksums"][:], store.layout.read_checksums())


def test_sequences_come_in_the_order_asked_for(write_store: WriteStore, ragged: np.ndarray) -> None:
    store = write_store(ragged, dtype="bfloat16")
    everything, wanted = store.read(range(1003)), [1002, 3, 500, 3, 0, 501, 502]
    out = torch.full((len(wanted), 32, 64), 7.0, dtype=torch.bfloat16)
    assert store.read(wanted, out=out) is out
    assert torch.equal(out, everything[wanted])
    assert store.read([]).shape == (0, 32, 64)
    with pytest.raises(IndexError):
        store.read([1003])


def test_valid_positions_are_of_documents_and_not_skipped(write_store: WriteStore, ragged: np.ndarray) -> None:
    valid = write_store(ragged).valid(Counted(3))
    assert not valid[:, :3].any()
    np.testing.assert_array_equal(valid[:, 3:], ragged[:, 3:] >= 0)


def test_bytes_exceed_the_data_by_less_than_a_two_thousandth(
    tmp_path: Path, contexts_of: Callable[..., Contexts]
) -> None:
    document = np.zeros((4099, 128), np.int32)
    layout = prepare(tmp_path / "store", contexts_of(document), 64, store=StoreConfig(shard_mb=16))
    for shard in range(layout.geometry.shards):
        write_shard(layout, shard, [torch.zeros(len(layout.geometry.sequences_of(shard)), 128, 64)])
    files = [file for file in layout.activations.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= document.size * 64 * 2 * 1.0005


@given(
    sequences=st.integers(1, 10**6),
    length=st.integers(1, 2048),
    dim=st.integers(1, 5000),
    dtype=st.sampled_from(sorted(DTYPES)),
    shard_mb=st.integers(1, 512),
)
def test_shards_partition_the_sequences(sequences: int, length: int, dim: int, dtype: str, shard_mb: int) -> None:
    chosen = geometry.choose(sequences, length, dim, dtype, shard_mb)
    last = chosen.shards - 1
    assert chosen.sequences_of(0).start == 0
    assert chosen.sequences_of(last).stop == sequences
    assert chosen.chunks_of(last).stop == chosen.chunks
    assert 0 < len(chosen.chunks_of(last)) <= chosen.chunks_per_shard
    assert chosen.shard_sequences % chosen.chunk_sequences == 0
    assert chosen.chunks_per_shard * chosen.chunk_bytes <= max(shard_mb * 10**6, chosen.chunk_bytes)
    if sequences * chosen.sequence_bytes >= 10**8:
        assert chosen.chunks * chosen.stride <= 1.003 * sequences * chosen.sequence_bytes


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_was_never_written_reads_as_nan(
    tmp_path: Path, contexts_of: Callable[..., Contexts], ragged: np.ndarray, dtype: str
) -> None:
    layout = prepare(tmp_path / "store", contexts_of(ragged), 8, store=StoreConfig(dtype=dtype))  # type: ignore[arg-type]
    raw = zarr.open(str(layout.path), mode="r")["activations"][:3]
    assert torch.isnan(torch.from_numpy(raw).view(DTYPES[dtype])).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_activations_that_are_not_finite_are_refused_but_not_at_padding(
    tmp_path: Path,
    contexts_of: Callable[..., Contexts],
    speak: Callable[..., torch.Tensor],
    ragged: np.ndarray,
    value: float,
) -> None:
    layout = prepare(tmp_path / "store", contexts_of(ragged), 8, store=StoreConfig())
    activations = speak(ragged, 8)
    short = int(np.flatnonzero(layout.lengths < 32)[0])
    activations[short, -1] = value
    write_shard(layout, 0, [activations])
    assert layout.is_written(0)
    layout.marker(0).unlink()
    activations[17, 1, 3] = value
    with pytest.raises(TsaeError, match="sequence 17 are not finite"):
        write_shard(layout, 0, activations.split(10))
    assert not layout.is_written(0)


def test_overflow_of_float16_is_refused(tmp_path: Path, contexts_of: Callable[..., Contexts]) -> None:
    document = np.zeros((4, 8), np.int32)
    layout = prepare(tmp_path / "store", contexts_of(document), 8, store=StoreConfig(dtype="float16"))
    with pytest.raises(TsaeError, match=r"choose store.dtype bfloat16"):
        write_shard(layout, 0, [torch.full((4, 8, 8), 70000.0)])


@pytest.mark.parametrize("count", [1002, 1004])
def test_wrong_number_of_sequences_is_refused(
    tmp_path: Path, contexts_of: Callable[..., Contexts], ragged: np.ndarray, count: int
) -> None:
    layout = prepare(tmp_path / "store", contexts_of(ragged), 2, store=StoreConfig())
    with pytest.raises(ValueError, match="sequences were given"):
        write_shard(layout, 0, [torch.zeros(count, 32, 2)])
    assert not layout.is_written(0)


def test_incomplete_store_is_refused_with_the_shards_that_are_missing(
    tmp_path: Path, contexts_of: Callable[..., Contexts], ragged: np.ndarray
) -> None:
    layout = prepare(tmp_path / "store", contexts_of(ragged), 64, store=StoreConfig(shard_mb=1))
    with pytest.raises(TsaeError, match=r"5 of 5 shards are missing \(0, 1, 2, 3, 4\)"):
        Store.open(layout.path)
    with pytest.raises(TsaeError, match=r"shards \[0, 1, 2, 3, 4\] are not written"):
        finalise(layout)


def test_preparing_twice_keeps_the_first_store(
    tmp_path: Path, contexts_of: Callable[..., Contexts], ragged: np.ndarray
) -> None:
    first = prepare(tmp_path / "store", contexts_of(ragged), 8, store=StoreConfig())
    second = prepare(tmp_path / "store", contexts_of(ragged[:10]), 8, store=StoreConfig())
    assert second.geometry == first.geometry
    assert [file.name for file in tmp_path.iterdir()] == ["store"]


def test_what_killed_writers_left_is_removed_and_what_live_ones_write_is_not(
    tmp_path: Path, contexts_of: Callable[..., Contexts], ragged: np.ndarray
) -> None:
    layout = prepare(tmp_path / "store", contexts_of(ragged), 8, store=StoreConfig())
    folder, host = layout.shard(0).parent, os.uname().nodename.replace(".", "-")
    folder.mkdir(parents=True)
    dead = subprocess.Popen(["true"])
    dead.wait()
    for pid in (dead.pid, os.getpid()):
        (folder / f".0.{host}.{pid}.0123abcd.tmp").write_bytes(b"part of a shard")
    elsewhere = f".0.{host}-another0.{dead.pid}.0123abcd.tmp"  # in a container that has this host's name
    (folder / elsewhere).touch()
    write_shard(layout, 0, [torch.zeros(1003, 32, 8)])
    here = f".0.{host}.{os.getpid()}.0123abcd.tmp"
    assert {file.name for file in folder.iterdir()} == {here, elsewhere, "0"}


def test_store_of_a_future_version_is_refused(write_store: WriteStore, ragged: np.ndarray) -> None:
    store = write_store(ragged[:5])
    store.layout.set_attributes(version=99)
    with pytest.raises(TsaeError, match="has store version 99"):
        Store.open(store.path)


def test_attributes_describe_the_store(write_store: WriteStore, ragged: np.ndarray) -> None:
    attributes = json.loads((write_store(ragged, heldout=100).path / "zarr.json").read_text())["attributes"]
    assert attributes["heldout"] == 100
    assert attributes["complete"] is True
    assert attributes["geometry"] == dataclasses.asdict(geometry.choose(1003, 32, 64, "float32", 1))
