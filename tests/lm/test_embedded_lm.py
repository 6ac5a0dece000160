from __future__ import annotations

import hashlib
import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

from tsae.config.sections import DataConfig, ModelConfig
from tsae.lm.embedded_lm import train_embedded_lm
from tsae.lm.embedded_text import END, Rows, is_held_out, make_rows, ngram_losses
from tsae.lm.model import load_language_model, load_tokenizer
from tsae.lm.pretraining import Recipe, initial_model, learning_rate, mean_loss, summed_loss
from tsae.lm.source import FOLDER, read_recipe
from tsae.runtime.errors import TsaeError

TOPICS = {
    "sea": [
        "the",
        "ship",
        "sailed",
        "over",
        "grey",
        "water",
        "while",
        "gulls",
        "cried",
        "and",
        "waves",
        "broke",
        "on",
        "the",
        "harbour",
        "wall",
    ],
    "bread": [
        "she",
        "kneaded",
        "warm",
        "dough",
        "with",
        "flour",
        "and",
        "yeast",
        "then",
        "baked",
        "brown",
        "loaves",
        "in",
        "a",
        "stone",
        "oven",
    ],
}
SMALL = {"vocabulary": 300, "activation_dim": 16, "layers": 3, "heads": 2, "batch_rows": 4, "warmup_tokens": 500}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    path, choose = tmp_path_factory.mktemp("text") / "text.jsonl", random.Random(0)
    with path.open("w") as stream:
        for _ in range(150):
            topic = choose.choice(list(TOPICS))
            words = " ".join(choose.choices(TOPICS[topic], k=60))
            stream.write(json.dumps({"text": words, "topic": topic}) + "\n")
    return DataConfig(source=str(path), label_field="topic")


