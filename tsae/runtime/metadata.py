"""The one way in which small files of ours are written and read: with a shape, and a digest of their own content.

    write(path, value)             `value` as JSON; its last entry "digest" is a hash of the text around it
    read(path, SHAPE, remedy)      the value, or a TsaeError in one line: the file, what is wrong, what mends it
    whole(path, SHAPE)             the value, or nothing where there is none or it is damaged: of what can be made again
    line, record, records          the same for files that grow line by line
    sealed, require                the same for a mapping of ours in another program's file

A file of an earlier version has no digest and goes by its shape alone; so does one from which somebody took the digest,
having changed it on purpose. Other programs pass that key over. A shape says what a value must be:

    str  int  float  bool  dict  list             of that type; a float is any finite number
    Real                                          any number, NaN too
    object                                        anything
    None                                          nothing
    range(1, 9)                                   one of these whole numbers
    {"a", "b"}                                    one of these words
    (A, B)                                        one of these shapes
    [A]  [A, 3]                                   a list of A; of three of them
    {"name": A, "other?": B}                      a mapping with these keys, of which `other` may be missing, and any others
    {str: A}                                      a mapping with values A
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Iterator, Mapping
from numbers import Real
from pathlib import Path
from typing import Any

from tsae.runtime import files
from tsae.runtime.errors import TsaeError

DIGEST = "digest"
NATURAL, COUNT = range(2**63), range(1, 2**63)
"""Shapes: whole numbers from 0, and from 1."""
UNFIT = "damaged or edited: its content does not fit its digest"
RESTORE = "restore it from a copy"
"""What mends a file that nothing makes again."""

ENTRIES = "entries"
"""Where the list is that a file is about; in files of earlier versions it is all there is."""
DIGITS = 16
_END = re.compile(rb'"digest": "([0-9a-f]{16})"\n?\}$')
_YAML_LINE = re.compile(rf"^{DIGEST}: '?([^'\n]*)'?\n", re.MULTILINE)
_WORDS: dict[Any, str] = {
    **{str: "text", int: "a whole number", float: "a finite number", bool: "true or false", None: "null"},
    **{dict: "a mapping", list: "a list", Real: "a number"},
}


def write(path: str | Path, value: Mapping[str, Any]) -> None:
    """Write `value` as indented JSON with its digest, atomically."""
    files.write_text(path, text_of(value))


def text_of(value: Mapping[str, Any]) -> str:
    """What `write` writes."""
    return _closed(json.dumps({**value, DIGEST: ""}, indent=2)) + "\n"


def read(path: Path, shape: Any, remedy: str = "") -> dict[str, Any]:
    """The mapping in a JSON file, without its digest. Raises TsaeError if it is missing, damaged, edited or of another shape."""
    found = _found(path, shape)
    if isinstance(found, str):
        raise TsaeError(f"{path}: {found}; {remedy or _restored(found)}")
    return found


def present(path: Path, shape: Any, remedy: str = "") -> dict[str, Any]:
    """What `read` gives; empty where there is no file."""
    return read(path, shape, remedy) if path.exists() else {}


def whole(path: Path, shape: Any = dict) -> dict[str, Any]:
    """The mapping in a JSON file that can be made again; empty where there is none or it is not what was written."""
    found = _found(path, shape)
    return {} if isinstance(found, str) else found


def damage(path: Path, shape: Any = dict) -> str:
    """In words, what is wrong with a JSON file that is there; nothing if all is well."""
    found = _found(path, shape) if path.exists() else {}
    return found if isinstance(found, str) else ""


def _found(path: Path, shape: Any) -> dict[str, Any] | str:
    """The mapping in a JSON file without its digest, or in words why there is none."""
    try:
        return _opened(path.read_bytes().rstrip(), shape)
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"


def line(record: Mapping[str, Any]) -> bytes:
    """A record as one line of a file that grows, with its digest."""
    return f"{_closed(json.dumps({**record, DIGEST: ''}, ensure_ascii=False))}\n".encode()


def record(text: bytes, shape: Any = dict) -> dict[str, Any] | None:
    """The record in such a line; None if it is damaged, edited or of another shape."""
    found = _opened(text.rstrip(b"\n"), shape)
    return None if isinstance(found, str) else found


def records(path: Path, shape: Any = dict) -> tuple[list[dict[str, Any]], list[int]]:
    """The records in a file of lines, and the numbers of the lines that are damaged; none of either if there is no file.

    A last line without its end is that of a process that was killed, and passed over.
    """
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    found = [record(text, shape) for text in lines]
    return [one for one in found if one is not None], [n for n, one in enumerate(found, start=1) if one is None]


def sealed(value: Mapping[str, Any]) -> dict[str, Any]:
    """`value` as plain JSON with its digest, for a file that another program writes and may write again."""
    plain = without_digest(json.loads(json.dumps(value)))
    return {**plain, DIGEST: _digest_of(plain)}


def require(value: Any, shape: Any, where: str, remedy: str = "") -> dict[str, Any]:
    """The mapping that `sealed` gave, without its digest. Raises TsaeError for one that is not what was written."""
    wrong = _fault(value, shape, isinstance(value, dict) and value.get(DIGEST) == _digest_of(without_digest(value)))
    if wrong:
        raise TsaeError(f"{where}: {wrong}; {remedy or _restored(wrong)}")
    return without_digest(value)


def sealed_yaml(text: str) -> str:
    """The lines of a YAML file with their digest as the second one, so that no end of them can be lost unseen."""
    first, end, rest = text.partition("\n")
    return f"{first}{end}{DIGEST}: '{_hash(text.encode())}'\n{rest}"


def yaml_fault(text: str) -> str:
    """In words, why this is not what `sealed_yaml` gave; nothing if it is, or has no digest."""
    line = _YAML_LINE.search(text)
    fits = line is None or line[1] == _hash((text[: line.start()] + text[line.end() :]).encode())
    return "" if fits else f"{UNFIT}; {_restored(UNFIT)}"


def without_digest(value: Mapping[str, Any]) -> dict[str, Any]:
    """A mapping but for its digest."""
    return {key: entry for key, entry in value.items() if key != DIGEST}


def misfit(value: Any, shape: Any, path: str = "") -> str:
    """In words, the first place at which a value has not the shape; nothing if it has it."""
    if isinstance(shape, tuple):
        wrong = [misfit(value, each, path) for each in shape]
        return "" if "" in wrong else wrong[-1]  # where nothing is possible, that stands first
    if isinstance(shape, dict) and isinstance(value, dict):
        return next(filter(None, _of_entries(value, shape, path)), "")
    if isinstance(shape, list) and isinstance(value, list):
        if shape[1:] not in ([], [len(value)]):
            return f"{path}: a list of {shape[1]} is expected, found one of {len(value)}"
        return next(filter(None, (misfit(item, shape[0], f"{path}[{i}]") for i, item in enumerate(value))), "")
    return "" if _is(value, shape) else f"{path or 'the file'}: {_expected(shape)} is expected, found {_shown(value)}"


def _of_entries(value: dict[str, Any], shape: dict[Any, Any], path: str) -> Iterator[str]:
    for key, each in shape.items():
        for name in value if key is str else [key.removesuffix("?")]:
            dotted = f"{path}.{name}" if path else name
            if name in value:
                yield misfit(value[name], each, dotted)
            elif not key.endswith("?"):
                yield f"{dotted} is missing"


def _is(value: Any, shape: Any) -> bool:
    if shape is None or isinstance(shape, (dict, list)):  # mappings and lists were compared part by part
        return shape is None and value is None
    if isinstance(value, bool):
        return shape in (bool, object)
    if isinstance(shape, (range, set)):
        return isinstance(value, int if isinstance(shape, range) else str) and value in shape
    if shape is float:  # whole numbers too, however large, but no NaN
        return isinstance(value, (int, float)) and abs(value) <= sys.float_info.max
    return isinstance(value, shape)


def _expected(shape: Any) -> str:
    if isinstance(shape, set):
        return f"one of {', '.join(sorted(shape))}"
    if isinstance(shape, range):
        return f"a whole number from {shape.start}"
    return _WORDS[type(shape) if isinstance(shape, (dict, list)) else shape]


def _shown(value: Any) -> str:
    if isinstance(value, (dict, list)):
        return _WORDS[type(value)]
    text = repr(value)
    return text if len(text) < 60 else f"{text[:56]}…"


def _restored(wrong: str) -> str:
    return f"{RESTORE}, or take its entry `digest` out if it was changed on purpose" if wrong == UNFIT else RESTORE


def _fault(value: Any, shape: Any, digest_fits: bool) -> str:
    """In words, why this is not the mapping that was written; nothing if it is."""
    if isinstance(value, dict) and DIGEST in value:
        if not digest_fits:
            return UNFIT
        value = without_digest(value)
    wrong = misfit(value, shape)
    return f"damaged: {wrong}" if wrong else ""


def _closed(text: str) -> str:
    """The JSON text of a mapping whose digest is still empty, with it."""
    begin, _, end = text.rpartition('""')
    return f'{begin}"{_hash(text.encode())}"{end}'


def _opened(text: bytes, shape: Any) -> dict[str, Any] | str:
    """The mapping in such a text without its digest, or in words what is wrong with it."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        return f"damaged: not valid JSON in line {error.lineno}: {error.msg}"
    except (ValueError, RecursionError):
        return "damaged: not valid JSON"
    if isinstance(value, list) and isinstance(shape, dict) and ENTRIES in shape:
        value = {ENTRIES: value}
    end = _END.search(text)
    fits = end is not None and _hash(text[: end.start(1)] + text[end.end(1) :]) == end[1].decode()
    return _fault(value, shape, fits) or without_digest(value)


def _digest_of(plain: dict[str, Any]) -> str:
    return _hash(json.dumps(plain, sort_keys=True, separators=(",", ":")).encode())


def _hash(text: bytes) -> str:
    return hashlib.sha256(text).hexdigest()[:DIGITS]
