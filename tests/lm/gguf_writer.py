"""A GGUF file of a Hugging Face folder of the Llama family, written as llama.cpp's converter lays it out."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from gguf import GGUFWriter, TokenType
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from tsae.lm.embedded_text import train_tokenizer

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
VOCABULARY, POSITIONS = 320, 64


def llama_folder(folder: Path, texts: list[str]) -> Path:
    """A random Llama of 3 blocks and width 32, with grouped heads and a tokenizer trained on `texts`, in the hub's format."""
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=POSITIONS,
        initializer_range=0.2,
        rms_norm_eps=1e-5,
        bos_token_id=0,
        eos_token_id=0,
    )
    LlamaForCausalLM(shape).save_pretrained(folder)
    train_tokenizer(texts, VOCABULARY, POSITIONS).save_pretrained(folder)
    return folder


def write_gguf(folder: Path, path: Path, architecture: str = "llama", parts: int = 1, without: str = "nothing") -> Path:
    """The model of `folder` in float32; less the tensor `without`."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config, writer = model.config, GGUFWriter(path, architecture)
    writer.add_name("tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    if parts > 1:
        writer.add_uint16("split.count", parts)
    _add_tokenizer(writer, json.loads((folder / "tokenizer.json").read_text()))
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for name, tensor in model.state_dict().items():
        part, _, kind = name.rpartition(".")
        block = ""
        if part.startswith("model.layers."):
            number, part = part.removeprefix("model.layers.").split(".", 1)
            block = f"blk.{number}."
        own = NAMES[part]
        if own in heads:  # llama.cpp turns neighbouring dimensions, Hugging Face the two halves
            tensor = tensor.unflatten(0, (heads[own], 2, -1)).transpose(1, 2).flatten(0, 2)
        if f"{block}{own}.{kind}" != without:
            writer.add_tensor(f"{block}{own}.{kind}", tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_tokenizer(writer: GGUFWriter, tokenizer: dict) -> None:
    vocabulary = tokenizer["model"]["vocab"]
    special = {token["content"] for token in tokenizer["added_tokens"]}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(sorted(vocabulary, key=vocabulary.get))
    kinds = [
        TokenType.CONTROL if token in special else TokenType.NORMAL for token in sorted(vocabulary, key=vocabulary.get)
    ]
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["model"]["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_pad_token_id(0)
    writer.add_add_bos_token(False)
    writer.add_chat_template("{% for m in messages %}{{ m['content'] }}{% endfor %}")