@pytest.fixture(scope="module")
def trained(text: DataConfig, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("out") / "lm"
    return out, train_embedded_lm(out, tokens=15_000, data=text, **SMALL)


def test_training_writes_a_loadable_folder_and_a_measured_recipe(trained: tuple[Path, dict[str, Any]]) -> None:
    out, recipe = trained
    assert recipe == read_recipe(out)
    measured = recipe["heldout"]
    assert measured["loss_nats"] < measured["unigram_loss_nats"] < math.log(SMALL["vocabulary"])
    assert measured["topic_probe"]["trained"] > measured["topic_probe"]["majority"]
    assert recipe["text"]["documents"]["train"] + recipe["text"]["documents"]["heldout"] == 150
    lm = load_language_model(ModelConfig(name=str(out), layer=1, device="cpu"))
    tokens = torch.tensor(lm.tokenizer("the ship sailed over grey water")["input_ids"])[None]
    assert lm.read(tokens, torch.tensor([tokens.shape[1]])).shape == (1, tokens.shape[1], 16)


def test_the_folder_can_be_read_by_everyone(trained: tuple[Path, dict[str, Any]]) -> None:
    assert {path.stat().st_mode & 0o777 for path in trained[0].iterdir() if path.name != "recipe.json"} == {0o644}


def test_the_same_seed_gives_the_same_weights(
    text: DataConfig, trained: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    again = train_embedded_lm(tmp_path / "again", tokens=15_000, data=text, **SMALL)
    other = train_embedded_lm(tmp_path / "other", tokens=15_000, data=text, seed=1, **SMALL)
    assert again["weights_sha256"] == trained[1]["weights_sha256"] != other["weights_sha256"]


def test_an_occupied_folder_is_refused(trained: tuple[Path, dict[str, Any]]) -> None:
    with pytest.raises(TsaeError, match="is not empty"):
        train_embedded_lm(trained[0])


def test_a_training_of_no_tokens_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TsaeError, match=r"--tokens 0 is impossible"):
        train_embedded_lm(tmp_path / "model", tokens=0)
    assert not (tmp_path / "model").exists()


def test_the_head_loss_equals_cross_entropy_and_its_gradients() -> None:
    model = initial_model(Recipe(vocabulary=300, activation_dim=16, layers=1, heads=2))
    tokens, lengths = torch.randint(0, 300, (6, 20)), torch.tensor([20, 3, 7, 20, 20, 11])
    loss, count = summed_loss(model, tokens, lengths)
    loss.backward()
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    mask = torch.arange(1, 20) < lengths[:, None]
    scores = model(input_ids=tokens).logits[:, :-1][mask]
    expected = torch.nn.functional.cross_entropy(scores, tokens[:, 1:][mask], reduction="sum")
    expected.backward()
    assert count == int((lengths - 1).sum())
    torch.testing.assert_close(loss, expected, rtol=1e-3, atol=0)
    for name, parameter in model.named_parameters():
        assert (found[name] - parameter.grad).norm() <= 0.02 * parameter.grad.norm() + 1e-6, name


def test_mean_loss_ignores_padding() -> None:
    model = initial_model(Recipe(vocabulary=300, activation_dim=16, layers=1, heads=2)).eval()
    tokens, lengths = np.random.default_rng(0).integers(0, 300, (5, 20)), np.array([20, 3, 7, 20, 11])
    noise = np.where(np.arange(20) < lengths[:, None], tokens, 9)
    label = np.zeros(5, int)
    assert mean_loss(model, Rows(tokens, lengths, label), 2) == pytest.approx(
        mean_loss(model, Rows(noise, lengths, label), 5), abs=1e-5
    )


def test_the_learning_rate_rises_stays_and_falls_to_zero() -> None:
    recipe = Recipe(tokens=1000, warmup_tokens=100, decay_share=0.3, lr=1.0)
    rates = [learning_rate(recipe, seen) for seen in (0, 49, 99, 500, 700, 850, 1000)]
    assert rates == pytest.approx([0.01, 0.5, 1, 1, 1, 0.5, 0])


def test_ngram_losses_are_those_of_a_known_source() -> None:
    generator = np.random.default_rng(0)
    tokens = np.empty((400, 64), int)
    tokens[:, 0] = generator.integers(0, 4, 400)
    for position in range(1, 64):  # the next token is the successor with probability 1/2, else uniform over 4
        jump = generator.integers(0, 4, 400)
        tokens[:, position] = np.where(generator.random(400) < 0.5, (tokens[:, position - 1] + 1) % 4, jump)
    rows = [Rows(part, np.full(len(part), 64), np.zeros(len(part), int)) for part in (tokens[:200], tokens[200:])]
    unigram, bigram = ngram_losses(*rows, vocabulary=4)
    assert unigram == pytest.approx(math.log(4), abs=0.01)
    assert bigram == pytest.approx(-(5 / 8) * math.log(5 / 8) - (3 / 8) * math.log(1 / 8), abs=0.01)


def test_rows_split_documents_without_crossing_them(trained: tuple[Path, dict[str, Any]], text: DataConfig) -> None:
    from tsae.data.documents import read_documents

    tokenizer = load_tokenizer(ModelConfig(name=str(trained[0])))
    documents = list(read_documents(text))[:5]
    rows = make_rows(documents, tokenizer, ("bread", "sea"), context_length=32, min_length=1)
    row = 0
    for document in documents:
        pieces: list[int] = []
        while len(pieces) < len(tokenizer(document.text)["input_ids"]):
            pieces += rows.tokens[row, : rows.lengths[row]].tolist()
            assert rows.label[row] == ("bread", "sea").index(document.label)
            row += 1
        assert tokenizer.decode(pieces) == document.text
    assert row == len(rows.tokens)


def test_one_document_in_twenty_is_held_out() -> None:
    share = np.mean([is_held_out(f"document {number}") for number in range(20_000)])
    assert share == pytest.approx(1 / 20, abs=0.006)


def test_the_shipped_model_is_the_recorded_one_and_small() -> None:
    weights, recipe = FOLDER / "model.safetensors", read_recipe()
    assert weights.stat().st_size <= 4_000_000
    assert hashlib.sha256(weights.read_bytes()).hexdigest() == recipe["weights_sha256"]
    with safe_open(weights, "pt") as tensors:
        assert {tensors.get_slice(name).get_dtype() for name in tensors.keys()} == {"BF16"}  # noqa: SIM118


def test_the_shipped_model_is_worth_having() -> None:
    measured = read_recipe()["heldout"]
    assert measured["loss_nats"] < measured["bigram_loss_nats"] - 0.3
    assert measured["topic_probe"]["trained"] > measured["topic_probe"]["random_init"] + 0.1


def test_the_shipped_model_predicts_english() -> None:
    lm = load_language_model(ModelConfig(device="cpu"))
    sentence = "Returns a new array with the same shape and the same type as the given array, filled with zeros."
    tokens = torch.tensor(lm.tokenizer(sentence)["input_ids"])[None]
    scores = lm.logits(tokens, torch.tensor([tokens.shape[1]]))[0, :-1]
    assert torch.nn.functional.cross_entropy(scores, tokens[0, 1:]) < 0.6 * math.log(lm.vocabulary)


def test_the_shipped_tokenizer_adds_nothing_and_spells_everything() -> None:
    tokenizer = load_tokenizer(ModelConfig())
    odd = "naïve → 数学\n\n  tabs\tand spaces"
    assert tokenizer.decode(tokenizer(odd)["input_ids"]) == odd
    assert tokenizer(END)["input_ids"] == [0]
    assert tokenizer("x")["input_ids"][0] != 0
