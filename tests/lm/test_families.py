"""Architectures of many kinds, tiny and random: each is read at the right place without its padding, or refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tests.lm.conftest import POSITIONS, VOCABULARY
from tsae.config.sections import ModelConfig
from tsae.lm.model import LanguageModel, load_tokenizer
from tsae.runtime.errors import TsaeError

DEPTH = 3
SIZES = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "emb_dim", "attention_hidden_size", "embedding_size"), 32),
    **dict.fromkeys(
        ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers"), DEPTH
    ),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(
        ("intermediate_size", "ffn_dim", "decoder_ffn_dim", "d_inner", "shared_expert_intermediate_size"), 64
    ),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx"), POSITIONS),
    **dict.fromkeys(("num_local_experts", "num_experts"), 4),
    **{"vocab_size": VOCABULARY, "num_key_value_heads": 2, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads"), 4),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 8),
    **{"head_dim": 8, "rotary_dim": 4, "state_size": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}
"""What the architectures call their sizes."""

CAUSAL = (
    *(
        "afmoe",
        "bart",
        "bloom",
        "codegen",
        "cohere",
        "ctrl",
        "falcon",
        "falcon_mamba",
        "gemma",
        "gemma2",
        "gemma3_text",
    ),
    *("gpt2", "gpt_neox", "gpt_oss", "gptj", "granitemoe", "jamba", "jetmoe", "lfm2", "llama", "llama4_text", "mamba"),
    *("mistral", "mixtral", "mpt", "nemotron", "olmo2", "opt", "phi3", "qwen2", "qwen3", "qwen3_moe", "qwen3_next"),
    *("recurrent_gemma", "rwkv", "stablelm", "starcoder2", "xglm"),
)
LOOK_AHEAD = {
    **{"bert": {}, "camembert": {}, "electra": {}, "megatron-bert": {}, "rembert": {}, "roberta": {}},
    **{"roformer": {}, "xlm": {}, "gemma3_text": {"use_bidirectional_attention": True}},
}

Build = Callable[..., LanguageModel]


@cache
def made(name: str, **fields: Any) -> PreTrainedModel:
    known = AutoConfig.for_model(name).to_dict()
    sizes = {size: value for size, value in SIZES.items() if size in known}
    torch.manual_seed(0)
    module = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **sizes, **fields))
    for parameter in module.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    return module


@pytest.fixture
def build() -> Build:
    tokenizer = load_tokenizer(ModelConfig())

    def build(name: str, layer: int = 1, dtype: str = "float32", **fields: Any) -> LanguageModel:
        module = made(name, **fields).to(getattr(torch, dtype))
        return LanguageModel(module, tokenizer, ModelConfig(layer=layer, dtype=dtype, device="cpu"))

    return build


@pytest.mark.parametrize("name", CAUSAL)
def test_every_block_is_read_at_its_output_whatever_follows_the_text(build: Build, name: str) -> None:
    tokens = torch.randint(3, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(1))
    lengths = torch.tensor([12, 5])
    for layer in range(DEPTH):
        lm = build(name, layer)
        seen: list[Any] = []
        handle = lm.module.get_submodule(lm.hook_path).register_forward_hook(
            lambda *call, seen=seen: seen.append(call[-1])
        )
        lm.logits(tokens[1:, :5], lengths[1:])
        handle.remove()
        alone = lm.read(tokens[1:, :5], lengths[1:])
        assert lm.hook_path.endswith(f".{layer}")
        assert torch.equal(alone, seen[0] if isinstance(seen[0], torch.Tensor) else seen[0][0])
        torch.testing.assert_close(lm.read(tokens, lengths)[1, :5], alone[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["bart", "gpt_oss", "llama4_text", "mamba", "mixtral", "qwen3_moe", "rwkv"])
def test_rounding_is_not_taken_for_looking_ahead(build: Build, name: str) -> None:
    assert build(name, dtype="bfloat16").module.dtype == torch.bfloat16
    made.cache_clear()  # that model's weights are rounded now


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", LOOK_AHEAD)
def test_a_model_that_looks_ahead_is_refused(build: Build, name: str, dtype: str) -> None:
    with pytest.raises(TsaeError, match=r"looks ahead: a later token changes what is read at .* before it"):
        build(name, dtype=dtype, **LOOK_AHEAD[name])
    made.cache_clear()


def test_a_model_that_looks_ahead_behind_the_hook_is_refused(build: Build) -> None:
    module = made("bert")
    tokenizer = load_tokenizer(ModelConfig())
    with pytest.raises(TsaeError, match="a later token changes what is predicted before it"):
        LanguageModel(module, tokenizer, ModelConfig(hook_point="bert.embeddings.word_embeddings", device="cpu"))
    assert build("bert", is_decoder=True).activation_dim == 32


def overflowing(block: int, factor: float) -> PreTrainedModel:
    made.cache_clear()
    module = made("llama")
    with torch.no_grad():
        module.get_parameter(f"model.layers.{block}.mlp.down_proj.weight").mul_(factor)
    return module


def test_an_overflow_names_its_block_and_a_wider_precision(build: Build) -> None:
    overflowing(1, 1e7)
    message = (
        "the values at model.layers.1.mlp.down_proj are not finite in float16; set model.dtype to bfloat16 or float32"
    )
    with pytest.raises(TsaeError, match=re.escape(message)):
        build("llama", layer=2, dtype="float16")
    overflowing(1, 1e7)
    assert build("llama", layer=2, dtype="bfloat16").hook_path == "model.layers.2"
    made.cache_clear()


def test_an_overflow_behind_the_hook_spoils_scores_alone(build: Build) -> None:
    overflowing(2, 1e7)
    lm, tokens = build("llama", layer=1, dtype="float16"), torch.ones(1, 4)
    assert lm.read(tokens, torch.tensor([4])).isfinite().all()
    with pytest.raises(TsaeError, match=r"the values at model\.layers\.2\.mlp\.down_proj are not finite in float16"):
        lm.logits(tokens, torch.tensor([4]))
    made.cache_clear()


def test_one_token_of_the_text_that_overflows_is_found_when_it_is_read(build: Build) -> None:
    made.cache_clear()
    lm, tokens = build("llama"), torch.tensor([[5, 6, 7]])
    lm.module.get_input_embeddings().weight[7] = float("inf")
    made.cache_clear()
    assert lm.read(tokens, torch.tensor([2])).isfinite().all()
    with pytest.raises(TsaeError, match=r"the values at model\.embed_tokens are not finite in float32"):
        lm.read(tokens, torch.tensor([3]))


def test_weights_that_are_not_finite_are_named(build: Build) -> None:
    overflowing(1, float("nan"))
    with pytest.raises(TsaeError) as caught:
        build("llama", layer=1)
    assert "the values at model.layers.1.mlp.down_proj are not finite in float32" in str(caught.value)
    assert str(caught.value).endswith("the weights model.layers.1.mlp.down_proj.weight are not finite")
    made.cache_clear()
