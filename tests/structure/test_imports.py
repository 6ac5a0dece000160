"""The house has floors: imports go downward, nothing comes back to where it started, and rooms do not look into each other.

All imports count: those inside functions, and those that only a type checker follows.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGE = REPOSITORY / "tsae"
FLOORS = (
    ("runtime", "plotting", "pages"),
    ("config",),
    ("parallel",),
    ("sae",),
    ("checkpoint",),
    ("data",),
    ("lm",),
    ("store",),
    ("training",),
    ("evaluation", "interop"),
    ("experiments",),
    ("stages",),
    ("bench",),
    ("report",),
    ("sweep",),
    ("selftest", "cli"),
    ("__main__",),
)
"""From the ground up; rooms of one floor may import each other, as far as no circle comes of it."""
HEIGHT = {room: height for height, rooms in enumerate(FLOORS) for room in rooms}
SUBMITIT = ("tsae/sweep/schedulers/slurm/", "tsae/selftest.py")
"""Where submitit may be named: its one user, and the list of packages that must be there."""


def modules() -> dict[str, Path]:
    """Module name → file, of the whole package."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(REPOSITORY).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports, in whatever form."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports of this package name it"
            assert node.module is not None
            for alias in node.names:
                yield f"{node.module}.{alias.name}"


@cache
def arrows() -> dict[str, set[str]]:
    """Module → the modules of the package that it imports."""
    names = modules()

    def owner(name: str) -> str | None:
        while name and name not in names:
            name = name.rpartition(".")[0]
        return name or None

    return {
        name: {target for target in map(owner, imports(path)) if target not in (None, "tsae", name)}  # type: ignore[misc]
        for name, path in names.items()
    }


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules of which each reaches every other one."""
    reached = {start: reach(graph, start) for start in graph}
    found = {
        frozenset({one, *(two for two in reached[one] if one in reached[two])}) for one in graph if one in reached[one]
    }
    return sorted(sorted(group) for group in found)


def reach(graph: dict[str, set[str]], start: str) -> set[str]:
    """Everything behind the arrows from `start`; `start` itself only if a way leads back."""
    seen: set[str] = set()
    ahead = list(graph[start])
    while ahead:
        module = ahead.pop()
        if module not in seen:
            seen.add(module)
            ahead += graph[module]
    return seen


def room(module: str) -> str:
    return module.split(".")[1]


def test_a_circle_would_be_found():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]
    assert len(arrows()) > 100


def test_nothing_comes_back_to_where_it_started():
    assert circles(arrows()) == []


def test_imports_go_downward():
    assert {room(name) for name in arrows() if name != "tsae"} <= set(HEIGHT)
    upward = [
        f"{name} imports {target}"
        for name, targets in arrows().items()
        for target in sorted(targets)
        if name != "tsae" and HEIGHT[room(target)] > HEIGHT[room(name)]
    ]
    assert upward == []


def test_experiments_do_not_import_each_other():
    def own(module: str) -> str:
        parts = module.split(".")
        return parts[2] if parts[1:2] == ["experiments"] and len(parts) > 3 else ""

    rooms = {own(name) for name in arrows()} - {"", "shared", "answers"}
    assert {"probe", "steer", "explain"} <= rooms
    across = [
        f"{name} imports {target}"
        for name, targets in arrows().items()
        for target in sorted(targets)
        if own(name) in rooms and own(target) in rooms and own(name) != own(target)
    ]
    assert across == []


def test_the_scripts_are_doors():
    scripts = sorted((REPOSITORY / "launch").glob("*.py"))
    assert [path.name for path in scripts] == ["claims.py", "report.py", "status.py", "sweep.py"]
    for path in scripts:
        assert len(path.read_text().splitlines()) <= 12
        assert set(imports(path)) == {"sys", "tsae.cli.door"}


@pytest.mark.parametrize("folder", ["tsae", "launch", "tests"])
def test_nothing_is_found_by_a_changed_path(folder):
    changed = [
        str(path)
        for path in (REPOSITORY / folder).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, (ast.Attribute, ast.Subscript)) and ast.unparse(node).startswith("sys.path")
        if isinstance(node.ctx, ast.Store)
        or ast.unparse(node) in ("sys.path.insert", "sys.path.append", "sys.path.extend")
    ]
    assert changed == []


def test_submitit_is_named_where_slurm_is_spoken_to():
    naming = [
        str(path.relative_to(REPOSITORY))
        for path in PACKAGE.rglob("*.py")
        if any(name.split(".")[0] == "submitit" for name in imports(path)) or '"submitit"' in path.read_text()
    ]
    assert naming
    assert [name for name in naming if not name.startswith(SUBMITIT)] == []
