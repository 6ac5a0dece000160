"""GGUF files: one file with a model's weights, configuration and tokenizer, as llama.cpp uses them.

transformers unpacks them by the package `gguf`. Here only the head of a file is read, quickly and without torch: what it
is, how deep, and whether all of it is there. The format: github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import struct
from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

from tsae.runtime.errors import TsaeError

SUFFIX = ".gguf"
VERSIONS = (2, 3)
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""Types of metadata values, and how `struct` reads them."""
TEXT, ARRAY = 8, 9
MODEL_TYPES = {"gemma3": "gemma3_text"}
"""Architectures that transformers calls otherwise."""
_known: dict[tuple[str, int, int], dict[str, Any]] = {}
"""Heads that this process has read: path, size and time of change."""


def head_of(path: Path) -> dict[str, Any]:
    """The single values and texts of a file's metadata; of an array, its length.

    Raises TsaeError for a file that is no GGUF, was cut off or is one part of several, and where the package is missing
    that unpacks it.
    """
    status = path.stat()
    key = (str(path.absolute()), status.st_size, status.st_mtime_ns)
    if key not in _known:
        with open(path, "rb") as stream:
            if stream.read(4) != b"GGUF":
                raise TsaeError(
                    f"model.name: {path} is no GGUF file; name one, a folder in the hub's format or a hub id"
                )
            if find_spec("gguf") is None:
                raise TsaeError(
                    f'model.name: {path}: reading GGUF files takes another package: pip install "tsae[gguf]"'
                )
            try:
                head, end = _read(stream)
            except (struct.error, ValueError, KeyError, OverflowError, MemoryError, RecursionError, OSError):
                # What stands where a length, a type or a text should: nothing of it can be told.
                head, end = {}, status.st_size + 1
        _require_readable(path, head, end, status.st_size)
        _known[key] = head
    return _known[key]


def config_of(path: Path) -> dict[str, Any]:
    """What a config.json would say of the model: `model_type` and, where they are told, its sizes."""
    head = head_of(path)
    name = head["general.architecture"]
    told = {
        "num_hidden_layers": head.get(f"{name}.block_count"),
        "hidden_size": head.get(f"{name}.embedding_length"),
        "intermediate_size": head.get(f"{name}.feed_forward_length"),
        "vocab_size": head.get("tokenizer.ggml.tokens"),
    }
    return {"model_type": MODEL_TYPES.get(name, name), **{key: said for key, said in told.items() if said is not None}}


def _require_readable(path: Path, head: dict[str, Any], end: int, size: int) -> None:
    version = head.get("version", VERSIONS[-1])
    if version not in VERSIONS:
        raise TsaeError(f"model.name: {path} is a GGUF file of version {version}; versions 2 and 3 can be read")
    parts = head.get("split.count", 1)
    if end > size or not isinstance(head.get("general.architecture"), str) or not isinstance(parts, int):
        raise TsaeError(f"model.name: {path} is damaged or was cut off: copy it again")
    if parts > 1:
        raise TsaeError(
            f"model.name: {path} is one of {parts} parts of a model; join them with llama.cpp's "
            "`llama-gguf-split --merge` and name the whole"
        )


def _read(stream: BinaryIO) -> tuple[dict[str, Any], int]:
    """Version and metadata, and where the last tensor ends; `stream` stands behind the magic."""
    from gguf.constants import GGML_QUANT_SIZES

    version, tensors, values = _unpack(stream, "IQQ")
    head: dict[str, Any] = {"version": version}
    if version not in VERSIONS:
        return head, 0
    for _ in range(values):
        name = _text(stream)
        head[name] = _value(stream, _unpack(stream, "I")[0])
    ends = []
    for _ in range(tensors):
        _text(stream)
        shape = _unpack(stream, f"{_unpack(stream, 'I')[0]}Q")
        kind, offset = _unpack(stream, "IQ")
        block, size = GGML_QUANT_SIZES[kind]
        ends.append(offset + prod(shape) // block * size)
    alignment = head.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1:
        raise ValueError("general.alignment")
    return head, -(-stream.tell() // alignment) * alignment + max(ends, default=0)


def _unpack(stream: BinaryIO, types: str) -> tuple[Any, ...]:
    """Little-endian numbers, next to each other. Raises struct.error at the file's end."""
    return struct.unpack(f"<{types}", stream.read(struct.calcsize(f"<{types}")))


def _text(stream: BinaryIO) -> str:
    size = _unpack(stream, "Q")[0]
    return stream.read(size).decode()


def _value(stream: BinaryIO, kind: int) -> Any:
    if kind == TEXT:
        return _text(stream)
    if kind != ARRAY:
        return _unpack(stream, SCALARS[kind])[0]
    inner, count = _unpack(stream, "IQ")
    if inner in SCALARS:
        stream.seek(count * struct.calcsize(SCALARS[inner]), 1)
    else:
        for _ in range(count):
            _value(stream, inner)
    return count
