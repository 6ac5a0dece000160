from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tsae.config.sections import ModelConfig
from tsae.interop.place import Place, lens_hook
from tsae.lm.model import LanguageModel, load_language_model, load_tokenizer, readings
from tsae.lm.unembedding import unembedding
from tsae.runtime.errors import TsaeError

Load = Callable[..., LanguageModel]
Rows = tuple[Tensor, Tensor]

BLOCKS = {"gpt_neox": ("gpt_neox.layers", 3), "gemma2": ("model.layers", 4)}
EVERY_BLOCK = [(name, layer) for name, (_, depth) in BLOCKS.items() for layer in range(depth)]
MODULES = [
    ("gpt_neox", "gpt_neox.layers.1.mlp", 32),
    ("gpt_neox", "gpt_neox.layers.1.attention", 32),
    ("gpt_neox", "gpt_neox.layers.0.mlp.dense_h_to_4h", 64),
    ("gpt_neox", "gpt_neox.embed_in", 32),
    ("gemma2", "model.layers.2.self_attn", 48),
    ("gemma2", "model.layers.2.mlp", 48),
    ("gemma2", "model.layers.3.post_feedforward_layernorm", 48),
]


def hooked(lm: LanguageModel, rows: Rows) -> Tensor:
    """What the hook point gives, by a plain forward hook."""
    seen: list[Tensor] = []
    handle = lm.module.get_submodule(lm.hook_path).register_forward_hook(
        lambda _module, _args, output: seen.append(output[0] if isinstance(output, tuple) else output)
    )
    lm.logits(*rows)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize(("name", "layer"), EVERY_BLOCK)
def test_a_layer_is_read_as_the_models_own_hidden_state(load: Load, rows: Rows, name: str, layer: int) -> None:
    lm = load(name, layer=layer)
    read = lm.read(*rows)
    assert lm.hook_path == f"{BLOCKS[name][0]}.{layer}"
    assert read.shape == (4, 12, lm.activation_dim)
    states = lm.module(input_ids=rows[0].long(), output_hidden_states=True).hidden_states
    if layer + 1 < lm.n_layers:
        assert torch.equal(read, states[layer + 1])
    else:
        assert torch.equal(lm.module.base_model.get_submodule(_final_norm(name))(read), states[-1])


@pytest.mark.parametrize("name", BLOCKS)
def test_several_places_are_read_by_one_forward_pass(load: Load, rows: Rows, name: str) -> None:
    lm = load(name, layer=1)
    paths = [path for module, path, _ in MODULES if module == name]
    others = [
        *(ModelConfig(name=name, layer=layer) for layer in (2, 0)),
        *(ModelConfig(name=name, hook_point=path) for path in paths),
    ]
    places, passes = [lm, *map(lm.at, others), lm], []
    alone = [place.read(*rows) for place in places]
    handle = lm.module.get_input_embeddings().register_forward_hook(lambda *seen: passes.append(len(seen[2])))
    (together,) = readings(places, [rows])
    handle.remove()
    assert passes.count(4) == 1  # the other one finds out in which order the places come
    assert all(map(torch.equal, together, alone))
    assert len({place.hook_path for place in places}) == len(places) - 1


@pytest.mark.parametrize("name", BLOCKS)
def test_a_model_that_is_spread_over_memory_and_disk_gives_the_same_bits(
    load: Load, folders: dict[str, Path], rows: Rows, name: str
) -> None:
    whole, room = load(name, layer=1), {"gpt_neox": "cpu=130kB", "gemma2": "cpu=200kB"}[name]
    spread = load(name, layer=1, device_map="auto", max_memory=room)
    where = spread.module.hf_device_map
    assert set(where.values()) == {"cpu", "disk"}, where
    assert any(values.is_meta for values in spread.module.parameters())
    assert torch.equal(spread.read(*rows), whole.read(*rows))
    assert torch.equal(spread.logits(*rows), whole.logits(*rows))
    assert torch.equal(spread.splice(*rows, lambda x: x / 2), whole.splice(*rows, lambda x: x / 2))
    heads = [unembedding(lm) for lm in (spread, whole)]
    assert all(torch.equal(*parts) for parts in zip(*(head[:2] for head in heads if head), strict=True))
    prompt = rows[0][:1, :4]
    greedy = {"do_sample": False}
    assert torch.equal(
        spread.generate(prompt, 5, lambda x: x, **greedy), whole.generate(prompt, 5, lambda x: x, **greedy)
    )

    model = ModelConfig(name=str(folders[name]), layer=1, device="cpu", device_map="auto")
    read = load_language_model(model, read_at=[model, dataclasses.replace(model, layer=0)])
    blocks, depth = BLOCKS[name]
    above = {f"{blocks}.{layer}": "disk" for layer in range(2, depth)}
    assert {path: place for path, place in read.module.hf_device_map.items() if place == "disk"} == above
    assert torch.equal(read.read(*rows), whole.read(*rows))


