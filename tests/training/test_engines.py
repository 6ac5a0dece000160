"""The sparse engine against the readable dense definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tests.training.recorded import record_gradients
from tsae.config import run as configuration
from tsae.runtime.errors import TsaeError
from tsae.training.trainer import Trainer

OBJECTIVES: dict[str, dict[str, Any]] = {
    "reference": {"preset": "reference"},
    "paper": {"preset": "paper"},
    "l1": {"preset": "reference", "temporal": "l1"},
    "l2": {"preset": "reference", "temporal": "l2", "temporal_alpha": 1.0},
    "cosine with temperature": {"preset": "reference", "similarity": "cosine", "temperature": 0.1},
    "linear": {"preset": "reference", "temporal": "linear"},
    "linear cosine": {"preset": "scale_free", "temporal": "linear", "directions": "sum"},
    "other documents": {"preset": "scale_free", "same_document": False},
    "relative to variance": {"preset": "reference", "reconstruction": "variance"},
    "scale_free": {"preset": "scale_free"},
    "predictive": {},
    "predictive in part": {"temporal_alpha": 0.4, "high_share": 0.55, "coarse_fraction": 0.2},
    "predictive, released errors": {"reconstruction": "squared_error", "high_share": None, "coarse_fraction": None},
    "contrast with a share": {"preset": "scale_free", "high_share": 0.3},
}


def trainer(engine: str, kind: str, objective: dict, dict_size: int, k: int, fractions: list[float]) -> Trainer:
    tree = {
        "sae": {"kind": kind, "dict_size": dict_size, "k": k, "group_fractions": fractions},
        "objective": objective,
        "training": {"engine": engine, "warmup_steps": 0, "lr": 0.01, "dead_after": 60, "batch_size": 24}
        | {"normalize": "none"},
    }
    built = Trainer(configuration.from_mapping(tree, "test"), 12)
    built.dictionary.double()
    return built


@given(
    kind=st.sampled_from(["temporal", "matryoshka", "batch_topk", "topk"]),
    objective=st.sampled_from(sorted(OBJECTIVES)),
    dict_size=st.integers(20, 140),
    k=st.integers(1, 6),
    fractions=st.sampled_from([[0.2, 0.8], [0.5, 0.5], [0.1, 0.3, 0.6], [0.05, 0.95]]),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=30, deadline=None)
def test_losses_and_gradients_equal_the_dense_definition(
    kind: str, objective: str, dict_size: int, k: int, fractions: list[float], seed: int
) -> None:
    share = OBJECTIVES[objective].get("high_share") or 0
    assume(share * k <= int(fractions[0] * dict_size))  # more than there is in the high-level split is refused
    generator = torch.Generator().manual_seed(seed)
    pair = [trainer(engine, kind, OBJECTIVES[objective], dict_size, k, fractions) for engine in ("dense", "sparse")]
    gradients = [record_gradients(built) for built in pair]
    for _ in range(5):
        shared = torch.randn(24, 1, 12, dtype=torch.float64, generator=generator)
        batch = shared + torch.randn(24, 2, 12, dtype=torch.float64, generator=generator)
        document = torch.randint(6, (24,), generator=generator)
        try:
            dense = pair[0].step(batch, document)
        except TsaeError:
            # The high-level split is silent in the first batch; both paths must say so.
            with pytest.raises(TsaeError):
                pair[1].step(batch, document)
            return
        sparse = pair[1].step(batch, document)
        for name, value in dense._asdict().items():
            numbers = torch.as_tensor(sparse._asdict()[name]).tolist()
            assert numbers == pytest.approx(torch.as_tensor(value).tolist(), rel=1e-10, abs=1e-12, nan_ok=True), name
        for name, expected in gradients[0].items():
            assert (gradients[1][name] - expected).norm() <= 1e-10 * expected.norm() + 1e-12, name
        # Adam turns rounding noise into full steps where a gradient vanishes; the next step starts equal again.
        pair[1].dictionary.load_state_dict(pair[0].dictionary.state_dict())


@pytest.mark.parametrize("kind", ["matryoshka", "topk"])
def test_aux_k_revives_dead_latents_in_both_engines(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    pair = [trainer(engine, kind, {}, 100, 2, [0.2, 0.8]) for engine in ("dense", "sparse")]
    seen_dead = False
    for _ in range(6):
        batch = torch.randn(24, 12, dtype=torch.float64, generator=generator)
        dense, sparse = (built.step(batch) for built in pair)
        assert float(sparse.auxk_loss) == pytest.approx(float(dense.auxk_loss), rel=1e-9)
        seen_dead |= int(dense.dead_features) > 0 and float(dense.auxk_loss) > 0
    assert seen_dead


@pytest.mark.parametrize("engine", ["dense", "sparse"])
def test_a_group_may_have_no_weight(engine: str) -> None:
    batch = torch.randn(24, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    built = trainer(engine, "matryoshka", {"group_weights": [0, 1], "group_reduction": "sum"}, 64, 4, [0.2, 0.8])
    flat = trainer(engine, "batch_topk", {}, 64, 4, [0.2, 0.8])
    assert float(built.step(batch).loss) == pytest.approx(float(flat.step(batch).loss), rel=1e-12)


def test_without_contrast_codes_are_pulled_together_by_their_squared_distance() -> None:
    batch = torch.randn(24, 2, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    dense, sparse = (trainer(engine, "temporal", OBJECTIVES["l2"], 64, 4, [0.5, 0.5]) for engine in ("dense", "sparse"))
    first, other = dense.step(batch), sparse.step(batch)
    assert float(first.temp_loss) == pytest.approx(float(other.temp_loss), rel=1e-12)
    for _ in range(30):
        last = sparse.step(batch)
    assert 0 < float(last.temp_loss) < 0.5 * float(first.temp_loss)


def test_pairs_of_the_same_document_are_no_negatives_if_so_asked() -> None:
    def loss(document: torch.Tensor | None, **objective: Any) -> float:
        generator = torch.Generator().manual_seed(0)
        shared = torch.randn(24, 1, 12, dtype=torch.float64, generator=generator)
        batch = shared + torch.randn(24, 2, 12, dtype=torch.float64, generator=generator)
        built = trainer("sparse", "temporal", {"preset": "scale_free", **objective}, 64, 4, [0.5, 0.5])
        return float(built.step(batch, document).temp_loss)

    one, all_differ = torch.zeros(24), torch.arange(24)
    everything = loss(None)
    assert loss(all_differ, same_document=False) == pytest.approx(everything, rel=1e-12)
    assert loss(one) == everything > loss(torch.arange(24) % 8, same_document=False)
    with pytest.raises(TsaeError, match="temporal term"):
        loss(one, same_document=False)
    with pytest.raises(TsaeError, match="needs the document"):
        loss(None, same_document=False)
    with pytest.raises(TsaeError, match=r"objective\.same_document: False is impossible"):
        loss(one, same_document=False, temporal="linear")


def test_a_temporal_sae_refuses_single_tokens() -> None:
    with pytest.raises(TsaeError, match="needs pairs"):
        trainer("sparse", "temporal", {}, 64, 4, [0.2, 0.8]).step(torch.randn(24, 12, dtype=torch.float64))


@pytest.mark.parametrize("preset", ["scale_free", "reference", "paper"])
def test_without_weight_on_the_temporal_term_a_temporal_sae_is_a_matryoshka_sae(preset: str) -> None:
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(24, 2, 12, dtype=torch.float64, generator=generator) for _ in range(6)]
    objective = {"preset": preset, "temporal_alpha": 0.0}
    one, other = (trainer("sparse", kind, objective, 64, 4, [0.2, 0.8]) for kind in ("temporal", "matryoshka"))
    for batch in batches:
        assert float(one.step(batch).loss) == float(other.step(batch).loss)
    weights = zip(one.dictionary.parameters(), other.dictionary.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in weights)
    some = trainer("sparse", "temporal", {**objective, "temporal_alpha": 0.1}, 64, 4, [0.2, 0.8])
    for batch in batches:
        some.step(batch)
    assert not torch.equal(some.dictionary.W_enc, other.dictionary.W_enc)


@pytest.mark.parametrize("engine", ["dense", "sparse"])
def test_a_temporal_term_without_effect_is_refused(engine: str) -> None:
    twins = torch.randn(24, 1, 12, dtype=torch.float64).expand(24, 2, 12)
    with pytest.raises(TsaeError, match="temporal term"):
        trainer(engine, "temporal", {"temporal": "l1"}, 64, 4, [0.2, 0.8]).step(twins)


def test_schedule_warms_up_holds_and_decays() -> None:
    training = {"steps": 100, "warmup_steps": 10, "decay_start": 80, "lr": 1.0, "normalize": "none"}
    tree = {"training": training, "sae": {"dict_size": 64}}
    built = Trainer(configuration.from_mapping(tree, "test"), 8)
    assert [built.learning_rate(step) for step in (0, 5, 10, 79, 80, 90, 99)] == [0, 0.5, 1, 1, 1, 0.5, 0.05]


def test_biases_may_learn_at_another_rate() -> None:
    def moved(bias_lr: float) -> dict[str, float]:
        tree = {"sae": {"kind": "batch_topk", "dict_size": 64, "k": 4}}
        tree["training"] = {"bias_lr": bias_lr, "lr": 0.01, "warmup_steps": 0, "normalize": "none"}
        built = Trainer(configuration.from_mapping(tree, "test"), 12)
        batch = torch.randn(48, 12, generator=torch.Generator().manual_seed(0))
        built.step(batch)
        before = {name: tensor.clone() for name, tensor in built.dictionary.state_dict().items()}
        built.step(batch)
        after = built.dictionary.state_dict()
        return {name: float((after[name] - before[name]).norm()) for name in ("b_enc", "b_dec", "W_enc")}

    whole, tenth, none = (moved(rate) for rate in (1.0, 0.1, 0.0))
    assert none["b_enc"] == none["b_dec"] == 0
    for name in ("b_enc", "b_dec"):
        assert 0.05 < tenth[name] / whole[name] < 0.2
    assert tenth["W_enc"] == pytest.approx(whole["W_enc"], rel=0.2)


@pytest.mark.parametrize("engine", ["sparse", "dense"])
@pytest.mark.parametrize("kind", ["temporal", "matryoshka", "batch_topk", "topk", "jump_relu", "gated", "standard"])
def test_bf16_rounds_the_products_and_keeps_parameters_and_moments(kind: str, engine: str) -> None:
    def trained(precision: str) -> tuple[Trainer, list[float]]:
        tree = {
            "sae": {"kind": kind, "dict_size": 300, "k": 4},
            "training": {"precision": precision, "engine": engine, "warmup_steps": 0, "lr": 0.001, "dead_after": 60}
            | {"batch_size": 40, "normalize": "none"},
        }
        built = Trainer(configuration.from_mapping(tree, "test"), 24)
        generator = torch.Generator().manual_seed(0)
        terms = [built.step(torch.randn(40, 2, 24, generator=generator)) for _ in range(6)]
        # Latents have died by then, which the selecting kinds revive.
        assert terms[-1].auxk_loss > 0 or kind in ("jump_relu", "standard")
        return built, [float(term.loss) for term in terms]

    (_, exact), (built, rounded) = trained("no"), trained("bf16")
    assert rounded != exact
    assert rounded == pytest.approx(exact, rel=0.05)
    moments = [moment for state in built.optimizer.state.values() for moment in state.values()]
    assert all(tensor.dtype == torch.float32 for tensor in [*built.dictionary.parameters(), *moments])
