from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

WORDS = "the quick brown fox jumps over the lazy dog while seven wizards box in the early morning light"


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    """A small byte-level BPE: `adds_bos` as Gemma does, without it as GPT-NeoX does."""

    def make(adds_bos: bool = False, pad: str | None = None, **special: str) -> PreTrainedTokenizerFast:
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        names = ["<|endoftext|>", "<bos>", "<pad>"]
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=names, initial_alphabet=alphabet)
        backend.train_from_iterator([WORDS] * 4, trainer)
        if adds_bos:
            backend.post_processor = processors.TemplateProcessing(
                single="<bos> $A", special_tokens=[("<bos>", backend.token_to_id("<bos>"))]
            )
        tokens = {"bos_token": "<bos>", "eos_token": "<|endoftext|>", **special}
        if pad:
            tokens["pad_token"] = pad
        return PreTrainedTokenizerFast(tokenizer_object=backend, **tokens)

    return make


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty TSAE_HOME."""
    monkeypatch.setenv("TSAE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"
