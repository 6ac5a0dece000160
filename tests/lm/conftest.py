"""Tiny random models saved as folders, as a user would have them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedModel

from tsae.config.sections import ModelConfig
from tsae.lm.embedded_text import train_tokenizer
from tsae.lm.model import LanguageModel, load_language_model

VOCABULARY = 320
POSITIONS = 32

torch.set_num_threads(1)


def _gpt_neox() -> PreTrainedModel:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    return GPTNeoXForCausalLM(
        GPTNeoXConfig(vocab_size=VOCABULARY, max_position_embeddings=POSITIONS, initializer_range=0.2, **sizes)
    )


def _gemma2() -> PreTrainedModel:
    sizes = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
    return Gemma2ForCausalLM(
        Gemma2Config(
            vocab_size=VOCABULARY,
            max_position_embeddings=POSITIONS,
            num_key_value_heads=2,
            head_dim=12,
            sliding_window=8,
            initializer_range=0.2,
            **sizes,
        )
    )


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Model folders in the hub's format: `gpt_neox` (3 blocks, D = 32) and `gemma2` (4 blocks, D = 48)."""
    root = tmp_path_factory.mktemp("models")
    tokenizer = train_tokenizer(["a small text about small things"], VOCABULARY, POSITIONS)
    for name, make in {"gpt_neox": _gpt_neox, "gemma2": _gemma2}.items():
        torch.manual_seed(0)
        make().save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return {"gpt_neox": root / "gpt_neox", "gemma2": root / "gemma2"}


@pytest.fixture(scope="session")
def load(folders: dict[str, Path]) -> Callable[..., LanguageModel]:
    """Load one of the folders with further fields of ModelConfig."""
    return lambda name, **fields: load_language_model(ModelConfig(name=str(folders[name]), device="cpu", **fields))


@pytest.fixture
def rows() -> tuple[torch.Tensor, torch.Tensor]:
    """Four right-padded rows of 12 tokens, one of them full, and their lengths."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, VOCABULARY, (4, 12), generator=generator, dtype=torch.int32)
    lengths = torch.tensor([12, 5, 9, 2])
    return tokens.masked_fill(torch.arange(12) >= lengths[:, None], 0), lengths
