"""The intervention, the measures and the judge of steering, by themselves."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.sparse import csc_array

from tsae.config.experiments import AnswersConfig, SteerConfig
from tsae.config.sections import SaeConfig
from tsae.experiments.steer.concepts import ConceptClassifier, Direction, choose_latents
from tsae.experiments.steer.generation import NO_LATENT, Condition, Rows, Steering, distinct
from tsae.experiments.steer.scores import (
    SYSTEM,
    Curve,
    area,
    coherence,
    curves,
    doublings,
    judge,
    pareto_front,
    usable_interval,
)
from tsae.sae.inference import encode_sparse
from tsae.sae.init import new_dictionary


@pytest.fixture
def subject() -> Any:
    """A random dictionary of 24 latents on 8 dimensions, on the CPU."""
    dictionary = new_dictionary(SaeConfig(kind="batch_topk", dict_size=24, k=4), 8, seed=0)
    dictionary.threshold.fill_(0.3)
    return SimpleNamespace(dictionary=dictionary, device=torch.device("cpu"), row_norms=dictionary.row_norms)


def activations(subject: Any, x: torch.Tensor) -> torch.Tensor:
    code = encode_sparse(subject.dictionary, x.reshape(-1, x.shape[-1]))
    return code.dense().reshape(*x.shape[:-1], -1)


def rows(subject: Any, latents: list[int], strengths: list[float], mode: str) -> Rows:
    vectors = subject.dictionary.W_dec[latents].detach()
    named = torch.tensor(latents if mode == "set" else [NO_LATENT] * len(latents))
    return Rows(named, vectors, torch.tensor(strengths))


@pytest.mark.parametrize("mode", ["set", "add"])
def test_the_error_term_is_kept_and_only_one_direction_changes(subject: Any, mode: str) -> None:
    x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1))
    before = activations(subject, x)
    latents, strengths = [3, 7], [4.0, 2.5]
    steered = Steering(subject, rows(subject, latents, strengths, mode), first_position=True)(x)
    for row, (latent, strength) in enumerate(zip(latents, strengths, strict=True)):
        code = before[row].clone()
        code[:, latent] = strength if mode == "set" else code[:, latent] + strength
        error = x[row] - subject.dictionary.decode(before[row])
        assert torch.allclose(steered[row], subject.dictionary.decode(code) + error, atol=1e-5)
    assert bool((before[0, :, 3] > 0).any())


def test_strengths_are_what_is_written_whatever_the_norms_of_decoder_rows(subject: Any) -> None:
    x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1))
    steered = Steering(subject, rows(subject, [3, 7], [4.0, 2.5], "set"), first_position=True)(x)
    same = copy.deepcopy(subject.dictionary)
    same.W_dec.data /= 10
    for tensor in (same.W_enc, same.b_enc, same.threshold):
        tensor.data *= 10
    other = SimpleNamespace(dictionary=same, device=subject.device, row_norms=same.row_norms)
    assert torch.allclose(
        Steering(other, rows(subject, [3, 7], [4.0, 2.5], "set"), first_position=True)(x), steered, atol=1e-5
    )


def test_the_first_position_is_left_alone_in_the_prompt_only(subject: Any) -> None:
    steering = Steering(subject, rows(subject, [1], [5.0], "add"))
    prompt, step = torch.randn(1, 3, 8), torch.randn(1, 1, 8)
    first, later = steering(prompt), steering(step)
    assert torch.equal(first[:, 0], prompt[:, 0])
    assert not torch.equal(first[:, 1:], prompt[:, 1:])
    assert not torch.equal(later, step)


def test_a_strength_of_zero_changes_no_bit(subject: Any) -> None:
    x = torch.randn(2, 4, 8).to(torch.bfloat16)
    for mode in ("set", "add"):
        assert torch.equal(Steering(subject, rows(subject, [1, 2], [0.0, 0.0], mode))(x), x)


def test_the_classifier_knows_its_concepts() -> None:
    passages = ["a graph of nodes", "nodes and edges of a graph", "a file on the disk", "the disk holds a file"] * 3
    classifier = ConceptClassifier(passages, np.array([0, 0, 1, 1] * 3), 0)
    found = classifier.probabilities(["graph nodes", "disk file", ""])
    assert found[0, 0] > 0.8
    assert found[1, 1] > 0.8
    assert found.sum(1) == pytest.approx(1)


def test_repeated_words_have_few_distinct_pairs() -> None:
    found = distinct(np.array([[1, 2, 3, 4, 5], [1, 1, 1, 1, 1], [1, 2, 1, 2, 1]]))
    assert found == pytest.approx([1.0, 0.25, 0.5])


def test_coherence_falls_with_perplexity_and_with_repetition_and_never_rises_above_one() -> None:
    found = coherence(np.array([2.0, 3.0, 2.0, 1.0]), np.array([0.9, 0.9, 0.45, 0.95]), (2.0, 0.9))
    assert found == pytest.approx([1.0, np.exp(-1), 0.5, 1.0])


def test_the_front_holds_what_nothing_beats_and_the_area_under_it() -> None:
    points = [(0.2, 0.9), (0.5, 0.5), (0.4, 0.4), (0.8, 0.1)]
    assert sorted(pareto_front(points)) == [0, 1, 3]
    assert area(points) == pytest.approx(0.8 * 0.1 + 0.5 * 0.4 + 0.2 * 0.4)
    assert area([(1.0, 1.0), (0.3, 0.3)]) == pytest.approx(1.0)


def test_the_usable_interval_is_where_both_reach_their_limits() -> None:
    strengths = np.array([1.0, 2.0, 4.0, 8.0])
    found = usable_interval(strengths, np.array([0.0, 1.0, 1.0, 1.0]), np.array([1.0, 1.0, 1.0, 0.0]), (0.5, 0.5))
    assert found == pytest.approx((2**0.5, 2**2.5), rel=0.01)
    assert usable_interval(strengths, np.zeros(4), np.ones(4), (0.5, 0.5)) is None


def test_the_judges_grades_stand_beside_the_samples(tmp_path: Path) -> None:
    samples = [
        {"method": "latent", "concept": "graphs", "multiple": 1.0, "strength": 3.0, "prompt": "We find", "text": text}
        for text in (" nodes", " edges", " what")
    ]
    samples.append({**samples[0], "concept": None, "method": "unsteered"})
    texts = ["topic=3 coherence=2", "I would say Topic: 1, coherence: 3", "no idea"]
    recorded = tmp_path / "answers.jsonl"
    records = [
        {"model": "judge", "system": SYSTEM, "user": f"Topic: graphs\nText: We find{sample['text']}", "max_tokens": 16}
        for sample in samples[:3]
    ]
    lines = [json.dumps({**record, "text": text}) for record, text in zip(records, texts, strict=True)]
    recorded.write_text("\n".join(lines))
    found = judge(AnswersConfig(backend="replay", model="judge", recorded=str(recorded)), samples)
    assert samples[0]["grades"] == {"concept": 3, "coherence": 2}
    assert "no grades" in samples[2]["grades"]["failure"]
    assert "grades" not in samples[3]
    (mean,) = found["means"]
    assert (mean["samples"], mean["concept"], mean["good_in_both"], found["failures"]) == (2, 2.0, 0.5, 1)


def test_curves_hold_each_concept_at_each_strength() -> None:
    conditions = [Condition(None, 0.0, None)]
    for concept in (0, 1):
        for method in ("latent", "random latent"):
            direction = Direction(method, concept, 3, torch.zeros(2), 10.0, None)
            conditions += [Condition(direction, 10.0 * multiple, multiple) for multiple in (1.0, 2.0)]
            conditions.append(Condition(direction, 7.0, None))
    values = np.repeat(np.arange(len(conditions), dtype=float)[:, None], 3, axis=1)
    found = curves(conditions, dict.fromkeys(("success", "coherence", "loss", "distinct_2"), values))
    assert [(curve.method, curve.kind, curve.strengths) for curve in found] == [
        ("latent", "multiple", (1.0, 2.0)),
        ("latent", "strength", (7.0,)),
        ("random latent", "multiple", (1.0, 2.0)),
        ("random latent", "strength", (7.0,)),
    ]
    assert found[0].success.tolist() == [[1, 2], [7, 8]]
    assert found[3].loss.tolist() == [[6], [12]]


def test_usable_doublings_are_those_of_each_concept() -> None:
    strengths = (0.0, 1.0, 2.0, 4.0)
    success, coherent = np.array([[0, 1, 1, 1], [0, 0, 0, 0.0]]), np.array([[1, 1, 1, 1], [1, 1, 1, 1.0]])
    curve = Curve("latent", "multiple", strengths, success, coherent, coherent, coherent)
    assert doublings(curve, SteerConfig()) == pytest.approx([2.0, 0.0])


def test_no_latent_serves_two_concepts() -> None:
    concept = np.repeat([0, 1, 2], 4)
    means = np.zeros((12, 5))
    means[concept < 2, 4] = 3.0  # the best of both the first and the second concept
    means[concept == 1, 1] = 1.0
    means[concept == 2, 0] = 1.0
    for rule in ("lift", "auc"):
        alive = np.array([10, 20, 30, 40, 50])
        assert choose_latents(csc_array(means), concept, alive, rule) == [50, 20, 10]
