"""Training on normalised activations: files are for raw ones, whenever they were written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tsae.checkpoint import RunFolder, load_dictionary
from tsae.config import run as configuration
from tsae.config.run import Counted, RunConfig
from tsae.runtime.errors import TsaeError
from tsae.sae.kinds import KINDS, from_state
from tsae.store.pairs import PairStream
from tsae.store.reader import Store
from tsae.training.run import train
from tsae.training.trainer import Trainer

PENALTIES = ("standard", "standard_april", "gated", "jump_relu")


def batches(normalised: RunConfig) -> tuple[Store, PairStream]:
    store = Store.open(str(normalised.store.path), normalised)
    stream = PairStream(store, "previous", normalised.training.batch_size, 0, counted=Counted(1), pool_sequences=64)
    return store, stream


@pytest.mark.parametrize("kind", ["temporal", "batch_topk", *PENALTIES])
def test_saved_weights_apply_to_raw_activations(normalised: RunConfig, kind: str) -> None:
    config = configuration.replace(normalised, sae={"kind": kind})
    store, stream = batches(config)
    built = Trainer(config, store.activation_dim, mean_squared_norm=store.mean_squared_norm)
    assert built.scale == pytest.approx(store.mean_squared_norm**0.5)
    for batch in stream.iterate(0, 20):
        terms = built.step(batch)
        assert float(terms.l2_loss) < 50  # losses are those of activations of norm 1
    raw = from_state(KINDS[kind].dictionary.__name__, built.dictionary.to_file(built.scale), None, "test")
    x = stream[20][:, 0]
    with torch.no_grad():
        f = built.dictionary.encode(x / built.scale)
        torch.testing.assert_close(raw.encode(x), built.scale * f, rtol=1e-4, atol=1e-4)
        assert int((raw.encode(x) > 0).sum()) == pytest.approx(int((f > 0).sum()), abs=2)
        reconstruction = built.scale * built.dictionary.decode(f)
        torch.testing.assert_close(raw(x), reconstruction, rtol=1e-3, atol=1e-3)


def test_normalised_training_is_training_on_normalised_activations(normalised: RunConfig) -> None:
    store, stream = batches(normalised)
    built = Trainer(normalised, store.activation_dim, mean_squared_norm=store.mean_squared_norm)
    plain = Trainer(configuration.replace(normalised, training={"normalize": "none"}), store.activation_dim)
    for batch in stream.iterate(0, 5):
        assert float(built.step(batch).loss) == float(plain.step(batch / built.scale).loss)
    state = built.dictionary.to_file(built.scale)
    again = Trainer(normalised, store.activation_dim, state, mean_squared_norm=store.mean_squared_norm)
    torch.testing.assert_close(again.dictionary.b_enc, built.dictionary.b_enc)
    with pytest.raises(TsaeError, match="needs the activations' mean squared norm"):
        Trainer(normalised, store.activation_dim)


def test_unit_rms_leaves_a_mean_squared_norm_of_the_dimension(normalised: RunConfig) -> None:
    store, stream = batches(normalised)
    config = configuration.replace(normalised, training={"normalize": "unit_rms"})
    built = Trainer(config, store.activation_dim, mean_squared_norm=store.mean_squared_norm)
    x = torch.cat([stream[step][:, 0] for step in range(20)]) / built.scale
    assert float(x.square().mean()) == pytest.approx(1, rel=0.1)


def test_intermediate_files_are_for_raw_activations_and_saving_leaves_training_alone(
    normalised: RunConfig, tmp_path: Path
) -> None:
    quiet, noisy = RunFolder.of(tmp_path, "quiet"), RunFolder.of(tmp_path, "noisy")
    train(normalised, quiet)
    train(configuration.replace(normalised, training={"save_steps": tuple(range(1, 60, 4))}), noisy)
    final, last = load_dictionary(quiet.path)[0], load_dictionary(noisy.path)[0]
    assert all(torch.equal(value, last.to_file()[key]) for key, value in final.to_file().items())
    x = batches(normalised)[1][0][:, 0]
    early = load_dictionary(noisy.path, checkpoint=57)[0]
    # Three steps before the end, nearly the same dictionary on the same scale.
    assert float((early(x) - final(x)).norm() / final(x).norm()) < 0.2
