"""A dictionary attached to a model: equal to `tsae steer` and to loss recovered, with gradients, and gone afterwards."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, LlamaForCausalLM

import tsae
from tsae.config import run as configuration
from tsae.config.sections import ModelConfig, SaeConfig
from tsae.evaluation.loss_recovered import sequence_losses
from tsae.experiments.steer.generation import NO_LATENT, Rows, Steering
from tsae.interop.attach import attach, load
from tsae.lm.embedded_text import train_tokenizer
from tsae.lm.model import LanguageModel, load_language_model
from tsae.runtime.errors import TsaeError
from tsae.sae.dictionary import Dictionary, ThresholdDictionary
from tsae.sae.inference import reconstruct
from tsae.sae.init import new_dictionary
from tsae.sae.reference import reference_config

LATENTS, LAYER = 96, 1
TEXT = "A list of the files that the command reads."


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of width 32 with 3 blocks, as a folder."""
    folder = tmp_path_factory.mktemp("models") / "llama"
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    LlamaForCausalLM(
        LlamaConfig(vocab_size=320, max_position_embeddings=64, initializer_range=0.3, **sizes)
    ).save_pretrained(folder)
    train_tokenizer([TEXT], 320, 64).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["embedded", "llama"])
def lm(request: pytest.FixtureRequest, llama: Path) -> LanguageModel:
    name = "embedded" if request.param == "embedded" else str(llama)
    return load_language_model(ModelConfig(name=name, layer=LAYER, device="cpu"))


