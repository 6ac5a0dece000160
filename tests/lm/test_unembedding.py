"""The final norm folded into the output layer: of every architecture that has both, what the model itself adds to the scores."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.lm.conftest import VOCABULARY
from tests.lm.test_families import CAUSAL, DEPTH, Build, build, made
from tsae.lm.unembedding import unembedding

__all__ = ["build"]


@pytest.mark.parametrize("name", CAUSAL)
def test_a_direction_s_scores_are_what_the_model_adds_to_its_own(build: Build, name: str) -> None:
    made.cache_clear()
    lm = build(name, DEPTH - 1)
    generator = torch.Generator().manual_seed(0)
    for parameter in (parameter for parameter in lm.module.parameters() if parameter.ndim == 1):
        parameter.copy_(0.7 + 0.3 * torch.randn(parameter.shape, generator=generator))
    found = unembedding(lm)
    if name == "bart":  # its last block ends in a norm of its own
        assert found is None
        return
    assert found is not None
    tokens = torch.randint(3, VOCABULARY, (1, 12), generator=generator)
    stream = lm.read(tokens, torch.tensor([12]))[0, -1]
    # What the norm divides by stays as it is where a direction is orthogonal to the stream.
    direction = torch.randn(stream.shape, generator=generator)
    for part in (torch.ones_like(stream), stream - stream.mean()):
        direction -= (direction @ part) / (part @ part) * part
    added = (scored(lm, tokens, 0.01 * direction) - scored(lm, tokens, -0.01 * direction)).double()
    expected = found.scores(direction[None])[0].double()
    assert torch.cosine_similarity(added, expected, dim=0) > 1 - 1e-5
    made.cache_clear()


@pytest.mark.parametrize("name", ["gemma2", "gpt_neox", "llama", "mamba"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_it_is_found_in_a_narrower_precision_too(build: Build, name: str, dtype: str) -> None:
    directions = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    scores = []
    for precision in ("float32", dtype):
        made.cache_clear()
        found = unembedding(build(name, dtype=precision))
        assert found is not None
        scores.append(found.scores(directions))
    assert torch.cosine_similarity(scores[0], scores[1]).min() > 0.999
    made.cache_clear()


def scored(lm: Any, tokens: Tensor, direction: Tensor) -> Tensor:
    """What the output layer gives for the last token while a direction is added to what the last block gives."""
    seen: list[Tensor] = []
    handles = [
        lm.module.get_submodule(lm.hook_path).register_forward_hook(
            lambda *call: (
                (call[-1][0] + direction, *call[-1][1:]) if isinstance(call[-1], tuple) else call[-1] + direction
            )
        ),
        lm.module.get_output_embeddings().register_forward_hook(lambda *call: seen.append(call[-1])),
    ]
    lm.module(input_ids=tokens, use_cache=False)
    for handle in handles:
        handle.remove()
    return seen[0][0, -1]
