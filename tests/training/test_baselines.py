"""The kinds of SAE that people compare with: their objectives, their training, their files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tsae.checkpoint import RunFolder, load_dictionary
from tsae.config import run as configuration
from tsae.config.run import RunConfig
from tsae.evaluation.driver import evaluate
from tsae.runtime.errors import TsaeError
from tsae.sae.kinds import KINDS, from_state
from tsae.training.run import train
from tsae.training.trainer import Trainer

PENALTIES = ("standard", "standard_april", "gated", "jump_relu")
BASELINES = ("batch_topk", "topk", *PENALTIES)


def trainer(kind: str, dict_size: int = 48, **objective: float) -> Trainer:
    """A trainer on toy activations of width 12, past every warm-up."""
    tree = {
        "sae": {"kind": kind, "dict_size": dict_size, "k": 4},
        "objective": {"preset": "reference", **objective},
        "training": {"warmup_steps": 0, "lr": 0.01, "batch_size": 32, "steps": 300},
    }
    return Trainer(configuration.from_mapping(tree, "test"), 12)


def toy(rows: int, seed: int) -> Tensor:
    """Sparse sums of 30 fixed directions, off centre."""
    directions = torch.randn(30, 12, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    coefficients = torch.rand(rows, 30, generator=generator) * (torch.rand(rows, 30, generator=generator) < 0.1)
    return coefficients @ directions / 3 + 0.5


def expected_loss(kind: str, built: Trainer, x: Tensor, weight: float) -> Tensor:
    """The objective written out once more, from the tensors of the dictionary's file."""
    state = {key: value.detach() for key, value in built.dictionary.to_file().items()}
    W_enc = state["W_enc"] if "W_enc" in state else state["encoder.weight"].T
    W_dec = state["W_dec"] if "W_dec" in state else state["decoder.weight"].T
    if kind == "gated":
        gate = torch.einsum("bd,df->bf", x - state["decoder_bias"], W_enc) + state["gate_bias"]
        magnitude = torch.exp(state["r_mag"]) * (gate - state["gate_bias"]) + state["mag_bias"]
        f = torch.where((gate > 0) & (magnitude > 0), magnitude, 0)
        through = gate.clamp_min(0) @ W_dec + state["decoder_bias"]
        penalty, extra = gate.clamp_min(0).sum(1).mean(), (x - through).square().sum(1).mean()
        return (x - f @ W_dec - state["decoder_bias"]).square().sum(1).mean() + weight * penalty + extra
    bias = next(state[key] for key in ("bias", "decoder.bias", "b_dec") if key in state)
    pre = (x - bias if kind == "standard" else x) @ W_enc + state.get("encoder.bias", state.get("b_enc"))
    if kind == "jump_relu":
        f = torch.where(pre > state["threshold"], pre, 0)
        penalty = ((f > 0).sum(1).float().mean() / 4 - 1) ** 2
    else:
        f = pre.clamp_min(0)
        penalty = (f * (W_dec.norm(dim=1) if kind == "standard_april" else 1)).sum(1).mean()
    return (x - f @ W_dec - bias).square().sum(1).mean() + weight * penalty


@pytest.mark.parametrize("kind", PENALTIES)
def test_the_loss_is_that_of_the_literature(kind: str) -> None:
    built = trainer(kind, sparsity_penalty=0.05)
    for seed in range(4):
        built.step(toy(32, seed))
    x = toy(32, 9)
    expected = expected_loss(kind, built, x, 0.05)
    terms = built.step(x)
    assert float(terms.loss) == pytest.approx(float(expected), rel=1e-5)
    assert 0 < int(terms.n_active) < 32 * 48
    assert float(terms.sparsity_loss) > 0


