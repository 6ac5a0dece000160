"""SAELens folders made elsewhere: read exactly, or refused with one line."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tsae.checkpoint import RunFolder, load_dictionary, save_dictionary
from tsae.cli import main
from tsae.interop import sae_lens
from tsae.interop.formats import installed
from tsae.runtime.errors import TsaeError
from tsae.runtime.files import write_json
from tsae.sae.init import random_dictionary

D, F = 16, 80

needs_sae_lens = pytest.mark.skipif(
    not installed("sae_lens"),
    reason="SAELENS ITSELF DID NOT WRITE WHAT IS READ: it is not installed; pip install -e '.[sae-lens]' -c constraints.txt",
)


def tensors(architecture: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    made = {"W_enc": draw(D, F) / D**0.5, "W_dec": draw(F, D), "b_dec": draw(D)}
    if architecture == "gated":
        return {**made, "b_gate": draw(F), "b_mag": draw(F), "r_mag": draw(F) / 4}
    made["b_enc"] = draw(F)
    return {**made, "threshold": draw(F).abs()} if architecture == "jumprelu" else made


def folder(path: Path, architecture: str, weights: dict[str, Tensor] | None = None, **settings: object) -> Path:
    config = {
        "architecture": architecture,
        "d_in": D,
        "d_sae": F,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {
            "sae_lens_version": "6.20.0",
            "model_name": "gemma-2-2b",
            "hook_name": "blocks.12.hook_resid_post",
            "context_size": 1024,
        },
    }
    if architecture == "topk":
        config |= {"k": 7}
    path.mkdir(exist_ok=True)
    (path / "cfg.json").write_text(json.dumps({**config, **settings}))
    save_file(weights or tensors(architecture), path / "sae_weights.safetensors")
    return path


def defined(architecture: str, x: Tensor, centred: bool, k: int = 7) -> tuple[Tensor, Tensor]:
    """Codes and reconstruction by SAELens' definition, written down once more."""
    w = tensors(architecture)
    z = (x - w["b_dec"] if centred else x) @ w["W_enc"]
    if architecture == "gated":
        f = ((z + w["b_gate"]) > 0) * torch.relu(z * w["r_mag"].exp() + w["b_mag"])
    else:
        f = torch.relu(z + w["b_enc"])
    if architecture == "jumprelu":
        f = f * (f > w["threshold"])
    if architecture == "topk":
        f = f * (f >= f.topk(k).values[..., -1:])
    return f, f @ w["W_dec"] + w["b_dec"]


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("architecture", ["standard", "topk", "jumprelu", "gated"])
def test_each_architecture_becomes_a_run_that_computes_the_same(
    tmp_path: Path, activations: Tensor, architecture: str, centred: bool
) -> None:
    source = folder(tmp_path / "source", architecture, apply_b_dec_to_input=centred)
    assert main(["import", str(source), "--out", str(tmp_path / "run")]) == 0
    dictionary, config = load_dictionary(tmp_path / "run")
    codes, reconstructions = defined(architecture, activations, centred)
    assert torch.allclose(dictionary.encode(activations), codes, atol=3e-6)
    assert torch.allclose(dictionary(activations), reconstructions, atol=1e-5)
    trainer = config["trainer"]
    assert (trainer["lm_name"], trainer["layer"], trainer["submodule_name"]) == (
        "google/gemma-2-2b",
        12,
        "resid_post_layer_12",
    )
    assert config["buffer"]["ctx_len"] == 1024


def test_a_residual_stream_before_a_block_is_that_after_the_block_below(tmp_path: Path) -> None:
    metadata = {"sae_lens_version": "6.20.0", "hook_name": "blocks.12.hook_resid_pre"}
    _, config = sae_lens.load(folder(tmp_path, "standard", metadata=metadata))
    assert config["trainer"]["layer"] == 11