def test_a_model_that_no_device_can_hold_is_one_line(load: Load) -> None:
    with pytest.raises(TsaeError, match="no device has room for a block"):
        load("gpt_neox", device_map="auto", max_memory="cpu=1kB")
    with pytest.raises(TsaeError, match="there is no device 7 here; there are cpu"):
        load("gpt_neox", device_map="auto", max_memory="7=1GB")


def _final_norm(name: str) -> str:
    return {"gpt_neox": "final_layer_norm", "gemma2": "norm"}[name]


@pytest.mark.parametrize(("name", "path", "size"), MODULES)
def test_any_module_can_be_read(load: Load, rows: Rows, name: str, path: str, size: int) -> None:
    lm = load(name, hook_point=path)
    assert (lm.hook_path, lm.activation_dim) == (path, size)
    assert torch.equal(lm.read(*rows), hooked(lm, rows))


@pytest.mark.parametrize(
    ("name", "hook", "path"),
    [
        ("gpt_neox", "blocks.1.hook_mlp_out", "gpt_neox.layers.1.mlp"),
        ("gpt_neox", "blocks.2.hook_attn_out", "gpt_neox.layers.2.attention"),
        ("gpt_neox", "blocks.0.hook_resid_pre", "gpt_neox.embed_in"),
        ("gemma2", "blocks.1.hook_mlp_out", "model.layers.1.post_feedforward_layernorm"),
    ],
)
def test_a_place_has_its_name_of_transformer_lens(load: Load, rows: Rows, name: str, hook: str, path: str) -> None:
    lm = load(name, hook_point=hook)
    assert lm.hook_path == path
    assert torch.equal(lm.read(*rows), load(name, hook_point=path).read(*rows))
    called = {"gpt_neox": "EleutherAI/pythia-1b", "gemma2": "google/gemma-2-2b"}[name]
    assert lens_hook(Place.of_model(ModelConfig(name=called, hook_point=hook))) == hook


@pytest.mark.parametrize("fields", [{"layer": 1}, {"layer": 2}, {"hook_point": "gpt_neox.layers.1.attention"}])
def test_nothing_after_the_hook_runs(load: Load, rows: Rows, fields: dict[str, object]) -> None:
    lm = load("gpt_neox", **fields)
    ran: list[str] = []
    for path, module in lm.module.named_modules():
        module.register_forward_hook(lambda *_, path=path: ran.append(path))
    lm.module(input_ids=rows[0].long())
    before_hook = ran[: ran.index(lm.hook_path)]
    assert {"lm_head", "gpt_neox.final_layer_norm"} <= set(ran) - set(before_hook)
    ran.clear()
    lm.read(*rows)
    assert set(ran) <= {*before_hook, lm.hook_path}


@pytest.mark.parametrize("name", BLOCKS)
def test_padding_does_not_change_real_positions(load: Load, rows: Rows, name: str) -> None:
    lm, (tokens, lengths) = load(name, layer=1), rows
    noise = tokens.masked_fill(tokens == 0, 7)
    for read in (lm.read, lm.logits):
        together, otherwise = read(tokens, lengths), read(noise, lengths)
        for row, length in enumerate(lengths.tolist()):
            alone = read(tokens[row : row + 1, :length], lengths[row : row + 1])
            torch.testing.assert_close(together[row, :length], alone[0], rtol=1e-4, atol=1e-5)
            assert torch.equal(together[row, :length], otherwise[row, :length])


