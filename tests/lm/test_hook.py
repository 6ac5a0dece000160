from __future__ import annotations

import pytest
import torch
from torch import nn

from tsae.lm.hook import find_blocks, hidden_of, with_hidden
from tsae.runtime.errors import TsaeError


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))


def test_the_blocks_are_the_largest_list_of_the_right_depth() -> None:
    module = nn.Module()
    module.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
    module.decoder = nn.Module()
    module.decoder.inner = nn.ModuleList(Block() for _ in range(3))
    module.short = nn.ModuleList(nn.Linear(99, 99) for _ in range(2))
    assert find_blocks(module, 3) == "decoder.inner"


def test_a_model_without_a_list_of_blocks_is_refused() -> None:
    with pytest.raises(TsaeError, match=r"no list of 3 blocks in Linear; name a module in model\.hook_point"):
        find_blocks(nn.Linear(2, 2), 3)


@pytest.mark.parametrize("structure", [tuple, list])
def test_activations_go_back_where_they_came_from(structure: type) -> None:
    first, second, new = torch.zeros(1), torch.ones(1), torch.full((1,), 2.0)
    assert hidden_of(structure([first, second])) is first
    changed = with_hidden(structure([first, second]), new)
    assert type(changed) is structure
    assert changed[0] is new
    assert changed[1] is second
    assert hidden_of(first) is first
    assert with_hidden(first, new) is new