@pytest.mark.parametrize(
    ("metadata", "layer", "submodule"),
    [
        ({"hook_name": "blocks.1.hook_mlp_out", "model_name": "gpt2-small"}, None, "transformer.h.1.mlp"),
        ({"hook_name": "blocks.1.hook_attn_out", "model_name": "embedded"}, None, "gpt_neox.layers.1.attention"),
        ({"hook_name": "blocks.0.hook_resid_pre", "model_name": "gpt2"}, None, "transformer.drop"),
        (
            {"hook_name": "blocks.1.hook_mlp_out", "model_name": "gemma-2-2b"},
            None,
            "model.layers.1.post_feedforward_layernorm",
        ),
        (
            {"hook_name": "blocks.1.hook_mlp_out", "hf_hook_name": "backbone.layers.1.mixer"},
            None,
            "backbone.layers.1.mixer",
        ),
        ({"hook_name": "blocks.1.hook_resid_pre", "hf_hook_name": "model.layers.3.output"}, 3, "resid_post_layer_3"),
        ({"hook_name": "model.layers.3", "model_class_name": "AutoModelForCausalLM"}, 3, "resid_post_layer_3"),
        ({}, None, None),
    ],
)
def test_the_place_in_the_model_is_told(
    tmp_path: Path, metadata: dict, layer: int | None, submodule: str | None
) -> None:
    _, config = sae_lens.load(folder(tmp_path, "standard", metadata={"sae_lens_version": "6.20.0"} | metadata))
    assert (config["trainer"]["layer"], config["trainer"]["submodule_name"]) == (layer, submodule)


def test_a_place_comes_back_from_a_run(tmp_path: Path) -> None:
    metadata = {"sae_lens_version": "6.20.0", "hook_name": "blocks.7.hook_attn_out", "model_name": "gemma-2-2b"}
    source = folder(tmp_path / "source", "standard", metadata=metadata)
    assert main(["import", str(source), "--out", str(tmp_path / "run")]) == 0
    assert main(["export", str(tmp_path / "run"), "--format", "sae_lens", "--out", str(tmp_path / "back")]) == 0
    back = json.loads((tmp_path / "back/cfg.json").read_text())["metadata"]
    assert {key: back[key] for key in metadata if key != "sae_lens_version"} == {
        "hook_name": "blocks.7.hook_attn_out",
        "model_name": "gemma-2-2b",
    }
    assert back["hf_hook_name"] == "model.layers.7.post_attention_layernorm"


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"hook_name": "blocks.1.hook_resid_mid"}, "no module's output is that"),
        ({"hook_name": "blocks.1.attn.hook_z"}, "hook_z"),
        ({"hook_name": "blocks.1.hook_mlp_out", "model_name": "nobody/knows"}, "which module of nobody/knows gives it"),
        ({"hook_name": "blocks.0.hook_resid_pre"}, "which module of unknown gives it"),
        ({"hook_name": "blocks.1.hook_attn_out", "model_name": "gpt2", "hook_head_index": 0}, "attention heads"),
        ({"hook_name": "blocks.1.ln2.hook_normalized", "hook_name_out": "blocks.1.hook_mlp_out"}, "another place"),
        ({"model_from_pretrained_kwargs": {"center_writing_weights": True}}, "center_writing_weights is True"),
        ({"model_from_pretrained_kwargs": {"checkpoint_index": 0}}, "checkpoint_index is 0"),
        ({"model_from_pretrained_kwargs": {"fold_ln": True, "revision": "step1000"}}, "revision is 'step1000'"),
        ({"model_from_pretrained_kwargs": ["center_writing_weights"]}, "a mapping is expected"),
    ],
)
@pytest.mark.parametrize("nested", [{"sae_lens_version": "6.20.0"}, {}, None])
def test_other_activations_than_a_modules_output_are_refused(
    tmp_path: Path, capsys, metadata: dict, message: str, nested: dict | None
) -> None:
    settings = {"metadata": nested, **metadata} if nested is None else {"metadata": nested | metadata}
    source = folder(tmp_path / "source", "standard", **settings)
    assert main(["import", str(source), "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error
    assert not (tmp_path / "run").exists()


def test_how_a_model_was_loaded_may_be_what_changes_nothing(tmp_path: Path) -> None:
    loading = {"center_writing_weights": False, "fold_ln": True, "center_unembed": True, "dtype": "bfloat16"}
    metadata = {"sae_lens_version": "6.20.0", "model_from_pretrained_kwargs": loading}
    _, config = sae_lens.load(folder(tmp_path, "standard", metadata=metadata))
    assert config["sae_lens"]["model_from_pretrained_kwargs"] == loading


def test_a_top_k_that_selects_by_decoder_norm_is_folded(tmp_path: Path, activations: Tensor) -> None:
    w = tensors("topk")
    dictionary, _ = sae_lens.load(folder(tmp_path, "topk", rescale_acts_by_decoder_norm=True))
    norms = w["W_dec"].norm(dim=1)
    f = torch.relu(((activations - w["b_dec"]) @ w["W_enc"] + w["b_enc"]) * norms)
    f = f * (f >= f.topk(7).values[..., -1:])
    assert torch.allclose(dictionary.encode(activations), f, atol=1e-5)
    assert torch.allclose(dictionary(activations), f / norms @ w["W_dec"] + w["b_dec"], atol=1e-5)


def test_a_constant_input_scale_is_folded_where_it_is_known(tmp_path: Path, activations: Tensor) -> None:
    source = folder(tmp_path, "jumprelu", normalize_activations="expected_average_only_in")
    with pytest.raises(TsaeError, match=r"activation_scaler.json with its factor is missing"):
        sae_lens.load(source)
    (tmp_path / "activation_scaler.json").write_text('{"scaling_factor": 0.25}')
    codes, reconstructions = defined("jumprelu", activations * 0.25, True)
    dictionary, _ = sae_lens.load(source)
    assert torch.allclose(dictionary.encode(activations), codes, atol=3e-6)
    assert torch.allclose(dictionary(activations) * 0.25, reconstructions, atol=1e-5)


def test_a_config_from_before_version_6_is_understood(tmp_path: Path, activations: Tensor) -> None:
    source = folder(tmp_path, "topk")
    old = {"d_in": D, "d_sae": F, "activation_fn_str": "topk", "activation_fn_kwargs": {"k": 7}, "dtype": "float32"}
    old |= {"hook_point": "blocks.3.hook_resid_post", "model_name": "pythia-160m", "normalize_activations": False}
    (source / "cfg.json").write_text(json.dumps(old))
    dictionary, config = sae_lens.load(source)
    assert torch.allclose(dictionary.encode(activations), defined("topk", activations, True)[0], atol=3e-6)
    assert config["trainer"]["lm_name"] == "EleutherAI/pythia-160m"
    (source / "cfg.json").write_text(json.dumps(old | {"activation_fn_str": "tanh-relu"}))
    with pytest.raises(TsaeError, match="tanh-relu"):
        sae_lens.load(source)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"architecture": "temporal"}, "Lubana"),
        ({"architecture": "batchtopk"}, "save_inference_model"),
        ({"architecture": "jump_relu"}, "did you mean 'jumprelu'"),
        ({"architecture": "skip_transcoder"}, "another place"),
        ({"activation_fn": "tanh-relu"}, "activation_fn: unknown to this architecture"),
        ({"finetuning_scaling_factor": True}, "finetuning_scaling_factor: unknown"),
        ({"k": 7}, "k: unknown to this architecture"),
        ({"metadata": ["6.20.0"]}, "metadata: a mapping is expected"),
        ({"normalize_activations": "layer_norm"}, "not linear"),
        ({"reshape_activations": "hook_z"}, "attention heads"),
        ({"d_sae": 81}, r"W_dec has shape \[80, 16\]; cfg.json says \[81, 16\]"),
        ({"architecture": "topk", "k": None}, "unexpected"),
        ({"architecture": "gated"}, "missing"),
    ],
)
def test_what_has_no_counterpart_is_refused(tmp_path: Path, capsys, settings: dict, message: str) -> None:
    source = folder(tmp_path / "source", **{"architecture": "jumprelu", **settings}, weights=tensors("jumprelu"))
    assert main(["import", str(source), "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(message, error), error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"W_enc": torch.full((D, F), torch.nan)}, "not finite"),
        ({"b_dec": torch.zeros(D + 1)}, "shape"),
        ({"scaling_factor": torch.full((F,), 2.0)}, "scaling_factor"),
        ({"extra": torch.zeros(1)}, "unexpected"),
    ],
)
def test_damaged_weights_are_refused(tmp_path: Path, change: dict[str, Tensor], message: str) -> None:
    with pytest.raises(TsaeError, match=message):
        sae_lens.load(folder(tmp_path, "standard", weights=tensors("standard") | change))