@pytest.mark.parametrize("kind", [kind for kind in PENALTIES if kind != "jump_relu"])
def test_gradients_are_those_of_the_written_out_loss(kind: str) -> None:
    built = trainer(kind, sparsity_penalty=0.3)
    built.step(toy(32, 0))
    built.dictionary.double()
    x = toy(32, 1).double()
    encoded = built.engine.encode(built.dictionary, x, None)
    built.engine.backward(built.dictionary, built.weights, encoded, x, None, torch.zeros(48, dtype=torch.bool))
    for name in ("b_enc", "W_enc", "W_dec"):
        parameter = getattr(built.dictionary, name)
        assert parameter.grad is not None
        place = torch.unravel_index(parameter.grad.abs().argmax(), parameter.shape)
        values = []
        for shift in (1e-6, -2e-6):
            parameter.data[place] += shift
            values.append(float(expected_loss(kind, built, x, 0.3)))
        parameter.data[place] += 1e-6
        numeric = (values[0] - values[1]) / 2e-6
        if kind == "gated" and name == "W_dec":
            # The gates are decoded by a frozen copy: their part is in the loss, but not in the gradient.
            assert float(parameter.grad[place]) != pytest.approx(numeric, rel=1e-3)
        else:
            assert float(parameter.grad[place]) == pytest.approx(numeric, rel=1e-4)


def test_thresholds_of_jump_relu_follow_the_kernel_estimate() -> None:
    built = trainer("jump_relu", bandwidth=0.1, sparsity_penalty=0.7)
    x, dictionary = toy(32, 0), built.dictionary
    dictionary.threshold.data.fill_(0.2)
    encoded = built.engine.encode(dictionary, x, None)
    built.engine.backward(dictionary, built.weights, encoded, x, None, torch.zeros(48, dtype=torch.bool))
    with torch.no_grad():
        pre = dictionary.pre_activations(x)
        near = ((pre - 0.2).abs() < 0.05).float()
        f = pre * (pre > 0.2)
        back = 2 * (f @ dictionary.W_dec + dictionary.b_dec - x) / 32 @ dictionary.W_dec.T
        l0 = (f > 0).float().sum(1).mean()
        through_l0 = 0.7 * 2 * (l0 / 4 - 1) / 4 / 32
        expected = -(near * (0.2 * back + through_l0)).sum(0) / 0.1
    torch.testing.assert_close(dictionary.threshold.grad, expected)
    assert float(expected.abs().max()) > 0


@pytest.mark.parametrize("kind", ["standard", "gated", "standard_april"])
def test_an_l1_weight_that_no_one_chose_finds_the_target(kind: str) -> None:
    built = trainer(kind)
    for step in range(300):
        terms = built.step(toy(128, step))
    assert float(terms.n_active) / 128 == pytest.approx(4, rel=0.25)
    assert float(terms.sparsity_weight) > 0


def test_a_chosen_weight_grows_to_its_value_and_stays() -> None:
    built = trainer("standard", sparsity_penalty=0.25, sparsity_warmup_steps=10)
    weights = [float(built.step(toy(32, step)).sparsity_weight) for step in range(20)]
    assert weights == pytest.approx([min(1, step / 10) * 0.25 for step in range(20)])


def test_jump_relu_reaches_its_target() -> None:
    built = trainer("jump_relu", target_l0=6, bandwidth=0.01)
    for step in range(300):
        terms = built.step(toy(128, step))
    assert float(terms.n_active) / 128 == pytest.approx(6, rel=0.2)
    assert float(built.dictionary.threshold.detach().min()) >= 0


def test_thresholds_of_jump_relu_never_become_negative() -> None:
    built = trainer("jump_relu", sparsity_penalty=0, bandwidth=0.5)
    for step in range(5):
        built.step(toy(32, step))
        assert float(built.dictionary.threshold.detach().min()) >= 0
    assert float(built.dictionary.threshold.detach().min()) == 0


def test_top_k_tracks_the_mean_over_tokens_of_the_smallest_activation_kept() -> None:
    for engine in ("sparse", "dense"):
        tree = {
            "sae": {"kind": "topk", "dict_size": 48, "k": 4},
            "objective": "reference",
            "training": {"engine": engine, "warmup_steps": 0, "threshold_start_step": 1, "threshold_beta": 0.75},
        }
        built, followed = Trainer(configuration.from_mapping(tree, "test"), 12), -1.0
        for step in range(5):
            before = built.dictionary.to_file()
            terms = built.step(toy(32, step))
            if step < 2:
                assert float(terms.threshold) == -1
                continue
            kept = from_state("AutoEncoderTopK", before, None, "test").encode(toy(32, step)).detach()
            smallest = float(kept.sort(dim=1, descending=True).values[:, 3].mean())
            followed = smallest if followed < 0 else 0.75 * followed + 0.25 * smallest
            assert float(terms.threshold) == pytest.approx(followed, rel=1e-5)


