"""`pytest -p tests.pretended_gpu.plugin` gives tests a GPU that is not there; with `-m gpu`, also those that need one."""

from __future__ import annotations

from contextlib import ExitStack

import pytest

from tests.pretended_gpu import pretended
from tests.pretended_gpu.order import Order

_within = ExitStack()
_order = _within.enter_context(pretended())  # before tests are collected, which ask for it


@pytest.fixture(scope="session")
def order() -> Order:
    """What happens before what on it."""
    return _order


def pytest_unconfigure() -> None:
    _within.close()