def test_a_sae_lens_folder_given_as_a_run_names_the_command_that_makes_one(tmp_path: Path) -> None:
    with pytest.raises(TsaeError, match="tsae import"):
        load_dictionary(folder(tmp_path, "standard"))


def test_a_truncated_file_and_a_run_folder_are_refused(tmp_path: Path, make_run, capsys) -> None:
    source = folder(tmp_path / "source", "standard")
    weights = source / "sae_weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert main(["import", str(source), "--out", str(tmp_path / "run")]) == 2
    assert "not a readable safetensors file" in capsys.readouterr().err
    run, _ = make_run()
    assert main(["import", str(run / "trainer_0"), "--out", str(tmp_path / "run")]) == 2
    assert "run folder already" in capsys.readouterr().err


@needs_sae_lens
def test_no_architecture_of_sae_lens_is_taken_for_another(tmp_path: Path) -> None:
    from sae_lens.registry import SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY

    names = {*SAE_CLASS_REGISTRY, *SAE_TRAINING_CLASS_REGISTRY}
    assert set(sae_lens.TENSORS) < names
    for name in names - set(sae_lens.TENSORS):
        with pytest.raises(TsaeError, match="cannot be read") as refused:
            sae_lens.load(folder(tmp_path, name, tensors("standard")))
        assert "did you mean" not in str(refused.value)


