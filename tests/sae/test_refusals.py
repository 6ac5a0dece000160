"""Files that are not what they say are refused, each with one line that says why."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tsae.checkpoint import load_dictionary
from tsae.runtime.errors import TsaeError
from tsae.sae.init import random_dictionary

NAME = "TemporalMatryoshkaBatchTopKSAE"
State = dict[str, Tensor]


def refusal(folder: Path, state: Any, **trainer: Any) -> str:
    """The message with which a run folder of these weights is refused; always one line."""
    torch.save(state, folder / "ae.pt")
    (folder / "config.json").write_text(json.dumps({"trainer": {"dict_class": NAME, "k": 2, **trainer}}))
    with pytest.raises(TsaeError) as refused:
        load_dictionary(folder)
    assert "\n" not in str(refused.value)
    assert "ae.pt" in str(refused.value)
    return str(refused.value)


@pytest.fixture
def state() -> State:
    return random_dictionary(NAME, 8, 32).to_file()


@pytest.mark.parametrize("name", ["TemporalMatryoshkaBatchTopKSEA", "IdentityDict", None, ["BatchTopKSAE"]])
def test_an_unknown_class(tmp_path: Path, state: State, name: Any) -> None:
    message = refusal(tmp_path, state, dict_class=name)
    assert "is unknown" in message
    assert "known: AutoEncoder, " in message
    assert ("did you mean 'TemporalMatryoshkaBatchTopKSAE'?" in message) == ("SEA" in str(name))


def test_a_missing_tensor(tmp_path: Path, state: State) -> None:
    del state["threshold"]
    assert "missing tensors ['threshold'], unexpected tensors none" in refusal(tmp_path, state)


def test_an_extra_tensor(tmp_path: Path, state: State) -> None:
    state["scale"] = torch.ones(())
    assert "missing tensors none, unexpected tensors ['scale']" in refusal(tmp_path, state)


def test_the_tensors_of_another_class(tmp_path: Path, state: State) -> None:
    message = refusal(tmp_path, state, dict_class="BatchTopKSAE")
    assert "not a BatchTopKSAE" in message
    assert "does dict_class in config.json match" in message


CHANGES: dict[str, tuple[Callable[[State], Any], str]] = {
    "transposed encoder": (lambda s: s.update(W_enc=s["W_enc"].T), r"W_enc has shape \(32, 8\); .* needs \(8, 32\)"),
    "short bias": (lambda s: s.update(b_enc=s["b_enc"][:-1]), r"b_enc has shape \(31,\); .* needs \(32,\)"),
    "threshold for each latent": (lambda s: s.update(threshold=torch.ones(32)), r"threshold has shape \(32,\)"),
    "decoder that is no matrix": (lambda s: s.update(W_dec=s["W_dec"][None]), "a matrix is expected"),
    "whole numbers as weights": (lambda s: s.update(W_dec=s["W_dec"].int()), "W_dec is torch.int32"),
    "groups that do not fill": (lambda s: s.update(group_sizes=torch.tensor([6, 27])), "sum to the 32 latents"),
    "empty group": (lambda s: s.update(group_sizes=torch.tensor([0, 32])), "positive numbers"),
    "k of none": (lambda s: s.update(k=torch.tensor(0)), "k is 0; one number from 1 to 32"),
    "k of many": (lambda s: s.update(k=torch.tensor([2, 2])), "one number from 1 to 32"),
    "NaN in the encoder": (lambda s: s["W_enc"][3, 5].fill_(torch.nan), "W_enc holds values that are not finite"),
    "infinite bias": (lambda s: s["b_dec"][0].fill_(-torch.inf), "b_dec holds values that are not finite"),
    "NaN threshold": (lambda s: s["threshold"].fill_(torch.nan), "threshold holds values that are not finite"),
    "uncalibrated threshold": (lambda s: s["threshold"].fill_(-1), "never calibrated .* tsae calibrate"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_tensors_that_cannot_be_right(tmp_path: Path, state: State, change: str) -> None:
    apply, expected = CHANGES[change]
    apply(state)
    with pytest.raises(AssertionError, match=expected):
        # The message itself is matched, so that a refusal for another reason fails the test.
        raise AssertionError(refusal(tmp_path, state))


def test_an_uncalibrated_threshold_is_no_obstacle_where_none_is_used(tmp_path: Path) -> None:
    state = random_dictionary("AutoEncoderTopK", 8, 32).to_file()
    state["threshold"].fill_(-1)
    torch.save(state, tmp_path / "ae.pt")
    (tmp_path / "config.json").write_text(json.dumps({"trainer": {"dict_class": "AutoEncoderTopK", "k": 2}}))
    assert load_dictionary(tmp_path)[0].encode_rule == "top_k"


@pytest.mark.parametrize(
    ("key", "value"), [("k", 3), ("dict_size", 64), ("activation_dim", 16), ("group_sizes", [3, 29])]
)
def test_a_config_that_contradicts_the_weights(tmp_path: Path, state: State, key: str, value: Any) -> None:
    assert f"{key} is" in refusal(tmp_path, state, **{key: value})


class Payload:
    """What a hostile file would hold: loading it runs a command."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.proof),)


