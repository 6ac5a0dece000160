"""Every recorded run of the reference implementation, reproduced step by step."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tsae.config import run as configuration
from tsae.training.trainer import Trainer

GOLDEN = Path(__file__).parents[1] / "golden"
RUNS = sorted(path.stem for path in GOLDEN.glob("*.json") if path.stem.startswith(("temporal", "matryoshka", "batch")))
KINDS = {
    "TemporalMatryoshkaBatchTopKTrainer": "temporal",
    "MatryoshkaBatchTopKTrainer": "matryoshka",
    "BatchTopKTrainer": "batch_topk",
}


def config_of(record: dict) -> configuration.RunConfig:
    """The recorded constructor arguments as a RunConfig."""
    arguments = record["kwargs"]
    sae = {"kind": KINDS[record["trainer"]], "dict_size": arguments["dict_size"], "k": arguments["k"]}
    if "group_fractions" in arguments:
        sae["group_fractions"] = arguments["group_fractions"]
    objective = {"preset": "reference", "auxk_alpha": arguments["auxk_alpha"]}
    objective["group_weights"] = arguments.get("group_weights") or "uniform"
    if "temp_alpha" in arguments:
        objective["temporal_alpha"] = arguments["temp_alpha"]
        objective["temporal"] = "contrastive" if arguments["contrastive"] else "l1"
    training = {"batch_size": 64, "pair_rule": "random", "dead_after": record["dead_feature_threshold"]}
    names = ("steps", "lr", "warmup_steps", "decay_start", "threshold_beta", "threshold_start_step")
    training |= {name: arguments[name] for name in names}
    return configuration.from_mapping({"sae": sae, "objective": objective, "training": training}, "golden")


@torch.no_grad()
def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative error in norm."""
    return float((found.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30))


@pytest.mark.parametrize("engine", ["sparse", "dense"])
@pytest.mark.parametrize("name", RUNS)
def test_every_step_of_the_reference_is_reproduced(name: str, engine: str) -> None:
    record = json.loads((GOLDEN / f"{name}.json").read_text())
    tensors = load_file(GOLDEN / f"{name}.safetensors")
    data = load_file(GOLDEN / "data.safetensors")
    config = configuration.replace(config_of(record), training={"engine": engine})
    initial = {key.removeprefix("init."): value for key, value in tensors.items() if key.startswith("init.")}
    initial.pop("num_tokens_since_fired")
    trainer = Trainer(config, data["batches"].shape[-1], initial)

    for expected, batch in zip(record["steps"], data["batches"], strict=True):
        terms = trainer.step(batch if config.sae.kind == "temporal" else batch[:, 0])
        values = {key: float(value) for key, value in terms._asdict().items() if not key.startswith("group_")}
        for key in ("loss", "l2_loss", "auxk_loss", "temp_loss", "min_l2_loss", "max_l2_loss", "grad_norm", "lr"):
            if key in expected:
                assert values[key] == pytest.approx(expected[key], rel=2e-6, abs=1e-9), (key, expected["step"])
        assert values["threshold"] == pytest.approx(expected["threshold"], rel=1e-6)
        for key in ("dead_features", "n_active", "n_fired_features"):
            assert values[key] == expected[key], (key, expected["step"])
        if trainer.steps_done in (1, 10, 30):
            found = trainer.dictionary.to_file() | {"num_tokens_since_fired": trainer.tokens_since_fired}
            for key, value in found.items():
                snapshot = tensors[f"after{trainer.steps_done}.{key}"]
                assert value.dtype == snapshot.dtype
                assert value.shape == snapshot.shape
                assert relative(value, snapshot) <= 2e-6, (key, trainer.steps_done)

    dictionary, x = trainer.dictionary, data["heldout"][:, 0]
    code = dictionary.encode(x)
    assert torch.equal(code > 0, tensors["infer.encode_threshold"] > 0)
    assert relative(code, tensors["infer.encode_threshold"]) <= 2e-6
    assert relative(dictionary.decode(code), tensors["infer.decode"]) <= 2e-6