def test_decoder_rows_keep_norm_1_except_under_the_april_update() -> None:
    for kind in BASELINES:
        built = trainer(kind)
        for step in range(5):
            built.step(toy(32, step))
        norms = built.dictionary.W_dec.detach().norm(dim=1)
        assert torch.allclose(norms, torch.ones_like(norms), atol=1e-6) == (kind != "standard_april"), kind


@pytest.mark.parametrize("kind", ["temporal", *BASELINES])
def test_every_kind_trains_writes_its_class_and_is_evaluated(normalised: RunConfig, tmp_path: Path, kind: str) -> None:
    config = configuration.replace(normalised, sae={"kind": kind})
    run = RunFolder.of(tmp_path, "run")
    train(config, run)
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    assert lines[-1]["fve"] > lines[0]["fve"]
    dictionary, written = load_dictionary(run.path)
    assert (written["trainer"]["trainer_class"], type(dictionary)) == (
        KINDS[kind].trainer_class,
        KINDS[kind].dictionary,
    )
    results = evaluate(config, run)
    assert results["encode_rule"] == dictionary.encode_rule
    # On raw, held-out activations the file does about what training did on normalised ones.
    assert results["frac_variance_explained_pooled"] > 0.3 * lines[-1]["fve"] > 0
    assert results["l0"] == pytest.approx(lines[-1]["l0"], rel=0.35)
    if dictionary.scalar_threshold is not None:
        assert dictionary.scalar_threshold == pytest.approx(lines[-1]["threshold"])


@pytest.mark.parametrize("kind", ["standard", "jump_relu", "topk"])
def test_a_continued_run_is_bit_exact(kind: str) -> None:
    whole, first = trainer(kind), trainer(kind)
    for step in range(12):
        whole.step(toy(32, step))
        if step < 7:
            first.step(toy(32, step))
    second = trainer(kind)
    second.load_state(first.state())
    for step in range(7, 12):
        second.step(toy(32, step))
    for key, value in whole.dictionary.to_file().items():
        assert torch.equal(value, second.dictionary.to_file()[key]), key


@pytest.mark.parametrize("kind", BASELINES)
def test_config_json_has_the_keys_of_the_kind(normalised: RunConfig, tmp_path: Path, kind: str) -> None:
    run = RunFolder(tmp_path)
    train(configuration.replace(normalised, sae={"kind": kind}, training={"steps": 1}), run)
    keys = set(json.loads(run.config_json.read_text())["trainer"])
    assert {"trainer_class", "dict_class", "lr", "steps", "activation_dim", "dict_size", "layer", "lm_name"} <= keys
    assert ("k" in keys) == (kind in ("topk", "batch_topk"))
    assert ("l1_penalty" in keys) == (kind in PENALTIES and kind != "jump_relu")
    assert ({"bandwidth", "sparsity_penalty", "target_l0"} <= keys) == (kind == "jump_relu")
    assert not {"temporal", "temp_alpha", "group_sizes"} & keys
    assert json.loads(run.config_json.read_text())["trainer"]["norm_factor"] > 1


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("objective", "sparsity_penalty", -1),
        ("objective", "target_l0", 97),
        ("objective", "bandwidth", 0),
        ("objective", "sparsity_warmup_steps", -1),
        ("training", "normalize", "rms"),
        ("sae", "kind", "jumprelu"),
    ],
)
def test_impossible_settings_are_refused_by_name(section: str, key: str, value: object) -> None:
    tree = {"sae": {"kind": "jump_relu", "dict_size": 96, "k": 4}}
    tree.setdefault(section, {})[key] = value
    with pytest.raises(TsaeError, match=f"test: {section}.{key}"):
        configuration.from_mapping(tree, "test")
