"""A tiny GPT-NeoX with its tokenizer, and text it can be harvested from."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from tsae import config as configuration
from tsae.config import RunConfig

WORDS = [a + b for a in ("ka", "lo", "mi", "ru", "se", "ta") for b in ("ba", "do", "fe", "gi", "nu")]


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in the hub's format: random GPT-NeoX of width 32 with 3 blocks, one token per word."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

    vocabulary = {word: index for index, word in enumerate(["<unk>", "<eos>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    torch.manual_seed(0)
    shape = GPTNeoXConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=1,
        initializer_range=0.3,
    )
    folder = tmp_path_factory.mktemp("model") / "tiny-neox"
    GPTNeoXForCausalLM(shape).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>").save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 documents of 20 to 60 words."""
    generator, path = random.Random(0), tmp_path_factory.mktemp("text") / "documents.jsonl"
    documents = [" ".join(generator.choices(WORDS, k=generator.randint(20, 60))) for _ in range(60)]
    path.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    return path


@pytest.fixture
def config(tiny_model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run on the tiny model, its store in a folder that all tests of the session share."""
    store = tmp_path_factory.getbasetemp() / "evaluation-store"
    return configuration.from_mapping(
        {
            "model": {"name": str(tiny_model), "layer": 1},
            "data": {"source": str(text), "context_length": 32, "min_length": 8, "holdout": 0.3},
            "store": {"path": str(store), "dtype": "float32"},
            "sae": {"dict_size": 64, "k": 6},
            "evaluation": {"sequences": 1000, "batch_size": 7, "loss_sequences": 20},
        },
        "test",
    )
