"""Where a dictionary reads: every name for a place means the module whose output it is, or is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tsae.config import run as configuration
from tsae.interop.formats import installed
from tsae.interop.place import LENS_NAMES, Place, find_place, hub_name, lens_hook
from tsae.lm.embedded_text import train_tokenizer
from tsae.lm.families import FAMILIES
from tsae.lm.hook import find_blocks, hidden_of
from tsae.runtime.errors import TsaeError

SIZES = {
    **{"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 16},
    **{"num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 64, "initializer_range": 0.3},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}
OWN_SIZES: dict[str, dict[str, Any]] = {
    "gptj": {"rotary_dim": 8},
    "gpt_neo": {"num_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]], "window_size": 8},
    "gemma3": {
        "text_config": {**SIZES, "model_type": "gemma3_text"},
        "vision_config": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 16},
    },
}


TOKENS = torch.randint(3, 64, (2, 6), generator=torch.Generator().manual_seed(0))


def every_output(model: PreTrainedModel) -> tuple[str, dict[str, Tensor]]:
    """The path of the list of blocks, and what each module of a model gives for a few tokens."""
    seen: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        module.register_forward_hook(lambda *call, path=path: seen.update({path: hidden_of(call[-1])}))
    with torch.no_grad():
        model(input_ids=TOKENS, use_cache=False)
    return find_blocks(model, 2), seen


def random_model(family: str) -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = SIZES if family != "gemma3" else {}
    config = AutoConfig.for_model(family, **{**sizes, **OWN_SIZES.get(family, {})})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        # Norms and biases that do nothing yet would hide a wrong module.
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model.eval()


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_modules_of_a_family_give_what_is_added_to_the_residual_stream(family: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(f'{{"model_type": "{family}"}}')
    blocks, outputs = every_output(random_model(family))

    def read(hook: str) -> Tensor:
        place = find_place(hook, str(tmp_path), "here")
        assert lens_hook(place) == hook.replace("1.hook_resid_pre", "0.hook_resid_post")
        return outputs[f"{blocks}.{place.block}" if place.module is None else place.module]

    for block in (0, 1):
        before, after = read(f"blocks.{block}.hook_resid_pre"), read(f"blocks.{block}.hook_resid_post")
        attention, mlp = read(f"blocks.{block}.hook_attn_out"), read(f"blocks.{block}.hook_mlp_out")
        assert torch.allclose(before + attention + mlp, after, atol=1e-4)
        for part in (before, attention, mlp):
            assert not torch.allclose(part, torch.zeros(()), atol=0.1)


@pytest.mark.skipif(
    not installed("transformer_lens"), reason="TRANSFORMERLENS DID NOT SAY WHAT ITS HOOKS READ: install SAELens"
)
@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "llama", "gemma2"])
def test_transformer_lens_itself_reads_the_same(family: str, tmp_path: Path) -> None:
    from transformer_lens.model_bridge import TransformerBridge

    model = random_model(family)
    model.save_pretrained(tmp_path)
    train_tokenizer(["a small text about small things"], 320, 64).save_pretrained(tmp_path)
    with torch.no_grad():
        _, theirs = TransformerBridge.boot_transformers(str(tmp_path), device="cpu").run_with_cache(TOKENS)
    blocks, outputs = every_output(model)
    for hook in ("0.hook_resid_pre", "1.hook_resid_pre", "1.hook_resid_post", "1.hook_attn_out", "1.hook_mlp_out"):
        place = find_place(f"blocks.{hook}", str(tmp_path), "here")
        ours = outputs[f"{blocks}.{place.block}" if place.module is None else place.module]
        assert torch.allclose(ours, theirs[f"blocks.{hook}"], atol=1e-4)
        assert ours.abs().max() > 0.1


@pytest.mark.parametrize(
    ("name", "model", "block", "module"),
    [
        ("blocks.1.hook_mlp_out", "gpt2", None, "transformer.h.1.mlp"),
        ("blocks.1.hook_attn_out", "EleutherAI/pythia-70m-deduped", None, "gpt_neox.layers.1.attention"),
        ("blocks.3.hook_mlp_out", "embedded", None, "gpt_neox.layers.3.mlp"),
        ("blocks.1.hook_attn_out", "meta-llama/Llama-3.1-8B", None, "model.layers.1.self_attn"),
        ("blocks.7.hook_mlp_out", "google/gemma-2-2b", None, "model.layers.7.post_feedforward_layernorm"),
        (
            "blocks.7.hook_attn_out",
            "google/gemma-3-4b-it",
            None,
            "model.language_model.layers.7.post_attention_layernorm",
        ),
        ("blocks.7.hook_mlp_out", "google/gemma-2b-it", None, "model.layers.7.mlp"),
        ("blocks.0.hook_resid_pre", "gpt2", None, "transformer.drop"),
        ("blocks.1.hook_resid_pre", "nobody/knows", 0, None),
        ("blocks.4.hook_resid_post", "nobody/knows", 4, None),
        ("resid_post_layer_4", "nobody/knows", 4, None),
        ("model.layers.17.output", "google/gemma-3-4b-it", 17, None),
        ("model.language_model.layers.3", "google/gemma-3-4b-it", 3, None),
        ("model.layers.3.mlp.output", "nobody/knows", None, "model.layers.3.mlp"),
        ("backbone.layers.3", "nobody/knows", None, "backbone.layers.3"),
    ],
)
def test_a_name_means_a_block_or_a_module(name: str, model: str, block: int | None, module: str | None) -> None:
    assert find_place(name, model, "here") == Place(model, block, module)


@pytest.mark.parametrize(
    "name",
    [
        "blocks.1.hook_resid_mid",
        "blocks.1.hook_mlp_in",
        "blocks.1.attn.hook_z",
        "blocks.1.ln2.hook_normalized",
        "blocks.1.mlp.hook_post",
        "blocks.{layer}.hook_resid_pre",
        "hook_embed",
        "ln_final.hook_normalized",
        "model.layers.1.self_attn.o_proj.input",
    ],
)
def test_what_no_module_gives_is_refused(name: str) -> None:
    with pytest.raises(TsaeError, match=r"here: .*: no module's output is that"):
        find_place(name, "gpt2", "here")


def test_an_architecture_that_is_not_known_is_no_guess(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "granite"}')
    for model in (str(tmp_path), "google/gemma-4-2b", "nobody/knows"):
        for hook in ("blocks.1.hook_mlp_out", "blocks.0.hook_resid_pre"):
            with pytest.raises(TsaeError, match="write the module's path in its place"):
                find_place(hook, model, "here")


@pytest.mark.parametrize(
    ("trained", "model", "part"),
    [
        (Place("gpt2", 3), {"name": "gpt2", "layer": 3}, None),
        (Place("gpt2", 3), {"name": "gpt2", "layer": 2}, "layer"),
        (Place("gpt2", 3), {"name": "gpt2", "layer": 3, "hook_point": "transformer.h.3.mlp"}, "layer"),
        (Place("gpt2", 3), {"name": "gpt2", "hook_point": "transformer.h.3"}, None),
        (Place("gpt2", None, "transformer.h.3.mlp"), {"name": "gpt2", "layer": 3}, "layer"),
        (Place("gpt2", None, "transformer.h.3.mlp"), {"name": "gpt2", "hook_point": "transformer.h.3.mlp"}, None),
        (Place("gpt2", None, "transformer.h.3.mlp"), {"name": "gpt2", "hook_point": "transformer.h.2.mlp"}, "layer"),
        (Place("gpt2", 3), {"name": "openai-community/gpt2", "layer": 3}, None),
        (Place("gpt2", 3), {"name": "gpt2-medium", "layer": 3}, "model"),
        (Place("google/gemma-2-2b", 3), {"name": "someone/gemma-2-2b", "layer": 3}, "model"),
        (Place("google/gemma-2-2b", 3), {"name": "/models/gemma-2-2b/", "layer": 3}, None),
        (Place("/models/gemma-2-2b", 3), {"name": "/others/gemma-2-2b", "layer": 3}, "model"),
        (Place(None, 3), {"name": "gpt2", "layer": 3}, None),
        (Place("gpt2", None), {"name": "gpt2", "layer": 3}, None),
        (Place("synthetic", 2), {"name": "gpt2", "layer": 2}, "model"),
    ],
)
def test_places_are_compared_as_far_as_they_are_known(trained: Place, model: dict[str, Any], part: str | None) -> None:
    asked = Place.of(configuration.from_mapping({"model": model}, "here"))
    assert trained.difference(asked) == asked.difference(trained) == part


def test_names_of_transformer_lens_are_its_own() -> None:
    supported = pytest.importorskip("transformer_lens.supported_models")
    for name in (*LENS_NAMES, "gemma-2-2b", "gemma-2b-it", "pythia-70m-deduped"):
        assert name in supported.MODEL_ALIASES[hub_name(name)]