def fitting(width: int, x: torch.Tensor | None = None, kind: str = "temporal") -> Dictionary:
    """A random dictionary, about a tenth of whose latents are active on `x`."""
    dictionary = new_dictionary(SaeConfig(kind=kind, dict_size=LATENTS, k=8), width, seed=0)
    if isinstance(dictionary, ThresholdDictionary):
        x = torch.randn(64, width) if x is None else x.reshape(-1, width)
        dictionary.threshold.fill_(float(dictionary.pre_activations(x).detach().relu().quantile(0.9)))
    return dictionary.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return torch.randint(5, 300, (3, 10), generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def hidden(lm: LanguageModel, tokens: torch.Tensor) -> torch.Tensor:
    return lm.read(tokens, torch.full((3,), 10))


@pytest.fixture(scope="module")
def dictionary(lm: LanguageModel, hidden: torch.Tensor) -> Dictionary:
    return fitting(lm.activation_dim, hidden)


def logits(model: Any, tokens: torch.Tensor, **given: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=tokens, **given).logits


def steering(dictionary: Dictionary, latent: int, strength: float, mode: str, rows: int) -> Steering:
    norms = dictionary.row_norms
    subject: Any = SimpleNamespace(dictionary=dictionary, device=torch.device("cpu"), row_norms=norms)
    named = torch.full((rows,), latent if mode == "set" else NO_LATENT)
    vector = dictionary.W_dec[latent] / norms[latent]
    return Steering(subject, Rows(named, vector.expand(rows, -1), torch.full((rows,), strength)))


def busiest(dictionary: Dictionary, hidden: torch.Tensor) -> int:
    """The latent that is active on the most tokens beyond the first."""
    return int((dictionary.encode(hidden[:, 1:]) > 0).sum((0, 1)).argmax())


def test_codes_are_those_of_the_activations_and_no_bit_changes(
    lm: LanguageModel, dictionary: Dictionary, tokens: torch.Tensor, hidden: torch.Tensor
) -> None:
    before = logits(lm.module, tokens)
    with attach(lm, dictionary, layer=LAYER) as sae:
        assert torch.equal(logits(lm.module, tokens), before)
        assert torch.allclose(sae.codes(), dictionary.encode(hidden), atol=1e-6)
    assert bool((sae.codes() > 0).any())
    assert sae.codes().shape == (3, 10, LATENTS)


def test_codes_of_a_text_are_those_of_its_tokens(lm: LanguageModel, dictionary: Dictionary) -> None:
    with attach(lm.module, dictionary, layer=LAYER) as sae:
        found, ids = sae.codes(TEXT), sae.tokens(TEXT)
        assert torch.equal(found, sae.codes()[0])
    assert lm.tokenizer.decode(ids[0], skip_special_tokens=True).strip() == TEXT
    x = lm.read(ids, torch.tensor([ids.shape[1]]))[0]
    assert torch.allclose(found, dictionary.encode(x), atol=1e-6)
    assert not found.requires_grad


def test_replacing_is_what_loss_recovered_measures(
    lm: LanguageModel, dictionary: Dictionary, tokens: torch.Tensor
) -> None:
    valid = torch.ones(3, 10, dtype=torch.bool)
    valid[:, 0] = valid[1, 4] = False
    document = torch.where(valid, 0, -1)
    expected = sequence_losses(
        lm, lambda x: reconstruct(dictionary, x), tokens, torch.full((3,), 10), document, valid,
        torch.zeros(lm.activation_dim),
    )  # fmt: skip
    wanted = valid[:, 1:] & valid[:, :-1]

    def loss(scores: torch.Tensor) -> torch.Tensor:
        return (cross_entropy(scores[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none") * wanted).sum(1)

    with attach(lm.module, dictionary, layer=LAYER) as sae:
        sae.positions = valid
        sae.replace()
        replaced = loss(logits(lm.module, tokens))
        sae.clear()
        kept = loss(logits(lm.module, tokens))
    assert torch.allclose(replaced.double(), torch.from_numpy(expected.reconstructed), rtol=1e-5)
    assert torch.allclose(kept.double(), torch.from_numpy(expected.original), rtol=1e-5)
    assert not torch.allclose(replaced, kept, rtol=1e-3)


@pytest.mark.parametrize("mode", ["set", "add"])
def test_steering_is_that_of_the_experiment_in_a_pass_and_in_generation(
    lm: LanguageModel, dictionary: Dictionary, tokens: torch.Tensor, hidden: torch.Tensor, mode: Any
) -> None:
    latent, strength = busiest(dictionary, hidden), 3 * float(hidden.norm(dim=-1).median())
    lengths = torch.full((3,), 10)
    expected = lm.splice(tokens, lengths, steering(dictionary, latent, strength, mode, 3))
    text = lm.generate(tokens, 8, steering(dictionary, latent, strength, mode, 3), do_sample=False)
    mask = torch.ones_like(tokens)
    with attach(lm.module, dictionary, layer=LAYER) as sae:
        sae.steer(latent, strength, mode)
        assert torch.allclose(logits(lm.module, tokens), expected, atol=1e-4, rtol=1e-4)
        options: Any = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
        assert torch.equal(lm.module.generate(input_ids=tokens, attention_mask=mask, **options), text)
        sae.clear()
        assert not torch.equal(lm.module.generate(input_ids=tokens, attention_mask=mask, **options), text)


def test_ablation_takes_away_what_latents_write_and_nothing_else(
    lm: LanguageModel, dictionary: Dictionary, tokens: torch.Tensor, hidden: torch.Tensor
) -> None:
    code = dictionary.encode(hidden)
    gone = code.clone()
    high = dictionary.group_slices[0]
    gone[:, 1:, high] = 0
    expected = lm.splice(tokens, torch.full((3,), 10), lambda x: x + (gone - code) @ dictionary.W_dec)
    with attach(lm, dictionary, layer=LAYER) as sae:
        sae.ablate(high)
        assert torch.allclose(logits(lm.module, tokens), expected, atol=1e-4, rtol=1e-4)
        assert not sae.codes()[:, 1:, high].any()
    assert not torch.allclose(expected, logits(lm.module, tokens), atol=1e-3)


def test_strengths_are_what_is_written_whatever_the_norms_of_decoder_rows(llama: Path) -> None:
    lm = load_language_model(ModelConfig(name=str(llama), layer=LAYER, device="cpu"))
    tokens, dictionary = torch.arange(5, 13)[None], fitting(32, kind="standard_april")
    dictionary.W_dec.mul_(torch.linspace(0.5, 4, LATENTS)[:, None])
    expected = lm.splice(tokens, torch.tensor([8]), steering(dictionary, 90, 5.0, "set", 1))
    with attach(lm, dictionary, layer=LAYER) as sae:
        sae.steer(90, 5.0)
        assert torch.allclose(logits(lm.module, tokens), expected, atol=1e-4, rtol=1e-4)
        assert (sae.codes()[0, 1:, 90] * dictionary.row_norms[90]).numpy() == pytest.approx(5.0)


def test_the_first_real_token_is_left_alone_behind_padding_and_never_again_in_a_continuation(llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama)
    tokens, dictionary = torch.arange(5, 13)[None], fitting(32)
    with attach(model, dictionary, layer=LAYER) as sae:
        sae.steer(7, 4.0)
        logits(
            model,
            torch.cat([torch.zeros(1, 2, dtype=torch.long), tokens], 1),
            attention_mask=torch.tensor([[0] * 2 + [1] * 8]),
        )
        assert (sae.codes()[0, :, 7] == 4).tolist() == [False] * 3 + [True] * 7
        with torch.no_grad():
            cache = model(tokens, past_key_values=DynamicCache(config=model.config)).past_key_values
        assert (sae.codes()[0, :, 7] == 4).tolist() == [False] + [True] * 7
        logits(model, tokens[:, :2], past_key_values=cache)
        assert (sae.codes()[0, :, 7] == 4).tolist() == [True] * 2


def test_gradients_are_the_models_own_and_flow_through_codes(
    lm: LanguageModel, dictionary: Dictionary, tokens: torch.Tensor
) -> None:
    embedded = lm.module.get_input_embeddings()(tokens).requires_grad_()

    def score() -> torch.Tensor:
        return lm.module(inputs_embeds=embedded).logits[0, -1, 7]

    (expected,) = torch.autograd.grad(score(), embedded)
    with attach(lm, dictionary, layer=LAYER) as sae:
        value = score()
        codes = sae.codes()
        by_input, by_code = torch.autograd.grad(value, [embedded, codes], retain_graph=True)
        assert torch.allclose(by_input, expected, atol=1e-5, rtol=1e-4)
        (of_codes,) = torch.autograd.grad(codes.sum(), embedded)
        assert bool(of_codes.any())
        # The gradient by a code is what a little more of that latent does, the error term as it was.
        latent, step = int(by_code[0, 1:].sum(0).abs().argmax()), 1e-2
        sae.steer(latent, step * float(dictionary.row_norms[latent]), "add")
        assert float((score() - value).detach()) == pytest.approx(
            step * float(by_code[0, 1:, latent].sum()), rel=0.05, abs=1e-4
        )


def test_codes_have_gradients_in_a_frozen_model(
    lm: LanguageModel, dictionary: Dictionary, tokens: torch.Tensor
) -> None:
    with attach(lm, dictionary, layer=LAYER) as sae:
        value = lm.module(input_ids=tokens).logits[0, -1, 7]
        (gradient,) = torch.autograd.grad(value, sae.codes())
    assert bool(gradient[0].any())
    assert not gradient[1:].any()


def test_everything_is_gone_after_an_exception(lm: LanguageModel, dictionary: Dictionary, tokens: torch.Tensor) -> None:
    before, training = logits(lm.module, tokens), [p.requires_grad for p in lm.module.parameters()]

    hooks = hook_count(lm.module)

    def fail() -> None:
        with attach(lm, dictionary, layer=LAYER) as sae:
            sae.replace()
            assert not torch.equal(logits(lm.module, tokens), before)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert hook_count(lm.module) == hooks
    assert torch.equal(logits(lm.module, tokens), before)
    assert [p.requires_grad for p in lm.module.parameters()] == training


def hook_count(module: torch.nn.Module) -> int:
    return sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in module.modules())


def test_a_model_in_half_precision_goes_on_in_it(llama: Path) -> None:
    model, dictionary = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.bfloat16), fitting(32)
    tokens = torch.arange(5, 13)[None]
    before = logits(model, tokens)
    with attach(model, dictionary, layer=LAYER) as sae:
        assert torch.equal(logits(model, tokens), before)
        sae.replace()
        replaced = logits(model, tokens)
    assert replaced.dtype == torch.bfloat16
    assert not torch.equal(replaced, before)


Make = Callable[[Any, Dictionary], Any]
WRONG: dict[str, tuple[Make, str]] = {
    "layer": (lambda m, d: attach(m, d, layer=3), r"model\.layer: 3 is impossible; .* has blocks 0 to 2"),
    "negative layer": (lambda m, d: attach(m, d, layer=-1), r"model\.layer: -1 is impossible"),
    "module": (lambda m, d: attach(m, d, hook_point="model.layer.1"), r"the nearest are model\.layers\.1"),
    "no layer": (lambda m, d: attach(m, d), r"does not say where it reads; give layer"),
    "width": (lambda m, _: attach(m, fitting(48), layer=1), r"of 48 dimensions, model\.layers\.1 gives 32"),
    "pair": (lambda m, d: attach(m, (d, {}), layer=1), r"LlamaForCausalLM and tuple"),  # type: ignore[arg-type]
    "name": (lambda _, d: attach("gpt2", d, layer=1), r"found str and Temporal"),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_fit_is_refused_before_the_block(case: str, llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama)
    make, message = WRONG[case]
    with pytest.raises(TsaeError, match=message), make(model, fitting(32)):
        pytest.fail("the block was entered")
    assert hook_count(model) == 0


def test_an_uncalibrated_dictionary_is_refused(llama: Path) -> None:
    dictionary = new_dictionary(SaeConfig(kind="batch_topk", dict_size=LATENTS, k=8), 32, seed=0)
    model = AutoModelForCausalLM.from_pretrained(llama)
    with pytest.raises(TsaeError, match="never calibrated"), attach(model, dictionary, layer=1):
        pytest.fail("the block was entered")


@pytest.mark.parametrize("latents", [LATENTS, -1, [3, LATENTS]])
def test_what_there_is_not_is_refused_inside_the_block(latents: Any, llama: Path) -> None:
    model = LlamaForCausalLM(AutoModelForCausalLM.from_pretrained(llama).config)
    model.config._name_or_path = ""
    with attach(model, fitting(32), layer=1) as sae:
        with pytest.raises(TsaeError, match=r"latent (96|-1) is impossible; the dictionary has latents 0 to 95"):
            sae.ablate(latents)
        with pytest.raises(TsaeError, match="mode 'times' is not allowed; allowed: set, add"):
            sae.steer(1, 2.0, "times")  # type: ignore[arg-type]
        with pytest.raises(TsaeError, match="no codes yet"):
            sae.codes()
        with pytest.raises(TsaeError, match="give it one: attach"):
            sae.codes(TEXT)
        sae.positions = torch.ones(1, 3)
        with pytest.raises(TsaeError, match=r"positions of shape \[1, 3\] do not fit \[1, 4\] tokens"):
            logits(model, torch.tensor([[5, 6, 7, 8]]))


def test_a_text_beyond_the_models_positions_is_refused(llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama)
    with attach(model, fitting(32), layer=1) as sae:
        for text in ("", TEXT * 20):
            with pytest.raises(
                TsaeError, match=r"tokens is impossible; at least 1 is expected, and the model has 64 positions"
            ):
                sae.codes(text)


@pytest.fixture
def run_folder(tmp_path: Path, llama: Path) -> Path:
    """What a hub repository holds of a dictionary on block 1 of that model: config.json and ae.pt."""
    from tsae.checkpoint import save_dictionary
    from tsae.runtime.files import write_json

    settings = {"model": {"name": str(llama), "layer": 1}, "sae": {"dict_size": LATENTS, "k": 8}}
    config = configuration.from_mapping(settings, "test")
    write_json(tmp_path / "config.json", reference_config(config, 32))
    save_dictionary(tmp_path / "ae.pt", fitting(32))
    return tmp_path


def test_one_call_loads_what_can_be_attached_where_it_was_trained(
    run_folder: Path, llama: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dictionary = tsae.load(run_folder)
    assert dictionary.reads == ModelConfig(name=str(llama), layer=1)
    model = AutoModelForCausalLM.from_pretrained(llama)
    with tsae.attach(model, dictionary) as sae:
        here = sae.codes(TEXT)
    assert "was trained on" not in caplog.text
    with tsae.attach(model, dictionary, layer=0) as sae:
        assert not torch.equal(sae.codes(TEXT), here)
    assert "was trained on layer 1 and is put into layer 0" in caplog.text
    lm = tsae.load_language_model(dictionary.reads)
    with tsae.attach(lm, dictionary) as sae:
        assert torch.equal(sae.codes(TEXT), here)


def test_what_is_loaded_tells_what_it_is(run_folder: Path, llama: Path) -> None:
    told = repr(load(run_folder))
    assert "\n" not in told
    assert told.startswith("TemporalMatryoshkaBatchTopKSAE: 96 latents on 32 dimensions, splits ")
    assert told.endswith(f", reads block 1 of {llama}")
    assert ", k 8, threshold " in told
    assert repr(fitting(32, kind="standard_april")).endswith("96 latents on 32 dimensions, rule relu")
    uncalibrated = new_dictionary(SaeConfig(kind="batch_topk", dict_size=LATENTS, k=8), 32, seed=0)
    assert repr(uncalibrated) == "BatchTopKSAE: 96 latents on 32 dimensions, k 8, threshold not calibrated"
