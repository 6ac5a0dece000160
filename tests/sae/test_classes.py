"""Every dictionary class of the field: its files, its encoder, its decoder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tsae.checkpoint import RunFolder, load_dictionary, save_dictionary
from tsae.runtime import files
from tsae.sae.init import random_dictionary
from tsae.sae.kinds import AutoEncoderTopK, classes, from_state

A, F = 12, 40
MATRICES = {"encoder.weight": (F, A), "decoder.weight": (A, F)}
SHAPES = {
    "AutoEncoder": {"bias": (A,), "encoder.bias": (F,), **MATRICES},
    "AutoEncoderNew": {"encoder.bias": (F,), "decoder.bias": (A,), **MATRICES},
    "GatedAutoEncoder": {"decoder_bias": (A,), "r_mag": (F,), "gate_bias": (F,), "mag_bias": (F,), **MATRICES},
    "JumpReluAutoEncoder": {"W_enc": (A, F), "b_enc": (F,), "W_dec": (F, A), "b_dec": (A,), "threshold": (F,)},
    "AutoEncoderTopK": {"b_dec": (A,), "k": (), "threshold": (), "encoder.bias": (F,), **MATRICES},
}
SHAPES["BatchTopKSAE"] = SHAPES["AutoEncoderTopK"]
SHAPES["MatryoshkaBatchTopKSAE"] = {
    **SHAPES["JumpReluAutoEncoder"],
    "threshold": (),
    "k": (),
    "group_sizes": (2,),
}
SHAPES["TemporalMatryoshkaBatchTopKSAE"] = SHAPES["MatryoshkaBatchTopKSAE"]


def by_hand(name: str, state: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """Code and reconstruction of x [B, A], written out from each class's definition on the tensors of its file."""
    W_enc = state["W_enc"] if "W_enc" in state else state["encoder.weight"].T
    W_dec = state["W_dec"] if "W_dec" in state else state["decoder.weight"].T
    bias = next(state[key] for key in ("b_dec", "bias", "decoder_bias", "decoder.bias") if key in state)
    centred = x if name in ("AutoEncoderNew", "JumpReluAutoEncoder") else x - bias
    product = centred @ W_enc
    if name == "GatedAutoEncoder":
        magnitude = torch.relu(torch.exp(state["r_mag"]) * product + state["mag_bias"])
        f = torch.where(product + state["gate_bias"] > 0, magnitude, 0)
        return f, f @ W_dec + bias
    pre = product + (state["b_enc"] if "b_enc" in state else state["encoder.bias"])
    f = torch.relu(pre)
    if name == "AutoEncoderTopK":
        cut = f.sort(dim=1, descending=True).values[:, int(state["k"]) - 1 : int(state["k"])]
        f = torch.where(f >= cut, f, 0)
    elif "threshold" in state:
        f = torch.where(pre > state["threshold"], f, 0)
    return f, f @ W_dec + bias


@pytest.mark.parametrize("name", classes())
def test_files_hold_the_tensors_of_the_class(name: str) -> None:
    state = random_dictionary(name, A, F).to_file()
    assert {key: tuple(value.shape) for key, value in state.items()} == SHAPES[name]
    assert all(value.is_contiguous() for value in state.values())
    assert all(value.dtype == torch.int32 for key, value in state.items() if key == "k")


@pytest.mark.parametrize("name", classes())
def test_encode_and_decode_are_those_of_the_class_for_any_leading_shape(name: str) -> None:
    dictionary = random_dictionary(name, A, F, seed=3)
    x = torch.randn(3, 5, A, generator=torch.Generator().manual_seed(1))
    f = dictionary.encode(x)
    code, reconstruction = by_hand(name, dictionary.to_file(), x.reshape(-1, A))
    torch.testing.assert_close(f.reshape(-1, F), code)
    torch.testing.assert_close(dictionary.decode(f).reshape(-1, A), reconstruction)
    torch.testing.assert_close(dictionary(x[0, 0]), reconstruction[0])
    # The case tells something: some latents are active, some are not.
    assert 0 < int((f > 0).sum()) < f.numel()
    assert dictionary.encode_rule


@pytest.mark.parametrize("name", classes())
def test_a_run_folder_returns_the_same_dictionary(name: str, tmp_path: Path) -> None:
    run, dictionary = RunFolder(tmp_path), random_dictionary(name, A, F)
    save_dictionary(run.weights, dictionary)
    config: dict = {"trainer": {"dict_class": name, "activation_dim": A, "dict_size": F}}
    if hasattr(dictionary, "k"):
        config["trainer"]["k"] = int(dictionary.k)
    files.write_json(run.config_json, config)
    loaded, found = load_dictionary(tmp_path)
    assert found == config
    assert type(loaded).__name__ == name
    assert loaded.encode_rule == dictionary.encode_rule
    x = torch.randn(7, A)
    assert torch.equal(loaded.encode(x), dictionary.encode(x))
    assert torch.equal(loaded(x), dictionary(x))
    assert all(torch.equal(value, loaded.to_file()[key]) for key, value in dictionary.to_file().items())


