"""Keys and passwords stay in the environment: what is written down shows `***` in their place."""

from __future__ import annotations

import os
import re

SECRET_NAME = re.compile(r"(?i).*(TOKEN|API_?KEY|ACCESS_?KEY|SECRET|PASSWORD|PASSWD)(_(?!PATH|FILE|DIR).*)?")
"""Variables that hold something secret. A plain KEY, TOKENS or TOKEN_PATH is not one."""
SHORTEST = 8
"""Characters of a secret, at least: a shorter value stands in too much that is not secret."""
_SHAPES = re.compile(r"\bhf_\w{16,}|\bsk-[\w-]{16,}|\bgh[pousr]_\w{16,}|(?<=://)[^/\s@]+(?=@)")
"""Tokens that are known by their look: of the hub, of endpoints, of git hosts; and who is named in an address."""


def is_secret_name(name: str) -> bool:
    """Whether a variable of this name is taken to hold a key."""
    return SECRET_NAME.fullmatch(name) is not None


def holds_key(address: str) -> bool:
    """Whether `address` has a part that may be a key: who asks, before its host, or a query behind its path."""
    return re.search(r"://[^/\s]*@|\?", address) is not None


def hide(text: str) -> str:
    """`text` with `***` for the values of this process's secret variables, and for what looks like a key."""
    values = {value for name, value in os.environ.items() if is_secret_name(name) and len(value) >= SHORTEST}
    for value in sorted(values, key=len, reverse=True):
        text = text.replace(value, "***")
    return _SHAPES.sub("***", text)