@pytest.mark.parametrize("form", ["torch's zip", "torch's first format", "bare pickle"])
def test_a_file_that_wants_to_run_code(tmp_path: Path, state: State, form: str) -> None:
    proof = tmp_path / "proof"
    hostile = {**state, "b_dec": Payload(proof)}
    refusal(tmp_path, state, k=3)  # writes config.json
    if form == "bare pickle":
        (tmp_path / "ae.pt").write_bytes(pickle.dumps(Payload(proof), protocol=2))
    else:
        torch.save(hostile, tmp_path / "ae.pt", _use_new_zipfile_serialization=form == "torch's zip")
    with pytest.raises(TsaeError, match="might run code when loaded; refused"):
        load_dictionary(tmp_path)
    assert not proof.exists()


def test_files_that_hold_no_weights(tmp_path: Path) -> None:
    assert "a plain state dict of dense tensors is expected" in refusal(tmp_path, [torch.ones(3)])
    for content in (b"", b"PK\x03\x04 and nothing more", (tmp_path / "ae.pt").read_bytes()[:700]):
        (tmp_path / "ae.pt").write_bytes(content)
        with pytest.raises(TsaeError, match=r"ae\.pt"):
            load_dictionary(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"trainer": 3}'])
def test_a_config_that_cannot_be_read(tmp_path: Path, state: State, text: str) -> None:
    torch.save(state, tmp_path / "ae.pt")
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(TsaeError, match=r"config\.json: "):
        load_dictionary(tmp_path)


def test_a_step_that_was_never_saved(tmp_path: Path, state: State) -> None:
    refusal(tmp_path, state, k=3)
    (tmp_path / "checkpoints").mkdir()
    torch.save(state, tmp_path / "checkpoints" / "ae_500.pt")
    with pytest.raises(TsaeError, match="no such weights; found here: 500"):
        load_dictionary(tmp_path, checkpoint=400)


def test_the_first_format_of_torch_has_no_checksums_and_is_refused(tmp_path: Path, state: State) -> None:
    refusal(tmp_path, state, k=3)
    (tmp_path / "config.json").write_text(json.dumps({"trainer": {"dict_class": NAME}}))
    torch.save(state, tmp_path / "ae.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(TsaeError, match=r"not torch's zip format.*torch\.save\(torch\.load\(path"):
        load_dictionary(tmp_path)
    torch.save(torch.load(tmp_path / "ae.pt", weights_only=True), tmp_path / "ae.pt")
    assert torch.equal(load_dictionary(tmp_path)[0].W_dec, state["W_dec"])


def test_a_flipped_byte(tmp_path: Path, state: State) -> None:
    refusal(tmp_path, {**state, "k": torch.tensor(3)})  # writes the folder; k disagrees
    torch.save(state, tmp_path / "ae.pt")
    (tmp_path / "config.json").write_text(json.dumps({"trainer": {"dict_class": NAME}}))
    load_dictionary(tmp_path)
    content = bytearray((tmp_path / "ae.pt").read_bytes())
    content[len(content) // 2] ^= 0x40
    (tmp_path / "ae.pt").write_bytes(content)
    with pytest.raises(TsaeError, match="fails its checksum"):
        load_dictionary(tmp_path)


def test_tensors_that_hold_no_plain_numbers(tmp_path: Path, state: State) -> None:
    assert "dense tensors" in refusal(tmp_path, {**state, "W_dec": state["W_dec"].to_sparse()})
