"""Rows on disk are those of the array that was written, whichever are asked for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tsae.runtime.errors import TsaeError
from tsae.runtime.rows import RowsOnDisk, parts

PER_FILE = 7
ARRAY = np.random.default_rng(0).integers(0, 1000, (40, 3)).astype(np.int32)


@pytest.fixture
def on_disk(tmp_path: Path) -> RowsOnDisk:
    for number in range(-(-len(ARRAY) // PER_FILE)):
        rows = ARRAY[number * PER_FILE : (number + 1) * PER_FILE]
        (tmp_path / str(number)).write_bytes(rows.tobytes() + b"sum")
    return RowsOnDisk(ARRAY.shape, "<i4", lambda number: tmp_path / str(number), PER_FILE, remedy="write it again")


@pytest.mark.parametrize(
    "index",
    [
        slice(None),
        slice(5, 29),
        slice(30, 3, -4),
        slice(9, 9),
        np.array([3, 4, 5, 39, 0, 0, -1]),
        np.array([], np.int64),
        [13, 14],
        6,
        -1,
        (slice(2, 20), slice(1, None)),
        (np.array([8, 2]), 2),
        (4, slice(0, 2)),
        (4, 1),
    ],
    ids=str,
)
def test_an_index_gives_what_numpy_gives(on_disk: RowsOnDisk, index: object) -> None:
    np.testing.assert_array_equal(on_disk[index], ARRAY[index])  # type: ignore[index]
    assert on_disk[index].dtype == ARRAY.dtype


def test_runs_and_blocks_and_the_whole(on_disk: RowsOnDisk, monkeypatch: pytest.MonkeyPatch) -> None:
    found = on_disk.runs(np.array([20, 3, 3]), np.array([15, 0, 2]))
    np.testing.assert_array_equal(found, np.concatenate([ARRAY[20:35], ARRAY[3:5]]))
    np.testing.assert_array_equal(np.asarray(on_disk), ARRAY)
    np.testing.assert_array_equal((on_disk == 7) | (on_disk > 500), (ARRAY == 7) | (ARRAY > 500))
    np.testing.assert_array_equal(1 - np.square(on_disk), 1 - ARRAY**2)
    monkeypatch.setattr("tsae.runtime.rows.NUMBERS_AT_ONCE", 35)
    assert [len(on_disk[part]) for part in parts(40, 3)] == [11, 11, 11, 7]
    assert [*parts(2, 1000)] == [slice(0, 1), slice(1, 2)]


def test_what_cannot_be_given_is_refused(on_disk: RowsOnDisk, tmp_path: Path) -> None:
    with pytest.raises(IndexError):
        on_disk[np.array([40])]
    with pytest.raises(TypeError):
        on_disk[np.array([1, 2]), np.array([0, 1])]
    (tmp_path / "2").write_bytes(b"short")
    with pytest.raises(TsaeError, match="2: is too short; write it again"):
        on_disk[10:20]
    (tmp_path / "2").unlink()
    with pytest.raises(TsaeError, match="2: cannot be read: No such file or directory; write it again"):
        on_disk[10:20]
    sparse = RowsOnDisk(ARRAY.shape, "<f4", lambda number: tmp_path / str(number), PER_FILE, remedy="", absent=np.nan)
    assert np.isnan(sparse[13:22]).any(1).tolist() == [False] + [True] * 7 + [False]
