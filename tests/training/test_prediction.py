"""The high-level split predicts a token's partner, with a share of k for itself and a coarse part beside it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tsae.config import run as configuration
from tsae.config.run import RunConfig
from tsae.runtime.errors import TsaeError
from tsae.sae.kinds import MatryoshkaBatchTopKSAE, from_state
from tsae.sae.sparse import from_dense, side_by_side
from tsae.store.moments import Moments
from tsae.training.objective import COARSE
from tsae.training.trainer import Trainer

DIM, FEATURES, HIGH, K, BATCH = 16, 100, 20, 10, 64


def config_of(objective: dict[str, Any] | None = None, **training: Any) -> RunConfig:
    tree = {
        "sae": {"dict_size": FEATURES, "k": K},
        "objective": objective or {},
        "training": {"lr": 0.01, "steps": 40, "warmup_steps": 0, "threshold_start_step": 0, "threshold_beta": 0.5}
        | {"normalize": "none", "batch_size": BATCH, **training},
    }
    return configuration.from_mapping(tree, "test")


def pairs(seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(BATCH, 1, DIM, generator=generator)
    return shared + 0.7 * torch.randn(BATCH, 2, DIM, generator=generator)


def trained(config: RunConfig, steps: int = 20, **more: Any) -> Trainer:
    built = Trainer(config, DIM, **more)
    for step in range(steps):
        built.step(pairs(step))
    return built


@pytest.mark.parametrize("engine", ["dense", "sparse"])
def test_each_part_is_charged_with_what_it_leaves_of_its_target(engine: str) -> None:
    alpha, share = 0.75, 0.3
    built = trained(config_of({"temporal_alpha": alpha, "high_share": share}, engine=engine))
    dictionary, batch = built.dictionary, pairs(99)
    x, partner = batch[:, 0], batch[:, 1]
    with torch.no_grad():
        pre = torch.relu(dictionary.pre_activations(x))
        kept = []
        for part, count in ((pre[:, :HIGH], 0.3 * K * BATCH), (pre[:, HIGH:], 0.7 * K * BATCH)):
            cut = part.flatten().sort(descending=True).values[round(count) - 1]
            kept.append(torch.where(part >= cut, part, 0))
        f = torch.cat(kept, dim=1)
        coarse = HIGH + FEATURES // 10
        made = [f[:, :end] @ dictionary.W_dec[:end] + dictionary.b_dec for end in (HIGH, coarse, FEATURES)]

        def error(target: Tensor, part: int) -> float:
            spread = (x - x.mean(0)).square().sum(1).mean()
            return float((target - made[part]).square().sum(1).mean() / spread)

        own = 0.25 * 0.2 * error(x, 0) + 0.8 * (COARSE * error(x, 1) + (1 - COARSE) * error(x, 2))
        predicted, reconstructed = error(partner, 0), own / 2
    terms = built.step(batch)
    assert float(terms.temp_loss) == pytest.approx(predicted, rel=1e-5)
    assert float(terms.l2_loss) == pytest.approx(reconstructed, rel=1e-5)
    assert float(terms.loss) == pytest.approx(reconstructed + alpha * 0.2 / 2 * predicted, rel=1e-5)
    assert terms.group_active.tolist() == [round(0.3 * K * BATCH), round(0.7 * K * BATCH)]


def test_a_weight_above_one_leaves_nothing_of_the_splits_own_reconstruction() -> None:
    built = trained(config_of({"temporal_alpha": 1.5, "temporal_anneal": 1.0}), steps=1)
    assert built.weights.part_weights[0] == 0
    assert built.weights.prediction == pytest.approx(1.5 * 0.2 / 2)


@pytest.mark.parametrize("engine", ["dense", "sparse"])
def test_pairs_of_equal_halves_are_refused(engine: str) -> None:
    same = pairs()[:, :1].expand(-1, 2, -1).contiguous()
    with pytest.raises(TsaeError, match="are the two halves of every pair equal"):
        Trainer(config_of(engine=engine), DIM).step(same)


def test_a_file_with_one_threshold_does_what_training_does_with_two() -> None:
    everything = torch.cat([pairs(step) for step in range(20)]).flatten(0, 1) * 3 + 5
    moments = Moments(len(everything), everything.mean(0), everything.var(0, correction=0), 1.0)
    config = config_of(normalize="centred")
    built = Trainer(config, DIM, moments=moments)
    for step in range(20):
        built.step(pairs(step) * 3 + 5)
    own = built.dictionary
    assert isinstance(own, MatryoshkaBatchTopKSAE)
    assert own.high_threshold is not None
    assert float(own.high_threshold) != pytest.approx(float(own.threshold), rel=0.02)
    state = own.to_file(built.scale, built.shift)
    assert set(state) == {"W_enc", "b_enc", "W_dec", "b_dec", "k", "threshold", "group_sizes"}
    read = from_state(type(own).__name__, state, K, "file")
    x = pairs(77)[:, 0] * 3 + 5
    inside = own.encode((x - built.shift) / built.scale)
    torch.testing.assert_close(read.encode(x) * read.row_norms, inside * built.scale, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(read(x), own.decode(inside) * built.scale + built.shift, rtol=1e-4, atol=1e-5)
    # And back: a training that begins from the file has the two thresholds and rows of norm 1 again.
    again = Trainer(config, DIM, state, moments=moments).dictionary
    assert isinstance(again, MatryoshkaBatchTopKSAE)
    assert again.high_threshold is not None
    torch.testing.assert_close(again.W_dec.norm(dim=1), torch.ones(FEATURES))
    torch.testing.assert_close(again.high_threshold, own.high_threshold, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(again.W_enc, own.W_enc, rtol=1e-4, atol=1e-6)


def test_an_uncalibrated_dictionary_keeps_its_mark() -> None:
    built = trained(config_of(threshold_start_step=30), steps=3)
    state = built.dictionary.to_file(2.0)
    assert float(state["threshold"]) == -1
    torch.testing.assert_close(state["W_dec"].norm(dim=1), torch.ones(FEATURES))


def test_only_the_temporal_sae_has_a_share_of_k_and_a_coarse_part() -> None:
    plain = Trainer(configuration.replace(config_of(), sae={"kind": "matryoshka"}), DIM)
    assert isinstance(plain.dictionary, MatryoshkaBatchTopKSAE)
    assert plain.dictionary.budgets == ((slice(0, FEATURES), K),)
    assert plain.weights.parts == (slice(0, HIGH), slice(HIGH, FEATURES))
    assert not plain.weights.paired


def test_codes_are_put_side_by_side() -> None:
    generator = torch.Generator().manual_seed(0)
    parts = [torch.relu(torch.randn(7, width, generator=generator) - 0.5) for width in (3, 1, 6)]
    whole = side_by_side([from_dense(part) for part in parts])
    expected = from_dense(torch.cat(parts, dim=1))
    assert torch.equal(whole.dense(), torch.cat(parts, dim=1))
    assert all(torch.equal(a, b) for a, b in zip(whole[:3], expected[:3], strict=True))


def test_the_weight_falls_to_its_own_over_the_first_half() -> None:
    built = Trainer(config_of({"temporal_alpha": 0.3, "temporal_anneal": 3.0}), DIM)
    found = []
    for step in range(40):
        built.step(pairs(step))
        found.append(built.weights)
    # 0.2 is the high-level split's own weight, halved by the mean over two groups.
    assert [round(found[step].prediction / 0.1, 6) for step in (0, 10, 20, 39)] == [0.9, 0.6, 0.3, 0.3]
    assert [round(found[step].part_weights[0] / 0.1, 6) for step in (0, 10, 20, 39)] == [0.1, 0.4, 0.7, 0.7]
    assert {each.part_weights[1:] for each in found} == {found[0].part_weights[1:]}
    continued = Trainer(built.config, DIM)
    continued.load_state(built.state())
    assert continued.weights == found[-1]
    contrast = Trainer(config_of({"preset": "scale_free", "temporal_anneal": 3.0}), DIM)
    contrast.step(pairs())
    assert contrast.weights.temporal_alpha == pytest.approx(0.3)
    assert config_of({"preset": "reference"}).objective.temporal_anneal == 1


@pytest.mark.parametrize("steps", [5, 6])
def test_a_weight_that_has_fallen_is_that_of_a_continued_run(steps: int) -> None:
    built = Trainer(config_of({"temporal_alpha": 0.3, "temporal_anneal": 3.0}, steps=steps), DIM)
    for step in range(steps):
        continued = Trainer(built.config, DIM)
        continued.load_state(built.state())
        for trainer in (built, continued):
            trainer.step(pairs(step))
        assert continued.weights == built.weights
        assert torch.equal(continued.dictionary.W_enc, built.dictionary.W_enc)
    assert built.weights == built.weights.at(1.0)


def test_what_follows_from_the_objective() -> None:
    ours = configuration.from_mapping({}, "here")
    assert (ours.pair_rule, ours.normalize, ours.counted.max_norm_multiple) == ("within:16", "centred", 6.0)
    reference = configuration.from_mapping({"objective": "reference"}, "here")
    assert (reference.pair_rule, reference.normalize, reference.counted.max_norm_multiple) == ("previous", "none", None)
    assert (reference.objective.high_share, reference.objective.coarse_fraction) == (None, None)
    with pytest.raises(TsaeError, match=r"objective\.coarse_fraction: 0\.9 is impossible"):
        configuration.from_mapping({"objective": {"coarse_fraction": 0.9}}, "here")
    with pytest.raises(TsaeError, match=r"objective\.high_share: 1\.2 is impossible"):
        configuration.from_mapping({"objective": {"high_share": 1.2}}, "here")
