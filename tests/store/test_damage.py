"""Nothing that happens to the files of a store passes for data."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tsae.cli import main
from tsae.runtime.errors import TsaeError
from tsae.store.layout import StoreLayout
from tsae.store.reader import Store
from tsae.store.verify import verify

SHARD = 1


def change(path: Path, offset: int, new: Callable[[bytes], bytes], size: int = 1) -> None:
    data = bytearray(path.read_bytes())
    data[offset : offset + size] = new(bytes(data[offset : offset + size]))
    path.write_bytes(data)


def flipped(data: bytes) -> bytes:
    return bytes(byte ^ 0x10 for byte in data)


def swap(layout: StoreLayout) -> None:
    first, second, between = layout.shard(SHARD), layout.shard(SHARD + 1), layout.path / "between"
    first.rename(between)
    second.rename(first)
    between.rename(second)


def cut(path: Path, keep: Callable[[int], int]) -> None:
    path.write_bytes(path.read_bytes()[: keep(path.stat().st_size)])


DAMAGE: dict[str, Callable[[StoreLayout], object]] = {
    "a flipped byte": lambda layout: change(layout.shard(SHARD), 1000, flipped),
    "a hole of zeros": lambda layout: change(layout.shard(SHARD), 4096, lambda data: bytes(len(data)), 4096),
    "a flipped byte of a checksum": lambda layout: change(layout.shard(SHARD), layout.geometry.chunk_bytes, flipped),
    "a flipped byte of the index": lambda layout: change(layout.shard(SHARD), -9, flipped),
    "deleted": lambda layout: layout.shard(SHARD).unlink(),
    "emptied": lambda layout: cut(layout.shard(SHARD), lambda _: 0),
    "cut in half": lambda layout: cut(layout.shard(SHARD), lambda size: size // 2),
    "without its last bytes": lambda layout: cut(layout.shard(SHARD), lambda size: size - 4),
    "swapped with another": swap,
    "replaced by another": lambda layout: shutil.copy(layout.shard(SHARD + 1), layout.shard(SHARD)),
}


@pytest.fixture
def copied(tmp_path: Path, harvested: Path) -> StoreLayout:
    """A copy of the harvested store, to be damaged."""
    shutil.copytree(harvested, tmp_path / "store")
    return StoreLayout(tmp_path / "store")


def test_several_stores_are_verified_in_one_command(
    copied: StoreLayout, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = shutil.copytree(copied.path, tmp_path / "other")
    assert main(["store", "verify", "--deep", str(copied.path), str(other)]) == 0
    assert capsys.readouterr().out == "".join(f"{path}: every shard is whole\n" for path in (copied.path, other))
    StoreLayout(other).shard(SHARD).write_bytes(b"")
    assert main(["store", "verify", str(other), str(copied.path)]) == 2
    said = capsys.readouterr()
    assert str(other) in said.err
    assert str(copied.path) not in said.err
    assert said.out == f"{copied.path}: every shard is whole\n"


@pytest.mark.parametrize("what", DAMAGE)
def test_damaged_shard_is_named_by_reading_and_by_verify(copied: StoreLayout, what: str) -> None:
    assert verify(copied.path, deep=True) == []
    store, rows = Store.open(copied.path), copied.geometry.sequences_of(SHARD)
    DAMAGE[what](copied)
    with pytest.raises(TsaeError, match=rf"shard {SHARD} \(activations/c/{SHARD}/0/0\)") as caught:
        store.read(rows)
    assert "\n" not in str(caught.value)
    problems = verify(copied.path, deep=True)
    named = [SHARD, SHARD + 1] if what == "swapped with another" else [SHARD]
    assert len(problems) == len(named)
    for problem, shard in zip(problems, named, strict=True):
        assert f"shard {shard} (activations/c/{shard}/0/0)" in problem
    sound = [shard for shard in range(copied.geometry.shards) if shard not in named]
    for shard in sound:
        store.read(copied.geometry.sequences_of(shard))


@pytest.mark.parametrize("what", ["deleted", "cut in half", "swapped with another", "a flipped byte of the index"])
def test_verify_sees_all_but_flipped_data_without_reading_the_data(copied: StoreLayout, what: str) -> None:
    DAMAGE[what](copied)
    assert f"shard {SHARD} " in verify(copied.path)[0]


def test_shard_damaged_after_it_was_read_is_noticed(copied: StoreLayout) -> None:
    store, rows = Store.open(copied.path), copied.geometry.sequences_of(SHARD)
    store.read(rows)
    cut(copied.shard(SHARD), lambda size: size // 2)
    with pytest.raises(TsaeError, match=f"shard {SHARD} .* is truncated"):
        store.read(rows)


def test_marker_of_another_store_does_not_count(copied: StoreLayout) -> None:
    change(copied.marker(SHARD), copied.marker(SHARD).read_bytes().index(copied.identity.encode()), flipped)
    assert not copied.is_written(SHARD)
    assert "no valid marker" in verify(copied.path)[0]


@pytest.mark.parametrize("name", ["tokens", "lengths", "document", "label"])
@pytest.mark.parametrize("damage", ["flip", "delete"])
def test_damage_beside_the_activations_is_an_error(copied: StoreLayout, name: str, damage: str) -> None:
    chunk = next(file for file in sorted((copied.path / name / "c").rglob("*")) if file.is_file())
    chunk.unlink() if damage == "delete" else change(chunk, 3, flipped)
    assert len(verify(copied.path)) == 1
    with pytest.raises(TsaeError, match=f"/{name}: "):
        getattr(Store.open(copied.path), name)


def test_damaged_checksums_are_an_error(copied: StoreLayout) -> None:
    change(copied.path / "checksums" / "c" / "0", 5, flipped)
    assert len(verify(copied.path)) == 1
    with pytest.raises(TsaeError, match="checksums"):
        Store.open(copied.path)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"attributes": {}}', '{"attributes": {"format": "other"}}'])
def test_damaged_attributes_are_an_error(copied: StoreLayout, text: str) -> None:
    (copied.path / "zarr.json").write_text(text)
    with pytest.raises(TsaeError):
        Store.open(copied.path)
    with pytest.raises(TsaeError):
        verify(copied.path)


def test_no_store_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(TsaeError, match="no activation store is here"):
        Store.open(tmp_path / "nothing")


def test_damaged_array_metadata_is_named(harvested: Path, tmp_path: Path) -> None:
    path = shutil.copytree(harvested, tmp_path / "store")
    (path / "activations" / "zarr.json").write_text("{")
    (problem,) = verify(path, deep=True)
    assert "activations/zarr.json: missing or damaged" in problem