def test_a_pad_token_outside_the_vocabulary_is_harmless(load: Load, rows: Rows) -> None:
    lm, (tokens, lengths) = load("gpt_neox", layer=1), rows
    assert torch.equal(lm.read(tokens.masked_fill(tokens == 0, 10**6), lengths), lm.read(tokens, lengths))


@pytest.mark.parametrize("fields", [{"layer": 1}, {"layer": 2}, {"hook_point": "gpt_neox.layers.1.attention"}])
def test_splicing_the_same_activations_gives_the_same_logits(load: Load, rows: Rows, fields: dict[str, object]) -> None:
    lm = load("gpt_neox", **fields)
    assert torch.equal(lm.splice(*rows, lambda hidden: hidden), lm.logits(*rows))


def test_splice_gives_the_activations_and_runs_on_what_replaces_them(load: Load, rows: Rows) -> None:
    lm, given = load("gpt_neox", layer=2), []

    def replace(hidden: Tensor) -> Tensor:
        given.append(hidden.clone())
        return torch.full_like(hidden, 0.5) * torch.arange(32)

    spliced = lm.splice(*rows, replace)
    assert torch.equal(given[0], lm.read(*rows))
    constant = (0.5 * torch.arange(32.0)).expand(4, 12, 32)
    expected = lm.module.lm_head(lm.module.gpt_neox.final_layer_norm(constant))
    torch.testing.assert_close(spliced, expected)


def test_splice_replaces_a_tuples_activations_in_every_row(load: Load, rows: Rows) -> None:
    lm = load("gemma2", hook_point="model.layers.1.self_attn")
    handle = lm.module.get_submodule(lm.hook_path).register_forward_hook(
        lambda _module, _args, output: (torch.zeros_like(output[0]), *output[1:])
    )
    expected = lm.logits(*rows)
    handle.remove()
    assert torch.equal(lm.splice(*rows, torch.zeros_like), expected)
    assert not torch.equal(expected, lm.logits(*rows))


def test_splice_refuses_another_shape(load: Load, rows: Rows) -> None:
    with pytest.raises(ValueError, match=re.escape("shape [4, 12] for activations of shape [4, 12, 32]")):
        load("gpt_neox", layer=1).splice(*rows, lambda hidden: hidden[..., 0])


def test_no_gradient_is_kept(load: Load, rows: Rows) -> None:
    lm = load("gpt_neox", layer=1)
    for result in (lm.read(*rows), lm.logits(*rows), lm.splice(*rows, lambda hidden: hidden)):
        assert not result.requires_grad


def test_verification_catches_a_wrong_module(load: Load) -> None:
    lm = load("gpt_neox", layer=1)
    lm.layer = 0
    with pytest.raises(TsaeError, match=re.escape("is not hidden_states[1] (relative difference")):
        lm.verify_hook()


def test_verification_catches_a_wrong_last_block(load: Load) -> None:
    lm = load("gpt_neox", layer=1)
    lm.layer = 2
    with pytest.raises(TsaeError, match=re.escape("is not what becomes hidden_states[3] in the final norm")):
        lm.verify_hook()


def test_half_precision_reads(load: Load, rows: Rows) -> None:
    lm = load("gemma2", layer=2, dtype="bfloat16")
    assert lm.read(*rows).dtype == torch.bfloat16
    assert lm.splice(*rows, lambda hidden: hidden.float()).dtype == torch.bfloat16


