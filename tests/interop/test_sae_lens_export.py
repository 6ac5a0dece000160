"""Folders for SAELens: what they hold, what SAELens reads from them, what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tsae.checkpoint import RunFolder, load_dictionary, save_dictionary
from tsae.cli import main
from tsae.config import run as configuration
from tsae.interop import sae_lens
from tsae.interop.export import export
from tsae.interop.formats import installed
from tsae.runtime.errors import TsaeError
from tsae.sae.init import random_dictionary
from tsae.sae.kinds import KINDS, from_state
from tsae.store.moments import Moments
from tsae.training.trainer import Trainer

needs_sae_lens = pytest.mark.skipif(
    not installed("sae_lens"),
    reason="SAELENS ITSELF DID NOT READ OUR EXPORTS: it is not installed; pip install -e '.[sae-lens]' -c constraints.txt",
)


def test_a_temporal_sae_is_written_as_jumprelu_with_its_threshold_repeated(make_run, tmp_path: Path) -> None:
    run, dictionary = make_run()
    assert main(["export", str(run), "--format", "sae_lens", "--out", str(tmp_path / "out")]) == 0
    config = json.loads((tmp_path / "out/cfg.json").read_text())
    assert {key: value for key, value in config.items() if key != "metadata"} == {
        "architecture": "jumprelu",
        "d_in": 16,
        "d_sae": 80,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
    }
    tensors = load_file(tmp_path / "out/sae_weights.safetensors")
    assert set(tensors) == {"W_enc", "b_enc", "W_dec", "b_dec", "threshold"}
    assert torch.equal(tensors["threshold"], torch.full((80,), float(dictionary.threshold)))
    assert not (tmp_path / "out/sparsity.safetensors").exists()  # SAEBench would misread SAELens' log rates


def test_metadata_use_transformer_lens_names_and_state_the_measured_l0(make_run, tmp_path: Path) -> None:
    run, _ = make_run()
    export(run, "sae_lens", tmp_path / "out")
    metadata = json.loads((tmp_path / "out/cfg.json").read_text())["metadata"]
    expected = {
        "model_name": "gemma-2-2b",
        "hook_name": "blocks.12.hook_resid_post",
        "hf_hook_name": "model.layers.12",
        "prepend_bos": True,
        "context_size": 256,
        "dataset_path": "monology/pile-uncopyrighted",
        "seqpos_slice": [1, None],
        "tsae_dict_class": "TemporalMatryoshkaBatchTopKSAE",
        "tsae_group_sizes": [16, 64],
        "tsae_k": 5,
        "tsae_threshold_l0": 5.25,
        "tsae_commit": "abc",
    }
    assert {key: metadata[key] for key in expected} == expected
    assert int(metadata["sae_lens_version"].split(".")[0]) >= 6


@pytest.mark.parametrize("module", ["gpt_neox.layers.3.mlp", "model.layers.3.self_attn"])
def test_a_place_that_is_no_block_gets_no_transformer_lens_name(make_run, tmp_path: Path, module: str) -> None:
    run, _ = make_run(model={"hook_point": module})
    export(run, "sae_lens", tmp_path / "out")
    metadata = json.loads((tmp_path / "out/cfg.json").read_text())["metadata"]
    assert metadata["hook_name"] is None
    assert metadata["hf_hook_name"] == module
    with pytest.raises(TsaeError, match="output of a block"):
        export(run, "sae_bench", tmp_path / "bench")


@pytest.mark.parametrize("chunk", [0, 1])
def test_one_group_gives_the_same_codes_as_in_the_whole(make_run, tmp_path: Path, activations, chunk: int) -> None:
    run, dictionary = make_run()
    export(run, "sae_lens", tmp_path / "out", chunk=chunk)
    part, config = sae_lens.load(tmp_path / "out")
    codes = dictionary.encode(activations)
    assert torch.equal(part.encode(activations), codes[..., dictionary.group_slices[chunk]])
    expected = dictionary.decode_groups(codes, [chunk]) + dictionary.b_dec
    assert torch.allclose(part(activations), expected, atol=1e-6)
    assert config["sae_lens"]["tsae_threshold_l0"] == [2.0, 3.25][chunk]
    export(run, "reference", tmp_path / "reference", chunk=chunk)
    again, _ = load_dictionary(tmp_path / "reference")
    assert torch.equal(again.encode(activations), part.encode(activations))


def test_a_checkpoint_is_exported_without_the_measures_of_the_final_weights(
    make_run, tmp_path: Path, activations
) -> None:
    run, _ = make_run()
    export(run, "sae_lens", tmp_path / "out", checkpoint=10)
    loaded, config = sae_lens.load(tmp_path / "out")
    assert torch.equal(loaded.encode(activations), load_dictionary(run, checkpoint=10)[0].encode(activations))
    assert config["sae_lens"]["tsae_threshold_l0"] is None


def test_an_uncalibrated_dictionary_is_refused_and_nothing_is_left(make_run, tmp_path: Path, capsys) -> None:
    run, dictionary = make_run()
    dictionary.threshold.fill_(-1.0)
    save_dictionary(RunFolder(run / "trainer_0").weights, dictionary)
    assert main(["export", str(run), "--format", "sae_lens", "--out", str(tmp_path / "place/out")]) == 2
    assert "never calibrated" in capsys.readouterr().err
    assert not (tmp_path / "place").exists()


def test_a_folder_in_use_is_not_overwritten(make_run, tmp_path: Path, capsys) -> None:
    run, _ = make_run()
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("keep")
    assert main(["export", str(run), "--format", "reference", "--out", str(tmp_path / "out")]) == 2
    assert "left as it is" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]


# A dictionary with one threshold is brought back to one, whatever its rows' norms: tests/interop/test_sae_lens_import.py.
@pytest.mark.parametrize("name", ["AutoEncoderNew", "GatedAutoEncoder", "JumpReluAutoEncoder"])
def test_decoder_rows_get_norm_one_and_reconstructions_stay(tmp_path: Path, activations, name: str) -> None:
    dictionary = random_dictionary(name, 16, 80)
    norms = torch.linspace(0.2, 3, 80)
    dictionary.W_dec.data *= norms[:, None]
    _write(tmp_path, dictionary)
    loaded, _ = sae_lens.load(tmp_path)
    assert torch.allclose(loaded.W_dec.norm(dim=1), torch.ones(80), atol=1e-6)
    assert torch.allclose(loaded(activations), dictionary(activations), atol=1e-5)
    assert torch.allclose(loaded.encode(activations), dictionary.encode(activations) * norms, atol=1e-5)


def test_a_top_k_keeps_its_rows_because_factors_would_change_its_choice(tmp_path: Path, activations) -> None:
    dictionary = random_dictionary("AutoEncoderTopK", 16, 80)
    dictionary.W_dec.data *= torch.linspace(0.2, 3, 80)[:, None]
    _write(tmp_path, dictionary)
    loaded, config = sae_lens.load(tmp_path)
    assert torch.equal(loaded.encode(activations), dictionary.encode(activations))
    assert config["sae_lens"]["tsae_unit_decoder_rows"] is False


def test_an_empty_decoder_row_is_refused(tmp_path: Path) -> None:
    dictionary = random_dictionary("AutoEncoderNew", 16, 80)
    dictionary.W_dec.data[3] = 0
    with pytest.raises(TsaeError, match=r"latents \[3\] are zero"):
        _write(tmp_path, dictionary)


def test_an_unknown_format_names_the_known_ones(make_run, tmp_path: Path) -> None:
    run, _ = make_run()
    with pytest.raises(TsaeError, match="did you mean 'sae_lens'"):
        export(run, "saelens", tmp_path / "out")


@needs_sae_lens
@pytest.mark.parametrize("chunk", [None, 0])
def test_sae_lens_itself_encodes_and_decodes_alike(make_run, tmp_path: Path, activations, chunk: int | None) -> None:
    from sae_lens import SAE

    run, dictionary = make_run()
    export(run, "sae_lens", tmp_path / "out", chunk=chunk)
    loaded, _ = sae_lens.load(tmp_path / "out")
    sae = SAE.load_from_disk(tmp_path / "out")
    assert sae.cfg.metadata.hook_name == "blocks.12.hook_resid_post"
    with torch.no_grad():
        codes = sae.encode(activations)
        assert torch.allclose(codes, dictionary.encode(activations)[..., : codes.shape[-1]], atol=1e-6)
        assert torch.allclose(sae.decode(codes), loaded(activations), atol=1e-6)
        sae.fold_W_dec_norm()
        assert torch.allclose(sae.encode(activations), codes, atol=1e-5)


@needs_sae_lens
@pytest.mark.parametrize("kind", KINDS)
def test_sae_lens_reconstructs_raw_activations_as_the_centred_training_did(tmp_path: Path, kind: str) -> None:
    from sae_lens import SAE

    generator = torch.Generator().manual_seed(0)
    features = torch.rand(64 * 80, 2, 12, generator=generator) * (torch.rand(64 * 80, 1, 12, generator=generator) < 0.2)
    x = features @ torch.randn(12, 16, generator=generator) + 20 * torch.randn(16, generator=generator)
    tokens = x.double().flatten(0, 1)
    moments = Moments(
        len(tokens), tokens.mean(0).float(), tokens.var(0, correction=0), float(tokens.square().sum(1).mean())
    )
    settings = {"batch_size": 64, "steps": 80, "lr": 0.003, "threshold_start_step": 20, "threshold_beta": 0.9}
    tree = {"sae": {"kind": kind, "dict_size": 80, "k": 4}, "training": {**settings, "normalize": "centred"}}
    trainer = Trainer(configuration.from_mapping(tree, "test"), 16, moments=moments)
    for batch in x.split(64):
        trainer.step(batch)
    state = trainer.dictionary.to_file(trainer.scale, trainer.shift)
    _write(tmp_path, from_state(KINDS[kind].dictionary.__name__, state, None, "test"))
    sae, held_out = SAE.load_from_disk(tmp_path), x[:64, 0]
    with torch.no_grad():
        units = (held_out - moments.mean) / trainer.scale
        trained, found = trainer.dictionary(units), (sae(held_out) - moments.mean) / trainer.scale
    assert float((units - found).square().sum()) < 0.7 * float(units.square().sum())
    # Where a pre-activation lies at its threshold, rounding decides; nearly all lie elsewhere.
    different = ((found - trained).abs().amax(dim=1) > 1e-3).float().mean()
    assert float(different) < 0.05


def _write(folder: Path, dictionary) -> None:
    from tsae.interop.formats import ORIGIN

    sae_lens.write(folder, dictionary, ORIGIN, {}, "test")
