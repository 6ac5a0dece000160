"""Plain mappings to frozen dataclasses: typed, refused with one line, documented from the source.

A field's documentation is the string literal that follows it; `describe` turns a dataclass into the
text of `--help`, so the help cannot drift from the code.
"""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import inspect
import itertools
import json
import math
import textwrap
import types
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from tsae.config.bounds import Added, Bound, OneOf
from tsae.config.paths import Located, Place, as_written
from tsae.runtime.errors import TsaeError, suggestion
from tsae.runtime.secrets import hide, is_secret_name

T = TypeVar("T")


yaml.representer.SafeRepresenter.add_representer(Located, lambda dumper, path: dumper.represent_str(str(path)))


class _UniqueKeys(yaml.SafeLoader):
    """YAML's safe loader, which refuses a key that stands twice in one mapping: the first would be lost."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"'{key.value}' stands twice", key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises TsaeError if it is missing, malformed or not a mapping."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise TsaeError(f"{path}: cannot be read: {reason}") from None
    try:
        loaded = yaml.load(text, _UniqueKeys)  # a SafeLoader
        if isinstance(loaded, dict):
            list(flatten(loaded))  # ends where nothing refers to itself
    except RecursionError:
        raise TsaeError(f"{path}: not valid YAML: it is nested too deeply, or refers to itself") from None
    except ValueError as error:
        raise TsaeError(f"{path}: not valid YAML: {str(error).splitlines()[0]}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}:" if mark else ""
        raise TsaeError(f"{path}:{line} not valid YAML: {getattr(error, 'problem', error)}") from None
    if not isinstance(loaded, dict):
        raise TsaeError(f"{path}: a mapping of settings is expected, found {kind_of(loaded)}")
    return loaded


def parse_overrides(assignments: list[str]) -> dict[str, Any]:
    """`["sae.k=40"]` → `{"sae.k": 40}`; values are read as YAML, and the last one of a key counts."""
    flat: dict[str, Any] = {}
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        if not equals or not path:
            raise TsaeError(f"command line: '{assignment}': an override has the form section.key=value")
        try:
            value = yaml.safe_load(text) if text else None
        except (yaml.YAMLError, ValueError, RecursionError):
            raise TsaeError(f"command line: {path}: '{text[:60]}' is not a YAML value") from None
        settings = dict(flatten({path: value}))
        if not settings:
            raise TsaeError(
                f"command line: {path}: {text} names no setting; an override has the form section.key=value"
            )
        flat.update(settings)
    return flat


def flatten(tree: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """`{"sae": {"k": 1}}` and `{"sae.k": 1}` → `("sae.k", 1)`."""
    for key, value in tree.items():
        dotted = f"{path}.{key}" if path else str(key)
        if isinstance(value, Mapping):
            yield from flatten(value, dotted)
        else:
            yield dotted, value


MOST_DIFFERENCES = 8


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """The settings in which two trees differ, with both values: `training.lr is 0.001 there, 0.002 here; …`; empty if none."""
    found, wanted = dict(flatten(there)), dict(flatten(here))
    keys = [key for key in {**wanted, **found} if found.get(key) != wanted.get(key)]
    told = [f"{key} is {_told(found.get(key))} there, {_told(wanted.get(key))} here" for key in keys[:MOST_DIFFERENCES]]
    more = [f"{len(keys) - MOST_DIFFERENCES} more settings differ"] if len(keys) > MOST_DIFFERENCES else []
    return "; ".join([*told, *more])


def _told(value: Any) -> str:
    return "none" if value is None else str(value)


def put(tree: dict[str, Any], path: str, value: Any) -> None:
    """Set the value at a key path, in place; sections that are not there yet are made."""
    *sections, key = path.split(".")
    for section in sections:
        if not isinstance(tree.get(section), dict):
            tree[section] = {}
        tree = tree[section]
    tree[key] = value


def build(cls: type[T], mapping: Any, where: str, path: str = "") -> T:
    """A `cls` from `mapping`; `where` (a file) and `path` (the key path so far) go into errors."""
    if not isinstance(mapping, Mapping):
        raise TsaeError(f"{where}: {path or 'the file'}: a mapping is expected, found {kind_of(mapping)}")
    hints = type_hints(cls)  # type: ignore[arg-type]
    names = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
    values = {}
    for key, value in mapping.items():
        dotted = f"{path}.{key}" if path else str(key)
        if key not in names:
            raise TsaeError(f"{where}: {dotted}: unknown key; {suggestion(key, names)}allowed: {', '.join(names)}")
        values[key] = convert(hints[key], value, where, dotted)
    return cls(**values)


def drop_unknown(cls: type, mapping: dict[str, Any], path: str = "") -> list[str]:
    """Remove the keys that `cls` has not, in place; their key paths."""
    hints, unknown = type_hints(cls), []
    for key in list(mapping):
        dotted = f"{path}.{key}" if path else str(key)
        if key not in hints:
            del mapping[key]
            unknown.append(dotted)
        elif dataclasses.is_dataclass(hints[key]) and isinstance(mapping[key], dict):
            unknown += drop_unknown(hints[key], mapping[key], dotted)
    return unknown


def add_neutral(cls: type, mapping: dict[str, Any]) -> None:
    """Give the settings that came after `mapping` was written the value that means what was before them, in place."""
    for name, hint in type_hints(cls).items():
        if dataclasses.is_dataclass(hint) and isinstance(mapping.get(name), dict):
            add_neutral(hint, mapping[name])  # type: ignore[arg-type]
    for name, mark in _neutral(cls):
        if mark is not None:
            mapping.setdefault(name, mark.neutral)


def convert(hint: Any, value: Any, where: str, path: str) -> Any:
    """`value` as the type `hint`, or a TsaeError that says what is allowed."""
    if dataclasses.is_dataclass(hint):
        return build(hint, value, where, path)  # type: ignore[arg-type]
    origin = get_origin(hint)
    if origin in (types.UnionType, Union):
        return _convert_union(hint, value, where, path)
    if origin is Annotated and not any(isinstance(mark, OneOf) for mark in hint.__metadata__):
        found = convert(get_args(hint)[0], value, where, path)
        for mark in hint.__metadata__:
            if isinstance(mark, Bound) and found is not None and not mark.holds(found):
                if isinstance(found, dict):
                    found = {name: "***" if is_secret_name(str(name)) else entry for name, entry in found.items()}
                shown = str(list(found) if isinstance(found, tuple) else found)
                shown = shown if shown.isprintable() else repr(shown)
                raise TsaeError(f"{where}: {path}: {hide(shown)} is impossible; {mark.words}")
        return found
    if origin in (Literal, Annotated):
        allowed = _allowed(hint)
        if value is False and "no" in allowed:
            return "no"  # YAML 1.1 reads it as a truth value
        if value not in allowed:
            raise TsaeError(
                f"{where}: {path}: {value!r} is not allowed; {suggestion(value, allowed)}allowed: {', '.join(allowed)}"
            )
        return value
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise TsaeError(f"{where}: {path}: a list is expected, found {kind_of(value)}")
        item = get_args(hint)[0]
        return tuple(convert(item, v, where, f"{path}[{i}]") for i, v in enumerate(value))
    if origin is dict:
        if not isinstance(value, Mapping):
            raise TsaeError(f"{where}: {path}: a mapping is expected, found {kind_of(value)}")
        return dict(value)
    return _convert_scalar(hint, value, where, path)


def _allowed(hint: Any) -> list[str]:
    """The values of a `Literal`, or of text that is marked with `OneOf`; none of any other type."""
    if get_origin(hint) is Literal:
        return list(get_args(hint))
    marks = getattr(hint, "__metadata__", ())
    return [name for mark in marks if isinstance(mark, OneOf) for name in mark.table]


def _convert_union(hint: Any, value: Any, where: str, path: str) -> Any:
    options = get_args(hint)
    if value is None and type(None) in options:
        return None
    failures = []
    for option in options:
        if option is type(None):
            continue
        try:
            return convert(option, value, where, path)
        except TsaeError as error:
            failures.append(error)
    # What is refused for its value, not for its kind: of a word the choices are told, of a number its bounds.
    fitting = (_allowed(option) != [] for option in options if option is not type(None))
    raise next(
        (error for error, words in zip(failures, fitting, strict=True) if words == isinstance(value, str)), failures[0]
    )


def _convert_scalar(hint: Any, value: Any, where: str, path: str) -> Any:
    if hint is Any:
        return value
    if hint is float and not isinstance(value, bool):
        # YAML 1.1 reads 3e-4 as a string; nobody who writes it means one.
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if math.isfinite(number):
            return number
    elif hint is int and isinstance(value, (int, float)) and not isinstance(value, bool):
        if math.isfinite(value) and value == int(value):
            if abs(value) >= 2**63:
                raise TsaeError(f"{where}: {path}: {value} is impossible; its size must be below 2^63")
            return int(value)
    elif hint in (bool, str) and isinstance(value, hint):
        return value
    expected = {float: "a number", int: "a whole number", bool: "true or false", str: "text"}[hint]
    raise TsaeError(f"{where}: {path}: {expected} is expected, found {kind_of(value)}")


def kind_of(value: Any) -> str:
    """`value` in the words of a YAML author."""
    if value is None:
        return "nothing"
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, (list, tuple)):
        return "a list"
    return repr(value)


def to_plain(config: Any) -> dict[str, Any]:
    """A config dataclass as YAML-ready dicts, lists and scalars."""
    # `dataclasses.asdict` copies every scalar deeply, which a sweep of a thousand points would wait for.
    names = _names(type(config))  # type: ignore[arg-type]
    plain: dict[str, Any] = {name: _plain(getattr(config, name)) for name in names}
    return plain


def identity(config: Any) -> dict[str, Any]:
    """`to_plain` without the settings that came later and have their neutral value, paths as they were written: what
    hashes are made of."""
    plain = {}
    for name, neutral in _neutral(type(config)):  # type: ignore[arg-type]
        value = getattr(config, name)
        if neutral is not None and value == neutral.neutral:
            continue
        plain[name] = identity(value) if dataclasses.is_dataclass(value) else _plain(value, as_written)
    return plain


@cache
def _neutral(cls: type) -> tuple[tuple[str, Added | None], ...]:
    hints = type_hints(cls)
    marks = {name: getattr(hints[name], "__metadata__", ()) for name in _names(cls)}
    return tuple((name, next((mark for mark in marks[name] if isinstance(mark, Added)), None)) for name in marks)


@cache
def _names(cls: type) -> tuple[str, ...]:
    return tuple(field.name for field in dataclasses.fields(cls))


def _plain(value: Any, scalar: Callable[[Any], Any] = lambda value: value) -> Any:
    if value is None or isinstance(value, (str, int, float)):
        return scalar(value)
    if isinstance(value, dict):
        return {str(key): _plain(item, scalar) for key, item in value.items()}
    return [_plain(item, scalar) for item in value] if isinstance(value, (list, tuple)) else to_plain(value)


@cache
def type_hints(cls: type) -> dict[str, Any]:
    """Field name → its type."""
    return get_type_hints(cls, include_extras=True)


def stable_hash(plain: Any, length: int = 12) -> str:
    """Hex digest of a JSON-able value, independent of key order, process and machine."""
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:length]


@cache
def field_docs(cls: type) -> dict[str, str]:
    """Field name → the string literal that follows the field in the source of `cls`."""
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0].body  # type: ignore[attr-defined]
    docs = {}
    for field, doc in itertools.pairwise(body):
        if (
            isinstance(field, ast.AnnAssign)
            and isinstance(field.target, ast.Name)
            and isinstance(doc, ast.Expr)
            and isinstance(doc.value, ast.Constant)
        ):
            docs[field.target.id] = inspect.cleandoc(str(doc.value.value))
    return docs


class Setting(NamedTuple):
    """One setting, or a section of settings, in the words of a YAML author."""

    path: str
    type: str
    """Empty for a section."""
    default: str
    bound: str
    """Which values are possible, where the type alone does not say it."""
    doc: str


@cache
def places(cls: type) -> dict[str, Place]:
    """Key path → how it is found, of every setting that may name a file or folder."""
    found: dict[str, Place] = {}
    for name, hint in type_hints(cls).items():
        if dataclasses.is_dataclass(hint):
            found |= {f"{name}.{path}": place for path, place in places(hint).items()}  # type: ignore[arg-type]
        for mark in _marks(hint):
            if isinstance(mark, Place):
                found[name] = mark
    return found


def _marks(hint: Any) -> Iterator[Any]:
    """What stands in the annotations of a type and of its parts."""
    yield from getattr(hint, "__metadata__", ())
    for part in get_args(hint):
        yield from _marks(part)


def settings(cls: type, path: str = "") -> Iterator[Setting]:
    """Every setting of a dataclass and of the sections in it; a section comes before its own."""
    hints = type_hints(cls)
    for field in dataclasses.fields(cls):
        dotted = f"{path}.{field.name}" if path else field.name
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint):
            yield Setting(dotted, "", "", "", (hint.__doc__ or "").splitlines()[0])
            yield from settings(hint, dotted)  # type: ignore[arg-type]
            continue
        default = field.default
        if default is dataclasses.MISSING:
            default = field.default_factory() if field.default_factory is not dataclasses.MISSING else "required"
        yield Setting(dotted, type_name(hint), _shown(default), "; ".join(_bounds(hint)), field_docs(cls)[field.name])


def _bounds(hint: Any) -> Iterator[str]:
    """The words of every bound in a type; of a list's items too."""
    for part in get_args(hint):
        if isinstance(part, Bound):
            yield part.words
        elif get_origin(hint) is not Literal:
            yield from (f"each: {words}" if get_origin(hint) is tuple else words for words in _bounds(part))


