"""`tsae steer` on small real runs: what it writes, what a strength does, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tsae.checkpoint import RunFolder
from tsae.config import run as configuration
from tsae.config.run import RunConfig
from tsae.evaluation.measures import REGISTRY
from tsae.experiments import driver
from tsae.experiments.shared.subject import Subject
from tsae.experiments.steer.generation import Rows, Steering, losses
from tsae.runtime.errors import TsaeError

SMALL = {
    "bootstrap": 100,
    "prompts": ["kaba miba"],
    "text_prompts": 2,
    "prompt_tokens": 3,
    "tokens": 8,
    "multiples": [0, 1, 4],
}


@pytest.fixture
def config(
    run_config: RunConfig, labelled_text: Path, experiment_home: Path, monkeypatch: pytest.MonkeyPatch
) -> RunConfig:
    monkeypatch.setenv("TSAE_HOME", str(experiment_home))
    return with_settings(run_config, labelled_text)


def with_settings(config: RunConfig, dataset: Path | str, **settings: Any) -> RunConfig:
    tree = {
        "experiments": {
            "texts": {"count": 90, "context_length": 32, "min_characters": 20},
            "steer": {**SMALL, "dataset": str(dataset), **settings},
        }
    }
    experiments = configuration.from_mapping(tree, "here").experiments
    return configuration.replace(config, experiments={"texts": experiments.texts, "steer": experiments.steer})


def measured(config: RunConfig, folder: Path, chunk: int = 2) -> dict[str, Any]:
    (path,) = driver.run("steer", config, RunFolder.of(folder, "temporal"), [chunk])
    results: dict[str, Any] = json.loads(Path(path).read_text())
    return results


def test_latents_are_compared_with_random_ones_and_differences_of_means(config: RunConfig, checkpoints: Path) -> None:
    results = measured(config, checkpoints)
    assert [concept["concept"] for concept in results["concepts"]] == ["east", "north", "south"]
    assert [curve["method"] for curve in results["curves"]] == ["latent", "random latent", "difference of means"]
    assert set(results["headline"]) == set(results["half_width_95"])
    assert {f"steering_chunk0/{name}" for name in results["headline"]} <= set(REGISTRY)
    assert results["classifier_accuracy"] > 0.8
    assert len(results["prompts"]) == 3
    assert results["judge"] is None
    latents = {concept["latent"] for concept in results["concepts"]}
    assert len(latents) == 3
    assert not latents & {concept["random_latent"] for concept in results["concepts"]}
    assert RunFolder.of(checkpoints, "temporal").result("steering_chunk2", "png").stat().st_size > 10_000


def test_a_strength_of_zero_gives_the_unsteered_text(config: RunConfig, checkpoints: Path) -> None:
    samples = measured(config, checkpoints)["samples"]
    unsteered = next(sample["text"] for sample in samples if sample["method"] == "unsteered")
    steered = [sample for sample in samples if sample["method"] != "unsteered"]
    assert {sample["text"] for sample in steered if sample["multiple"] == 0} == {unsteered}
    assert len({sample["text"] for sample in steered if sample["multiple"] == 4}) > 1


@pytest.mark.parametrize("mode", ["set", "add"])
def test_the_strength_is_reached_at_the_hook_on_every_generated_token(
    config: RunConfig, checkpoints: Path, mode: str
) -> None:
    subject = Subject(config, RunFolder.of(checkpoints, "temporal"))
    lm, dictionary = subject.language_model, subject.dictionary
    latent, strength = 2, 30.0
    vector = dictionary.W_dec[latent].detach()
    rows = Rows(torch.tensor([latent if mode == "set" else -1]), vector[None], torch.tensor([strength]))
    prompt, seen = torch.tensor([[3, 9, 4]]), []
    steering = Steering(subject, rows)

    def watched(hidden: torch.Tensor) -> torch.Tensor:
        steered = steering(hidden)
        seen.append((hidden[0], steered[0]))
        return steered

    lm.generate(prompt, 6, watched, do_sample=False)
    before, after = (torch.cat(parts) for parts in zip(*seen, strict=True))
    assert len(after) == 3 + 5
    assert torch.equal(after[0], before[0])
    # What the change adds along the latent's own encoder direction is strength x (encoder · decoder).
    change = (after - before)[1:] @ vector / vector.norm() ** 2
    if mode == "add":
        assert change == pytest.approx(strength, rel=1e-4)
    else:
        codes = subject.codes(before[1:]).dense()[:, latent]
        assert change == pytest.approx((strength - codes).numpy(), rel=1e-3)


def test_losses_are_the_models_own_from_the_first_generated_token_on(config: RunConfig, checkpoints: Path) -> None:
    lm = Subject(config, RunFolder.of(checkpoints, "temporal")).language_model
    tokens = torch.randint(2, 30, (5, 9), generator=torch.Generator().manual_seed(0))
    labels = tokens.masked_fill(torch.arange(9) < 4, -100)
    expected = [
        float(lm.module(input_ids=row[None], labels=label[None]).loss)
        for row, label in zip(tokens, labels, strict=True)
    ]
    assert losses(lm, tokens, 4, batch_size=2) == pytest.approx(expected, rel=1e-4)


def test_samples_are_the_same_for_the_same_seed(config: RunConfig, checkpoints: Path) -> None:
    dataset = config.experiments.steer.dataset
    first = measured(with_settings(config, dataset, temperature=1.0), checkpoints)
    again = measured(with_settings(config, dataset, temperature=1.0, success=0.6), checkpoints)
    other = measured(with_settings(config, dataset, temperature=1.0, seed=5), checkpoints)
    texts = [[sample["text"] for sample in found["samples"]] for found in (first, again, other)]
    assert texts[0] == texts[1] != texts[2]


def test_named_latents_absolute_strengths_and_a_judge_are_used(
    config: RunConfig, checkpoints: Path, tmp_path: Path
) -> None:
    alive = [concept["latent"] for concept in measured(config, checkpoints)["concepts"]][:2]
    recorded = tmp_path / "answers.jsonl"
    recorded.write_text("")
    wanted = with_settings(
        config,
        config.experiments.steer.dataset,
        concepts=["south", "east"],
        latents=alive,
        multiples=[],
        strengths=[5, 10],
        judge={"backend": "replay", "model": "judge", "recorded": str(recorded)},
    )
    results = measured(wanted, checkpoints)
    assert [concept["latent"] for concept in results["concepts"]] == alive
    assert {curve["kind"] for curve in results["curves"]} == {"strength"}
    assert results["judge"]["failures"] == 12
    assert "no answer" in results["samples"][-1]["grades"]["failure"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"concepts": ["north", "west"]}, "no text is labelled 'west'"),
        ({"concepts": ["north"]}, "at least 2 are needed"),
        ({"latents": [1]}, "one for each of experiments.steer.concepts"),
        ({"concepts": ["north", "east"], "latents": [1, 64]}, "latents are counted from 0 to 63"),
        ({"multiples": [-1.0]}, "strengths of at least 0"),
        ({"tokens": 60}, "tokens"),
        ({"text_prompts": 500}, "500 are asked for"),
    ],
)
def test_what_cannot_be_is_one_clear_line(
    config: RunConfig, checkpoints: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(TsaeError, match=message):
        measured(with_settings(config, config.experiments.steer.dataset, **settings), checkpoints)


def test_a_latent_of_another_split_is_refused(config: RunConfig, checkpoints: Path) -> None:
    named = {"concepts": ["north", "east"], "latents": [63, 1]}
    with pytest.raises(TsaeError, match="1 is not in this split"):
        measured(with_settings(config, config.experiments.steer.dataset, **named), checkpoints, chunk=1)


def test_a_dead_latent_is_refused(config: RunConfig, checkpoints: Path) -> None:
    subject = Subject(config, RunFolder.of(checkpoints, "temporal"))
    from tsae.experiments.shared.texts import harvest_dataset
    from tsae.experiments.steer.concepts import directions, divide

    settings = config.experiments.steer
    texts = harvest_dataset(subject, settings.dataset)
    subject.dictionary.b_enc.data[5] = -1e4
    wanted = with_settings(config, settings.dataset, concepts=["north", "east"], latents=[4, 5]).experiments.steer
    with pytest.raises(TsaeError, match=r"latent [45] never fires"):
        directions(subject, texts, divide(texts, wanted), slice(0, 64), wanted)