@pytest.mark.parametrize("name", classes())
def test_a_dictionary_shares_the_memory_of_its_state_dict(name: str) -> None:
    state = random_dictionary(name, A, F).to_file()
    owned = {value.untyped_storage().data_ptr() for value in state.values()}
    dictionary = from_state(name, state, None, "test")
    for tensor in (*dictionary.parameters(), *dictionary.buffers()):
        assert tensor.untyped_storage().data_ptr() in owned


def mapped(path: Path) -> list[range]:
    """Addresses of this process at which the file at `path` is mapped."""
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(str(path))]
    return [range(*(int(address, 16) for address in line[0].split("-"))) for line in lines]


@pytest.mark.parametrize("name", classes())
def test_a_loaded_dictionary_lies_in_the_mapped_file(name: str, tmp_path: Path) -> None:
    save_dictionary(tmp_path / "ae.pt", random_dictionary(name, 64, 512))
    files.write_json(tmp_path / "config.json", {"trainer": {"dict_class": name}})
    dictionary, _ = load_dictionary(tmp_path)
    pages = mapped(tmp_path / "ae.pt")
    for tensor in (dictionary.W_enc, dictionary.W_dec, dictionary.b_enc, dictionary.b_dec):
        assert any(tensor.data_ptr() in addresses for addresses in pages)


@pytest.mark.parametrize("name", classes())
def test_a_file_for_larger_activations_does_the_same_on_them(name: str) -> None:
    dictionary = random_dictionary(name, A, F)
    larger = from_state(name, dictionary.to_file(scale=7.5), None, "test")
    x = torch.randn(50, A)
    f = dictionary.encode(x)
    torch.testing.assert_close(larger.encode(7.5 * x), 7.5 * f)
    torch.testing.assert_close(larger.decode(7.5 * f), 7.5 * dictionary.decode(f))


@pytest.mark.parametrize("name", classes())
def test_a_file_for_shifted_activations_does_the_same_on_them(name: str) -> None:
    dictionary = random_dictionary(name, A, F)
    generator = torch.Generator().manual_seed(0)
    x, shift = torch.randn(50, A, generator=generator), torch.randn(A, generator=generator)
    shift *= 50 * A**0.5 / shift.norm()
    moved = from_state(name, dictionary.to_file(0.3, 0.3 * shift), None, "test")
    raw = 0.3 * (x + shift)
    f = dictionary.encode(x)
    rounding = {"rtol": 1e-4, "atol": 1e-4}  # of float32 at the size of the shift
    torch.testing.assert_close(moved.encode(raw), 0.3 * f, **rounding)
    torch.testing.assert_close(moved.decode(0.3 * f), 0.3 * (dictionary.decode(f) + shift), **rounding)
    back = from_state(name, moved.to_file(1 / 0.3, -shift), None, "test").to_file()
    for key, value in dictionary.to_file().items():
        torch.testing.assert_close(back[key], value, **rounding)


def test_an_unnormalised_relu_sae_reconstructs_the_same_from_unit_decoder_rows() -> None:
    state = random_dictionary("AutoEncoder", A, F).to_file()
    sizes = torch.rand(F) + 0.5
    sizes[3] = 0
    stretched = {**state, "decoder.weight": state["decoder.weight"] * sizes}
    loaded = from_state("AutoEncoder", stretched, None, "test")
    norms = loaded.W_dec.norm(dim=1)
    torch.testing.assert_close(norms, (sizes > 0).float())
    x = torch.randn(20, A)
    expected = from_state("AutoEncoder", state, None, "test").encode(x)
    torch.testing.assert_close(loaded(x), (expected * sizes) @ state["decoder.weight"].T + state["bias"])


def test_top_k_uses_its_threshold_only_when_asked() -> None:
    dictionary = random_dictionary("AutoEncoderTopK", A, F)
    assert isinstance(dictionary, AutoEncoderTopK)
    x = torch.randn(30, A)
    assert dictionary.encode_rule == "top_k"
    assert dictionary.scalar_threshold is None
    assert torch.all((dictionary.encode(x) > 0).sum(dim=1) <= int(dictionary.k))
    dictionary.rule = "threshold"
    assert dictionary.scalar_threshold == float(dictionary.threshold)
    f = dictionary.encode(x)
    assert torch.all((f == 0) | (f > dictionary.threshold))
    assert len((f > 0).sum(dim=1).unique()) > 1
