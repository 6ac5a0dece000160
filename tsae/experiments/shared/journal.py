"""A stage's records as JSON lines, added while it works: a stage that is interrupted continues after its last record."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tsae.runtime import files, metadata

log = logging.getLogger("tsae")
Record = dict[str, Any]
RECORD = {"latent": metadata.NATURAL}


class Journal:
    """Records by latent in a file whose first line says which settings they were made with.

    A file of other settings is begun anew when the first record is added; to look at one changes nothing. The unfinished
    last line of a process that was killed is dropped, and so are lines that are damaged: what they told is made again.
    """

    def __init__(self, path: Path, stage: str, settings_hash: str) -> None:
        self.path = path
        self._head = {"stage": stage, "hash": settings_hash}
        self.records: dict[int, Record] = {}
        lines, damaged = metadata.records(path)
        if damaged:
            log.warning("%s: damaged in lines %s; they are made again", path, ", ".join(map(str, damaged)))
        if lines and lines[0] == self._head:
            self.records = {line["latent"]: line for line in lines[1:] if not metadata.misfit(line, RECORD)}
        self._whole = False

    def add(self, *records: Record) -> None:
        """Append records, and have them on disk."""
        if not self._whole:
            self._write()
        with open(self.path, "ab") as stream:
            for record in records:
                self.records[int(record["latent"])] = record
                stream.write(metadata.line(record))
            files.sync_stream(stream)

    def replace(self, records: Iterable[Record]) -> None:
        """Have these records instead, all of them or none."""
        self.records = {int(record["latent"]): record for record in records}
        self._write()

    def _write(self) -> None:
        """The file without what does not belong to it."""
        content = b"".join(map(metadata.line, [self._head, *self.records.values()]))
        if not self.path.exists() or self.path.read_bytes() != content:
            files.write_atomically(self.path, lambda stream: stream.write(content))
        self._whole = True
