"""Triton's interpreter, without half of its time: it looks through all names of `triton.language` at each call in a kernel.

It does so to replace the builtins among them, which are the same ones every time.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import pkgutil
from types import ModuleType
from typing import Any

from triton.language.core import is_builtin
from triton.runtime import interpreter

from tsae.sae import kernels


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


def all_kernels() -> list[Any]:
    """What Triton launches, of all modules of the package."""
    modules = [
        importlib.import_module(f"{kernels.__name__}.{each.name}") for each in pkgutil.iter_modules(kernels.__path__)
    ]
    return [kernel for module in modules for kernel in vars(module).values() if hasattr(kernel, "run")]
