"""The one pass over a store's sequences, and the figures of latents that follow from it, against dense definitions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tsae.checkpoint import RunFolder
from tsae.config import run as configuration
from tsae.config.run import Counted, RunConfig
from tsae.evaluation.smoothness import active_code, smoothness
from tsae.experiments.shared import firings as firings_module
from tsae.experiments.shared.firings import (
    Firings,
    any_per_document,
    collect,
    cut,
    latent_statistics,
    peaks,
    silent,
    spread,
    strongest_per_document,
    texts,
)
from tsae.experiments.shared.subject import Subject
from tsae.runtime.errors import TsaeError
from tsae.stages import harvest_stage, train_stage
from tsae.store.reader import Store

SEQUENCES = 50


@pytest.fixture(scope="module")
def subject(run_config: RunConfig, checkpoints: Path) -> Subject:
    return Subject(run_config, RunFolder.of(checkpoints, "temporal"))


@pytest.fixture(scope="module")
def store(run_config: RunConfig) -> Store:
    return Store.open(harvest_stage(run_config), run_config)


@pytest.fixture(scope="module")
def firings(subject: Subject, store: Store) -> Firings:
    return collect(subject, store, range(SEQUENCES), "test")


@pytest.fixture(scope="module")
def dense(subject: Subject, store: Store) -> np.ndarray:
    """Feature activations [S, L, F], by how much their latents write; 0 where there is no text."""
    codes = subject.dictionary.encode(store.read(range(SEQUENCES)).float()) * subject.dictionary.row_norms
    return np.where(store.valid(Counted(1))[:SEQUENCES, :, None], codes.numpy(), 0.0)


def test_every_activation_is_found_at_its_place(firings: Firings, dense: np.ndarray, store: Store) -> None:
    found = np.zeros((dense.shape[0] * dense.shape[1], dense.shape[2]), np.float32)
    found[firings.places, firings.latents] = firings.values
    np.testing.assert_allclose(found.reshape(dense.shape), dense, atol=1e-5)
    assert len(firings.values) == np.count_nonzero(dense)
    for latent in range(firings.dict_size):
        assert (np.diff(firings.of(latent)[0]) > 0).all()
    np.testing.assert_array_equal(firings.tokens, store.tokens[:SEQUENCES])
    assert firings.n_tokens == store.valid(Counted(1))[:SEQUENCES].sum()


def test_figures_of_latents_are_those_of_the_dense_codes(firings: Firings, dense: np.ndarray, store: Store) -> None:
    figures, valid = latent_statistics(firings), store.valid(Counted(1))[:SEQUENCES]
    x = store.read(range(SEQUENCES)).float()
    steepest: dict[int, list[float]] = {}
    again, possible = np.zeros(dense.shape[2]), np.zeros(dense.shape[2])
    for row in range(SEQUENCES):
        f = torch.from_numpy(dense[row][valid[row]])
        code = active_code(f)
        for latent in code.latents.tolist():
            found = smoothness(code, x[row][valid[row]], [(latent, latent + 1)]).lipschitz
            steepest.setdefault(latent, []).append(float(found))
        fires = f.numpy() > 0
        again += (fires[:-1] & fires[1:]).sum(0)
        possible += fires[:-1].sum(0)
    for latent in range(dense.shape[2]):
        values = dense[..., latent][dense[..., latent] > 0]
        assert figures.rate[latent] == pytest.approx(len(values) / valid.sum())
        if not len(values):
            assert np.isnan([figures.largest[latent], figures.mean[latent], figures.smoothness[latent]]).all()
            continue
        assert figures.largest[latent] == pytest.approx(values.max(), rel=1e-4)
        assert figures.mean[latent] == pytest.approx(values.mean(), rel=1e-4)
        assert figures.smoothness[latent] == pytest.approx(np.mean(steepest[latent]), rel=1e-3)
        if possible[latent]:
            assert figures.persistence[latent] == pytest.approx(again[latent] / possible[latent])


def test_neither_steps_nor_windows_cross_documents(run_config: RunConfig, tmp_path: Path) -> None:
    packed = configuration.replace(run_config, data={"packing": "concat"}, store={"path": str(tmp_path / "store")})
    packed = configuration.replace(packed, training={"steps": 5})
    store = Store.open(harvest_stage(packed), packed)
    train_stage(packed, tmp_path, "packed")
    firings = collect(Subject(packed, RunFolder.of(tmp_path, "packed")), store, range(40), "test")
    document = store.document[:40]
    assert (np.diff(document, axis=1) != 0).any(), "the test needs sequences that hold several documents"
    begins = np.ones(document.shape, bool)
    begins[:, 2:] = document[:, 2:] != document[:, 1:-1]
    assert np.isnan(firings.distance[begins]).all()
    assert not np.isnan(firings.distance[~begins & (document >= 0)]).any()

    windows = cut(firings, 8)
    flat = firings.document.reshape(-1)
    for number, (first, last) in enumerate(zip(windows.first, windows.last, strict=True)):
        assert (flat[first : last + 1] == windows.document[number]).all()
        assert 4 <= last + 1 - first <= 8
        assert (windows.number[first : last + 1] == number).all()
    covered = (windows.number >= 0).sum()
    lengths = np.bincount(texts(firings)[texts(firings) >= 0])
    assert covered == sum(length - (rest if (rest := length % 8) < 4 else 0) for length in lengths)


def test_windows_know_where_a_latent_is_active(firings: Firings, dense: np.ndarray) -> None:
    windows, flat = cut(firings, 8), dense.reshape(-1, dense.shape[2])
    for latent in np.argsort(-firings.counts)[[0, 5, 20]]:
        active, peak = peaks(firings, windows, int(latent))
        truth = np.array(
            [flat[first : last + 1, latent].max() for first, last in zip(windows.first, windows.last, strict=True)]
        )
        np.testing.assert_array_equal(active, np.flatnonzero(truth))
        np.testing.assert_allclose(peak, truth[active], rtol=1e-4)

        ranked = strongest_per_document(windows, active, peak)
        assert len(set(windows.document[ranked])) == len(ranked) == len(set(windows.document[active]))
        assert (np.diff(truth[ranked]) <= 1e-6).all()
        drawn = any_per_document(windows, active, peak, np.random.default_rng(0))
        assert sorted(windows.document[drawn]) == sorted(windows.document[ranked])
        assert (np.diff(truth[drawn]) <= 1e-6).all()
        assert truth[drawn].sum() <= truth[ranked].sum()
        quiet = silent(windows, active, 12, np.random.default_rng(0))
        assert not truth[quiet].any()
        assert len(set(quiet)) == len(quiet) == min(12, (truth == 0).sum())


def test_a_spread_takes_both_ends_and_what_lies_between_evenly() -> None:
    assert spread(np.arange(101), 5).tolist() == [0, 25, 50, 75, 100]
    assert spread(np.arange(3), 5).tolist() == [0, 1, 2]


def test_codes_that_are_too_many_are_read_in_part(
    subject: Subject, store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(firings_module, "MOST_ENTRIES", 300)
    monkeypatch.setattr(firings_module, "TOKENS_AT_ONCE", 320)
    part = collect(subject, store, range(SEQUENCES), "test")
    assert 0 < len(part.tokens) < SEQUENCES
    assert "of 50 sequences are read" in caplog.text
    assert part.document.shape == part.tokens.shape == part.distance.shape


def test_positions_without_text_are_not_looked_at(run_config: RunConfig, checkpoints: Path, store: Store) -> None:
    config = configuration.replace(run_config, data={"skip_positions": 32})
    with pytest.raises(TsaeError, match="the 4 sequences to read hold no text beyond the skipped positions"):
        collect(Subject(config, RunFolder.of(checkpoints, "temporal")), store, range(4), "test")


def test_a_dictionary_of_another_width_is_refused(
    run_config: RunConfig, checkpoints: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = Subject(run_config, RunFolder.of(checkpoints, "temporal"))
    monkeypatch.setattr(store, "activation_dim", 16)
    with pytest.raises(TsaeError, match=r"32 dimensions.*holds 16"):
        collect(subject, store, range(4), "test")
