"""Architectures of Hugging Face, and which of their modules give what TransformerLens and SAELens call by a hook's name."""

from __future__ import annotations

import re
from typing import NamedTuple

LENS_HOOK = re.compile(r"blocks\.(\d+)\.hook_(resid_post|resid_pre|attn_out|mlp_out)")
"""TransformerLens' names of what modules give."""


class Family(NamedTuple):
    """The modules of an architecture whose outputs are what TransformerLens hooks."""

    blocks: str
    """The list of blocks."""
    resid_pre: str
    """What gives the residual stream before block 0: embeddings, scaled, with positions."""
    attn_out: str
    """Of a block, what gives the attention's addition to the residual stream: after a norm, where one stands behind it."""
    mlp_out: str


_GPT2 = Family("transformer.h", "transformer.drop", "attn", "mlp")
_LLAMA = Family("model.layers", "model.embed_tokens", "self_attn", "mlp")
_POST_NORM = _LLAMA._replace(attn_out="post_attention_layernorm", mlp_out="post_feedforward_layernorm")
FAMILIES = {
    **dict.fromkeys(("gpt2", "gpt_neo", "gptj"), _GPT2),
    "gpt_neox": Family("gpt_neox.layers", "gpt_neox.embed_in", "attention", "mlp"),
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "phi", "phi3", "olmo", "gemma"), _LLAMA),
    **dict.fromkeys(("olmo2", "gemma2", "gemma3_text"), _POST_NORM),
    "gemma3": _POST_NORM._replace(blocks="model.language_model.layers", resid_pre="model.language_model.embed_tokens"),
}
"""By `model_type` of the Hugging Face model."""


def module_of_lens(name: str, model_type: str) -> str | None:
    """The path of the module that gives `blocks.N.hook_…` in a model of that type; None for other names and types."""
    hook, family = LENS_HOOK.fullmatch(name), FAMILIES.get(model_type)
    if hook is None or family is None:
        return None
    block, part = int(hook[1]), hook[2]
    if part == "resid_pre":
        return f"{family.blocks}.{block - 1}" if block else family.resid_pre
    return f"{family.blocks}.{block}" + ("" if part == "resid_post" else f".{getattr(family, part)}")
