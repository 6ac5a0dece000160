"""CRC-32C of large files, in pieces."""

from __future__ import annotations

import threading
from contextlib import nullcontext
from pathlib import Path
from typing import Any, BinaryIO

import google_crc32c
import numpy as np

PIECE_BYTES = 2**23
_saving = threading.Lock()


class Checksum:
    """A stream that adds up length and CRC-32C of what passes through it."""

    def __init__(self) -> None:
        self.bytes = self.value = 0

    def over(self, stream: BinaryIO) -> Any:
        """This, writing on to `stream`."""
        self._stream = stream
        return self

    def save(self, value: Any, stream: BinaryIO, zip_checksums: bool = True) -> None:
        """`torch.save` to `stream`, by one thread of this process at a time, with or without the zip format's own checksums.

        Torch 2.11 keeps that choice for all threads at once: a state that was written without left weights that were
        written meanwhile without, too, and `load_dictionary` called those damaged.
        """
        import torch
        from torch.utils.serialization import config

        with _saving, nullcontext() if zip_checksums else config.patch("save.compute_crc32", False):  # type: ignore[attr-defined]
            torch.save(value, self.over(stream))

    def write(self, data: Any) -> int:
        """Write and count."""
        # In pieces, since the checksum keeps every other thread of this process waiting.
        for first in range(0, len(data), PIECE_BYTES):
            piece = data[first : first + PIECE_BYTES]
            self.value = google_crc32c.extend(self.value, np.frombuffer(piece, np.uint8))
            self._stream.write(piece)
        self.bytes += len(data)
        return len(data)

    def flush(self) -> None:
        """Flush what is below."""
        self._stream.flush()


def checksum_of(path: Path, length: int | None = None) -> int:
    """CRC-32C of a file, or of its first `length` bytes."""
    checksum, left = 0, path.stat().st_size if length is None else length
    with path.open("rb") as stream:
        while data := stream.read(min(PIECE_BYTES, left)):
            checksum, left = google_crc32c.extend(checksum, data), left - len(data)
    return int(checksum)
