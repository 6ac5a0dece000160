"""Triton's interpreter, without half of its time: it looks through all names of `triton.language` at each call in a kernel.

It does so to replace the builtins among them, which are the same ones every time.
"""

from __future__ import annotations

import functools
import inspect
from types import ModuleType
from typing import Any

from triton.language.core import is_builtin
from triton.runtime import interpreter


@functools.cache
def builtins_of(package: ModuleType | type) -> list[str]:
    """Names of what kernels call there; asked first before anything is replaced."""
    return [name for name, member in inspect.getmembers(package) if is_builtin(member)]


def replace_builtins(package: ModuleType | type, builder: Any, scope: Any) -> None:
    for name in builtins_of(package):
        member = getattr(package, name)
        if is_builtin(member):
            interpreter._patch_attr(package, name, member, builder, scope)


def quicken() -> None:
    """Have the interpreter of this process remember what it found."""
    interpreter._patch_builtin = replace_builtins