@needs_sae_lens
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("architecture", list(sae_lens.TENSORS))
def test_every_key_that_sae_lens_writes_is_known(tmp_path: Path, architecture: str, trained: bool) -> None:
    from sae_lens.registry import get_sae_class, get_sae_training_class

    kind, configuration = (get_sae_training_class if trained else get_sae_class)(architecture)
    sizes = {"k": 7} if architecture == "topk" else {}
    sae = kind(configuration(d_in=D, d_sae=F, **sizes))
    sae.cfg.metadata.hook_name = "blocks.3.hook_resid_post"
    sae.cfg.metadata.model_from_pretrained_kwargs = {"center_writing_weights": False}
    sae.save_model(tmp_path)
    dictionary, config = sae_lens.load(tmp_path)
    assert config["trainer"]["layer"] == 3
    x = torch.randn(5, D)
    with torch.no_grad():
        assert torch.allclose(dictionary.encode(x), sae.encode(x), atol=1e-5)


def test_our_own_export_comes_back_as_the_class_it_was(make_run, tmp_path: Path, activations: Tensor) -> None:
    run, dictionary = make_run()
    assert main(["export", str(run), "--format", "sae_lens", "--out", str(tmp_path / "lens")]) == 0
    assert main(["import", str(tmp_path / "lens"), "--out", str(tmp_path / "back")]) == 0
    back, config = load_dictionary(tmp_path / "back")
    assert type(back) is type(dictionary)
    assert back.group_sizes == dictionary.group_sizes
    assert torch.equal(back.encode(activations), dictionary.encode(activations))
    assert config["trainer"]["temporal"] == "within:16"


def test_an_export_whose_splits_have_thresholds_of_their_own_comes_back_with_one(
    make_run, tmp_path: Path, activations: Tensor
) -> None:
    run, dictionary = make_run()
    # As training writes a high-level split with a share of k: in the unit in which the one threshold is right for it.
    high, factor = dictionary.group_slices[0], 1.7
    with torch.no_grad():
        dictionary.W_enc[:, high] *= factor
        dictionary.b_enc[high] *= factor
        dictionary.W_dec[high] /= factor
    save_dictionary(run / "trainer_0" / "ae.pt", dictionary)
    assert main(["export", str(run), "--format", "sae_lens", "--out", str(tmp_path / "lens")]) == 0
    assert main(["import", str(tmp_path / "lens"), "--out", str(tmp_path / "back")]) == 0
    back, _ = load_dictionary(tmp_path / "back")
    assert type(back) is type(dictionary)
    with torch.no_grad():
        ours, theirs = (each.encode(activations) * each.row_norms for each in (dictionary, back))
        assert int((ours[..., high] > 0).sum()) > 0
        torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(back(activations), dictionary(activations), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", ["sae_lens", "sae_bench"])
def test_a_top_k_calibrated_to_a_threshold_is_exported_with_its_threshold(
    tmp_path: Path, activations: Tensor, form: str
) -> None:
    run = RunFolder(tmp_path / "run")
    dictionary = random_dictionary("AutoEncoderTopK", D, F)
    threshold = float(dictionary.threshold)
    measures = {"l0": 1.0, "fve": 0.5}
    calibration = {"encode_rule": "threshold", "threshold": threshold, "target_l0": 1.0, "tokens": 1, "before": None}
    trainer = {"dict_class": "AutoEncoderTopK", "k": int(dictionary.k), "submodule_name": "resid_post_layer_1"}
    write_json(run.config_json, {"trainer": trainer, "calibration": calibration | {"after": measures}})
    save_dictionary(run.weights, dictionary)
    assert main(["export", str(run.path), "--format", form, "--out", str(tmp_path / "out")]) == 0
    loaded, _ = sae_lens.load(tmp_path / "out") if form == "sae_lens" else load_dictionary(tmp_path / "out")
    pre = torch.relu(dictionary.pre_activations(activations))
    assert torch.equal(loaded.encode(activations), pre * (pre > threshold))
    if form == "sae_bench":
        written = json.loads((tmp_path / "out/config.json").read_text())["trainer"]
        assert (written["trainer_class"], written["dict_class"]) == ("BatchTopKTrainer", "BatchTopKSAE")
