"""Streams of a GPU, one for each purpose: torch has 32 of them and hands them out again, one that is recorded among them."""

from __future__ import annotations

import functools

import torch


@functools.cache
def stream_for(purpose: str, device: torch.device) -> torch.cuda.Stream:  # noqa: ARG001 - it tells one from another
    """The stream of a process for this purpose (`graphs`, `pools`, `states`, `stores`) on this GPU."""
    return torch.cuda.Stream(device)