def test_identity_tells_models_apart(load: Load, folders: dict[str, Path]) -> None:
    first, second = load("gpt_neox", layer=1).identity, load("gemma2", layer=1).identity
    assert (first["name"], first["hook_path"], first["vocabulary"]) == (
        str(folders["gpt_neox"]),
        "gpt_neox.layers.1",
        320,
    )
    assert first["architecture"] == "GPTNeoXForCausalLM"
    assert first["weights"] != second["weights"]
    assert first["tokenizer_sha256"] == second["tokenizer_sha256"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layer": 3}, "model.layer: 3 is impossible; {name} has blocks 0 to 2"),
        (
            {"hook_point": "gpt_neox.layer.1.mlp"},
            "{name} has no module 'gpt_neox.layer.1.mlp'; the nearest are gpt_neox.layers.1.mlp,",
        ),
        ({"hook_point": "gpt_neox.layers"}, "gpt_neox.layers runs 0 times in a forward pass"),
        ({"hook_point": "gpt_neox"}, "gpt_neox gives BaseModelOutputWithPast for [17, 16] tokens"),
        ({"hook_point": "gpt_neox.rotary_emb"}, "gpt_neox.rotary_emb gives shape [1, 16, 2]"),
    ],
)
def test_a_wrong_hook_point_is_one_clear_line(
    load: Load, folders: dict[str, Path], fields: dict[str, object], message: str
) -> None:
    with pytest.raises(TsaeError) as caught:
        load("gpt_neox", **fields)
    assert message.format(name=folders["gpt_neox"]) in str(caught.value)


def test_foreign_tokens_and_long_contexts_are_refused(load: Load, rows: Rows) -> None:
    lm, (tokens, lengths) = load("gpt_neox", layer=1), rows
    with pytest.raises(TsaeError, match=r"token 400 is not in the vocabulary of 320"):
        lm.read(tokens.masked_fill(tokens == tokens[0, 0], 400), lengths)
    with pytest.raises(TsaeError, match=r"data\.context_length: 36 is impossible; .* has 32 positions"):
        lm.read(tokens.repeat(1, 3), lengths)


def test_a_hub_model_that_cannot_be_had_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(TsaeError, match=r"model\.name: nobody/nothing cannot be loaded: .*offline: run `hf download"):
        load_tokenizer(ModelConfig(name="nobody/nothing"))


@pytest.mark.skipif(torch.cuda.device_count() > 7, reason="this machine has the GPU that should be missing")
def test_a_gpu_that_is_not_there_is_refused(folders: dict[str, Path]) -> None:
    with pytest.raises(TsaeError, match=r"model.device: cuda:7 is not here; this machine shows \d+ GPUs"):
        load_language_model(ModelConfig(name=str(folders["gpt_neox"]), device="cuda:7"))


@pytest.mark.parametrize("name", ["gpt_neox", "gemma2"])
def test_generation_that_changes_nothing_gives_the_models_own_text(load: Load, name: str) -> None:
    lm, prompt, shapes = load(name, layer=1), torch.tensor([[5, 9, 2], [7, 7, 1]]), []

    def unchanged(hidden: Tensor) -> Tensor:
        shapes.append(tuple(hidden.shape))
        return hidden

    found = lm.generate(prompt, 6, unchanged, do_sample=False)
    own = lm.module.generate(
        input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=6, min_new_tokens=6, do_sample=False
    )
    assert torch.equal(found, own)
    assert shapes == [(2, 3, lm.activation_dim), *[(2, 1, lm.activation_dim)] * 5]


def test_what_replaces_activations_shapes_every_generated_token(load: Load) -> None:
    lm, prompt = load("gpt_neox", layer=1), torch.tensor([[5, 9, 2]])
    push = 30 * torch.randn(lm.activation_dim, generator=torch.Generator().manual_seed(1))
    found = lm.generate(prompt, 8, lambda hidden: hidden + push, do_sample=False)
    lengths = torch.tensor([found.shape[1]])
    pushed = lm.splice(found, lengths, lambda hidden: hidden + push)
    assert torch.equal(pushed[0, 2:-1].argmax(-1), found[0, 3:])
    assert not torch.equal(lm.logits(found, lengths)[0, 2:-1].argmax(-1), found[0, 3:])


def test_generation_beyond_the_models_positions_is_refused(load: Load) -> None:
    with pytest.raises(TsaeError, match="positions"):
        load("gpt_neox", layer=1).generate(torch.ones(1, 30, dtype=torch.long), 3, lambda hidden: hidden)
