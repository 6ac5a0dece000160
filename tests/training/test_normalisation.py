"""Training on normalised activations: files are for raw ones, whenever they were written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tsae.checkpoint import RunFolder, load_dictionary
from tsae.config import run as configuration
from tsae.config.run import Counted, RunConfig
from tsae.runtime.errors import TsaeError
from tsae.sae.dictionary import Dictionary
from tsae.sae.kinds import KINDS, from_state
from tsae.store.moments import Moments, moments_of
from tsae.store.pairs import PairStream
from tsae.store.reader import Store
from tsae.training.run import train
from tsae.training.trainer import Trainer

DIM = 24


def batches(normalised: RunConfig) -> tuple[Store, PairStream]:
    store = Store.open(str(normalised.store.path), normalised)
    stream = PairStream(store, "previous", normalised.training.batch_size, 0, counted=Counted(1), pool_sequences=64)
    return store, stream


def far_from_zero(count: int = 25) -> tuple[list[Tensor], Moments]:
    """Pairs as a store in bfloat16 has them whose mean's norm is 50 times the deviation, most of it in one dimension."""
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(DIM, generator=generator)
    mean[3] = 50
    mean *= 50 * DIM**0.5 / mean.norm()
    directions = torch.nn.functional.normalize(torch.randn(40, DIM, generator=generator), dim=1)
    features = torch.rand(count * 64, 2, 40, generator=generator) * (
        torch.rand(count * 64, 1, 40, generator=generator) < 0.1
    )
    x = features @ directions
    x = (mean + x / x.std()).bfloat16().float()
    tokens = x.double().flatten(0, 1)
    moments = Moments(
        len(tokens), tokens.mean(0).float(), tokens.var(0, correction=0), float(tokens.square().sum(1).mean())
    )
    return list(x.split(64)), moments


def raw_of(built: Trainer) -> Dictionary:
    name = KINDS[built.config.sae.kind].dictionary.__name__
    return from_state(name, built.dictionary.to_file(built.scale, built.shift), None, "test")


