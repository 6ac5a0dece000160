"""The units in which every experiment sees feature activations."""

from __future__ import annotations

import copy

import pytest
import torch

from tsae.checkpoint import RunFolder
from tsae.config.run import RunConfig
from tsae.config.sections import SaeConfig
from tsae.experiments.shared.subject import Subject
from tsae.sae.dictionary import Dictionary
from tsae.sae.init import new_dictionary


def subject_of(config: RunConfig, dictionary: Dictionary) -> Subject:
    subject = Subject(config, RunFolder("nowhere"))
    subject.dictionary = dictionary
    return subject


@torch.no_grad()
@pytest.mark.parametrize("kind", ["standard_april", "jump_relu"])
def test_activations_are_what_latents_write_however_encoder_and_decoder_share_a_scale(
    run_config: RunConfig, kind: str
) -> None:
    dictionary, factors = new_dictionary(SaeConfig(kind=kind, dict_size=24, k=4), 8, seed=0), torch.logspace(-2, 2, 24)
    other = copy.deepcopy(dictionary)
    other.W_dec.data /= factors[:, None]
    other.W_enc.data = other.W_enc * factors
    if kind == "jump_relu":
        other.threshold.data *= factors
    x = torch.randn(30, 8, generator=torch.Generator().manual_seed(0))
    own, rescaled = (subject_of(run_config, each).codes(x).dense() for each in (dictionary, other))
    torch.testing.assert_close(own, dictionary.encode(x) * dictionary.W_dec.norm(dim=1))
    torch.testing.assert_close(rescaled, own, rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_unit_rows_change_no_bit(run_config: RunConfig) -> None:
    dictionary = new_dictionary(SaeConfig(dict_size=24, k=4), 8, seed=0)
    dictionary.threshold.fill_(0.2)
    x = torch.randn(30, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(subject_of(run_config, dictionary).codes(x).dense(), dictionary.encode(x))
