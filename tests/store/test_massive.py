"""Tokens of massive norm: found, left out, and the same whoever asks and however old the store is."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr

from tsae import cli
from tsae.config.run import Counted
from tsae.config.sections import StoreConfig
from tsae.data.contexts import Contexts
from tsae.runtime.errors import TsaeError
from tsae.store import norms
from tsae.store.layout import StoreLayout
from tsae.store.massive import MassiveTokens
from tsae.store.moments import moments_of
from tsae.store.pairs import PairStream
from tsae.store.reader import Store
from tsae.store.verify import verify
from tsae.store.writer import finalise, prepare, write_shard

SEQUENCES, LENGTH, DIM, HELDOUT = 1500, 16, 64, 50
MASSIVE = ((7, 1), (8, 9), (60, 3), (61, 4), (1470, 5))
"""Where they are planted; the last one is held out."""
COUNTED = Counted(1, 6.0)


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory, contexts_of: Callable[..., Contexts]) -> Path:
    """A store of BOS and one document a sequence, norms about 8, with tokens of norm about 8,000."""
    document = np.repeat(np.arange(SEQUENCES, dtype=np.int32)[:, None], LENGTH, 1)
    document[:, 0] = -1
    activations = torch.randn(SEQUENCES, LENGTH, DIM, generator=torch.Generator().manual_seed(0))
    for place in MASSIVE:
        activations[place] *= 1000
    layout = prepare(
        tmp_path_factory.mktemp("massive") / "store", contexts_of(document, HELDOUT), DIM, store=StoreConfig(shard_mb=1)
    )
    for shard in reversed(range(layout.geometry.shards)):
        rows = layout.geometry.sequences_of(shard)
        write_shard(layout, shard, activations[rows.start : rows.stop].split(7))
    finalise(layout)
    return layout.path


@pytest.fixture
def before(planted: Path, tmp_path: Path) -> Path:
    """The same store as an earlier version left it."""
    layout = StoreLayout(shutil.copytree(planted, tmp_path / "before"))
    shutil.rmtree(layout.path / "norms")
    layout.set_attributes(
        digests={name: value for name, value in layout.attributes["digests"].items() if name != "norms"}
    )
    return layout.path


def test_norms_are_those_of_the_stored_values(planted: Path) -> None:
    store = Store.open(planted)
    assert store.layout.geometry.shards > 2
    expected = store.read(range(SEQUENCES)).double().square().sum(-1).sqrt().float().numpy()
    np.testing.assert_array_equal(store.norms, expected)
    np.testing.assert_array_equal(zarr.open(str(planted), mode="r")["norms"][:], expected)


def test_massive_tokens_and_chosen_ones_do_not_count(planted: Path) -> None:
    store = Store.open(planted)
    assert store.limit(COUNTED) == 6 * np.median(store.norms[: SEQUENCES - HELDOUT, 1:])
    assert {tuple(place) for place in np.argwhere(store.valid(Counted(1)) & ~store.valid(COUNTED))} == set(MASSIVE)
    np.testing.assert_array_equal(store.valid(COUNTED, np.array([8, 61])), store.valid(COUNTED)[[8, 61]])
    chosen = (int(store.tokens[3, 5]), int(store.tokens[9, 9]))
    left_out = store.valid(Counted(1)) & ~store.valid(Counted(1, None, chosen))
    assert {tuple(place) for place in np.argwhere(left_out)} == {(3, 5), (9, 9)}
    # Of other texts, a run's own limit decides.
    assert store.valid(COUNTED, limit=np.inf).sum() == store.valid(Counted(1)).sum()


def test_a_massive_token_is_nobodys_partner_and_parts_what_is_around_it(planted: Path) -> None:
    store = Store.open(planted)
    whole, parted = (
        PairStream(store, "previous", 10, 0, counted=counted, pool_sequences=64) for counted in (Counted(1), COUNTED)
    )
    earlier = parted._earlier(np.array([7, 8, 60]))
    assert earlier[0].tolist() == [-1, -1, *range(14)]
    assert earlier[1].tolist() == [-1, *range(8), -1, *range(6)]
    assert earlier[2].tolist() == [-1, 0, 1, -1, *range(12)]
    # Without them fall their own pairs and that of the token after, but for the two at the head of their context.
    assert int(whole._pairs.sum() - parted._pairs.sum()) == 1 + 2 + 2 + 2
    batches = torch.stack([parted[step] for step in range(parted.steps_per_epoch)])
    assert float(batches.norm(dim=-1).max()) < store.limit(COUNTED)
    halves = [PairStream(store, "previous", 10, 0, counted=COUNTED, pool_sequences=64, rank=r, world=2) for r in (0, 1)]
    assert torch.equal(torch.cat([half[3] for half in halves]), parted[3])


@pytest.mark.parametrize(
    "counted",
    [COUNTED, Counted(3, 6.0), Counted(1, None, (130, 131, 132)), Counted(1, 1.1)],
    ids=["few", "positions", "tokens", "many"],
)
def test_moments_are_of_what_remains(before: Path, counted: Counted) -> None:
    store = Store.open(before)
    rows = range(SEQUENCES - HELDOUT)
    kept = store.read(rows)[torch.from_numpy(store.valid(counted, slice(len(rows))))].double()
    for _ in range(2):  # as found, and as kept
        found = moments_of(store, counted)
        assert found.tokens == len(kept)
        torch.testing.assert_close(found.mean.double(), kept.mean(0), rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(found.variance, kept.var(0, correction=0), rtol=1e-9, atol=0)
        assert found.mean_squared_norm == pytest.approx(float(kept.square().sum(1).mean()), rel=1e-9)


def test_moments_of_all_tokens_are_the_recorded_ones(planted: Path) -> None:
    store = Store.open(planted)
    found = moments_of(store, Counted(4))
    recorded = store.attributes["statistics"]
    assert torch.equal(found.mean, torch.tensor(recorded["mean"]))
    assert torch.equal(found.variance, torch.tensor(recorded["variance"], dtype=torch.float64))
    assert found.mean_squared_norm == recorded["mean_squared_norm"]


def test_a_store_from_before_gets_its_norms_when_they_are_needed(planted: Path, before: Path) -> None:
    store = Store.open(before)
    assert store.valid(Counted(1)).sum() == SEQUENCES * (LENGTH - 1)
    assert not (before / "norms").exists()
    np.testing.assert_array_equal(store.valid(COUNTED), Store.open(planted).valid(COUNTED))
    assert StoreLayout(before).attributes["digests"] == StoreLayout(planted).attributes["digests"]
    assert norms.recorded(StoreLayout(before)) is not None
    assert verify(before, deep=True) == []
    assert not [path.name for path in before.iterdir() if path.name.startswith(".") or path.suffix == ".lock"]


def test_a_store_where_nothing_may_be_written_is_read_all_the_same(
    before: Path, planted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Whoever runs the tests may be allowed everything.
    monkeypatch.setattr("os.access", lambda *_: False)
    np.testing.assert_array_equal(Store.open(before).norms, Store.open(planted).norms)
    moments_of(Store.open(before), Counted(1, 1.1))
    assert not (before / "norms").exists()
    assert not (before / "moments").exists()


def test_damaged_norms_are_told_and_made_again(before: Path) -> None:
    expected = Store.open(before).norms
    chunk = before / "norms" / "c" / "1" / "0"
    data = bytearray(chunk.read_bytes())
    data[5] ^= 1
    chunk.write_bytes(data)
    [problem] = verify(before)
    assert "norms" in problem
    assert "made from the activations" in problem
    np.testing.assert_array_equal(Store.open(before).norms, expected)
    assert verify(before) == []


def test_a_limit_that_leaves_nothing_is_refused(planted: Path) -> None:
    store = Store.open(planted)
    everything = tuple(int(token) for token in np.unique(store.tokens))
    with pytest.raises(TsaeError, match="no training token counts"):
        moments_of(store, Counted(1, None, everything))


def test_what_a_store_tells_of_its_massive_tokens(planted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = Store.open(planted)
    lengths = store.norms[:, 1:].astype(np.float64)
    massive = lengths > store.limit(COUNTED)
    share = (lengths[massive] ** 2).sum() / (lengths**2).sum()
    found = MassiveTokens.of(store, COUNTED)
    assert found.share_of_squares == pytest.approx(share)
    assert found.line() == (
        f"5 of 22,500 tokens (0.022 %) have norms above 6 times the median {found.median:.4g} (the largest: "
        f"{lengths.max():.4g}) and hold {100 * share:.3g} % of the squared norm: 1 at position 1, 1 at position 9, "
        "1 at position 3, 1 at position 4, 1 elsewhere; training and evaluation leave them out (data.max_norm_multiple)"
    )
    assert "take them as any other" in MassiveTokens.of(store, Counted(1)).line()
    assert MassiveTokens.of(store, Counted(1, 1e5)).line().endswith(f"(the largest: {lengths.max():.4g})")

    trained = lengths[: SEQUENCES - HELDOUT]
    statistics = store.attributes["statistics"]
    assert statistics["norm_quantiles"]["50"] == pytest.approx(np.median(trained))
    assert statistics["norm_quantiles"]["100"] == trained.max()
    mean, variance = np.array(statistics["mean"]), np.array(statistics["variance"])
    assert statistics["gamma"] == pytest.approx(np.linalg.norm(mean) / np.sqrt(variance.sum()))
    assert cli.main(["store", "show", str(planted)]) == 0
    shown = capsys.readouterr().out
    assert f"{statistics['gamma']:.3g} (norm of the mean" in shown
    assert "5 of 22,500 tokens" in shown


@pytest.mark.parametrize("count", [1, 2, 7, 1000, 1001])
def test_quantiles_of_blocks_are_those_of_all_values(count: int) -> None:
    random = np.random.default_rng(count)
    values = (random.lognormal(size=count) * random.choice([0, 1, 1000], count)).astype(np.float32)
    blocks = np.array_split(values, 3)
    shares = np.array([0, 0.001, 0.01, 0.25, 0.5, 0.77, 0.999, 1])
    pairs, between = norms.neighbours(lambda: iter(blocks), shares)
    found = [np.quantile(pair, share) for pair, share in zip(pairs, between, strict=True)]
    np.testing.assert_array_equal(found, np.quantile(values, shares))
    assert np.median(pairs[4]) == np.median(values)


def test_quantiles_of_no_values_are_zero() -> None:
    pairs, _ = norms.neighbours(lambda: iter([np.zeros(0, np.float32)]), np.array([0, 0.5, 1]))
    assert not pairs.any()