def describe(cls: type) -> Iterator[str]:
    """Lines of `--help`: every key path with its type, default and documentation."""
    for setting in settings(cls):
        if not setting.type:
            yield f"\n{setting.path}: {setting.doc}"
            continue
        yield f"  {setting.path} ({setting.type}; default {setting.default})"
        yield textwrap.indent(textwrap.fill(setting.doc, 96), "      ")


def describe_in_markdown(cls: type) -> Iterator[str]:
    """The same in tables, one for each section, with the bounds."""
    for setting in settings(cls):
        if not setting.type:
            yield f"\n{'#' * (2 + setting.path.count('.'))} {setting.path}\n\n{setting.doc}\n"
            yield "| Setting | Value | Default | Meaning |\n|---|---|---|---|"
            continue
        value = f"{setting.type}; {setting.bound}" if setting.bound else setting.type
        yield markdown_row(f"`{setting.path}`", value, f"`{setting.default}`", setting.doc)


def markdown_row(*cells: str) -> str:
    """One row of a table."""
    return f"| {' | '.join(' '.join(cell.split()).replace('|', chr(92) + '|') for cell in cells)} |"


def _shown(default: Any) -> str:
    if default is None:
        return "none"
    return json.dumps(default) if isinstance(default, (bool, tuple, list, dict)) else str(default)


def type_name(hint: Any) -> str:
    """A type in the words of a YAML author: `a|b`, `number`, `list of number`."""
    origin = get_origin(hint)
    if origin in (types.UnionType, Union):
        return " or ".join(type_name(option) for option in get_args(hint))
    if origin is Annotated and not _allowed(hint):
        return type_name(get_args(hint)[0])
    if origin in (Literal, Annotated):
        return "|".join(_allowed(hint))
    if origin is tuple:
        return f"list of {type_name(get_args(hint)[0])}"
    names = {float: "number", int: "integer", bool: "true|false", str: "text", type(None): "none"}
    return names.get(hint, "mapping")