@pytest.mark.parametrize("normalize", ["mean_squared_norm", "centred"])
@pytest.mark.parametrize("kind", KINDS)
def test_saved_weights_apply_to_raw_activations(normalised: RunConfig, kind: str, normalize: str) -> None:
    config = configuration.replace(normalised, sae={"kind": kind}, training={"normalize": normalize})
    store, stream = batches(config)
    built = Trainer(config, store.activation_dim, moments=moments_of(store, config.counted))
    for batch in stream.iterate(0, 20):
        terms = built.step(batch)
        assert float(terms.l2_loss) < 50 * (1 if normalize == "mean_squared_norm" else store.activation_dim)
    raw, x = raw_of(built), stream[20][:, 0]
    with torch.no_grad():
        f = built.dictionary.encode((x if built.shift is None else x - built.shift) / built.scale)
        torch.testing.assert_close(
            raw.encode(x) * raw.row_norms, built.scale * f * built.dictionary.row_norms, rtol=1e-4, atol=1e-4
        )
        assert int((raw.encode(x) > 0).sum()) == pytest.approx(int((f > 0).sum()), abs=2)
        reconstruction = built.scale * built.dictionary.decode(f) + (0 if built.shift is None else built.shift)
        torch.testing.assert_close(raw(x), reconstruction, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_centred_training_sees_no_mean_however_large(normalised: RunConfig, kind: str) -> None:
    """The weights, and what is told of them, are those of a training on the centred activations alone, from the first."""
    config = configuration.replace(normalised, sae={"kind": kind}, training={"normalize": "centred"})
    pairs, moments = far_from_zero()
    built = Trainer(config, DIM, moments=moments)
    plain = Trainer(configuration.replace(config, training={"normalize": "none"}), DIM)
    assert built.scale == pytest.approx(float(moments.variance.mean()) ** 0.5)
    for batch in pairs[:-1]:
        terms, expected = built.step(batch), plain.step((batch - moments.mean) / built.scale)
        assert float(terms.loss) == float(expected.loss)
        told = float(expected.threshold)
        assert float(terms.threshold) == pytest.approx(told * (built.scale if told > 0 else 1))  # -1: none yet
    raw, x = raw_of(built), pairs[-1][:, 0]
    with torch.no_grad():
        f = plain.dictionary.encode((x - moments.mean) / built.scale)
        assert int((f > 0).sum()) > 0
        # float32 rounds a product with the mean to a few millionths of it.
        close = {"rtol": 1e-4, "atol": 1e-5 * float(moments.mean.norm())}
        torch.testing.assert_close(raw.encode(x) * raw.row_norms, built.scale * f * plain.dictionary.row_norms, **close)
        reconstruction = moments.mean + built.scale * plain.dictionary.decode(f)
        torch.testing.assert_close(raw(x), reconstruction, **close)
    again = Trainer(config, DIM, raw.to_file(), moments=moments)  # a warm start gives the training's own weights back
    for key, value in again.dictionary.to_file().items():
        torch.testing.assert_close(value, built.dictionary.to_file()[key], **close)


def test_normalised_training_is_training_on_normalised_activations(normalised: RunConfig) -> None:
    store, stream = batches(normalised)
    built = Trainer(normalised, store.activation_dim, moments=moments_of(store, normalised.counted))
    assert built.scale == pytest.approx(moments_of(store, normalised.counted).mean_squared_norm ** 0.5)
    plain = Trainer(configuration.replace(normalised, training={"normalize": "none"}), store.activation_dim)
    for batch in stream.iterate(0, 5):
        assert float(built.step(batch).loss) == float(plain.step(batch / built.scale).loss)
    state = built.dictionary.to_file(built.scale)
    again = Trainer(normalised, store.activation_dim, state, moments=moments_of(store, normalised.counted))
    torch.testing.assert_close(again.dictionary.b_enc, built.dictionary.b_enc)


@pytest.mark.parametrize("normalize", ["mean_squared_norm", "unit_rms", "centred"])
def test_activations_without_a_scale_are_refused(normalised: RunConfig, normalize: str) -> None:
    config = configuration.replace(normalised, training={"normalize": normalize})
    with pytest.raises(TsaeError, match="needs the activations' moments; pass moments="):
        Trainer(config, DIM)
    constant = Moments(1, torch.ones(DIM), torch.zeros(DIM), DIM if normalize == "centred" else 0.0)
    with pytest.raises(TsaeError, match=r"needs activations that (vary|are not all zero); harvest others"):
        Trainer(config, DIM, moments=constant)


@pytest.mark.parametrize("normalize", ["unit_rms", "centred"])
def test_a_root_mean_square_of_one_remains(normalised: RunConfig, normalize: str) -> None:
    store, stream = batches(normalised)
    config = configuration.replace(normalised, training={"normalize": normalize})
    built = Trainer(config, store.activation_dim, moments=moments_of(store, config.counted))
    x = torch.cat([stream[step][:, 0] for step in range(20)])
    x = (x if built.shift is None else x - built.shift) / built.scale
    assert float(x.square().mean()) == pytest.approx(1, rel=0.1)
    if normalize == "centred":
        assert float(x.mean(0).norm()) < 0.2 * store.activation_dim**0.5


@pytest.mark.parametrize("normalize", ["mean_squared_norm", "centred"])
def test_intermediate_files_are_for_raw_activations_and_saving_leaves_training_alone(
    normalised: RunConfig, tmp_path: Path, normalize: str
) -> None:
    config = configuration.replace(normalised, training={"normalize": normalize})
    quiet, noisy = RunFolder.of(tmp_path, "quiet"), RunFolder.of(tmp_path, "noisy")
    train(config, quiet)
    train(configuration.replace(config, training={"save_steps": tuple(range(1, 60, 4))}), noisy)
    final, last = load_dictionary(quiet.path)[0], load_dictionary(noisy.path)[0]
    assert all(torch.equal(value, last.to_file()[key]) for key, value in final.to_file().items())
    x = batches(normalised)[1][0][:, 0]
    early = load_dictionary(noisy.path, checkpoint=57)[0]
    # Three steps before the end, nearly the same dictionary on the same scale.
    assert float((early(x) - final(x)).norm() / final(x).norm()) < 0.2
