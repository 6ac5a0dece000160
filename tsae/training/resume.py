"""Resumable states of a run: copied off the training device, written by a thread, and whole or not there at all.

    resume/step_<n>/state.pt     everything a bit-exact continuation needs
    resume/step_<n>/state.json   its size and checksum, and what it belongs to; written after it
    resume/latest                the newest state's folder; moved after that state is on the disk

A process may die anywhere in between: states after `latest`, and those that their checksum does not confirm, do not count.
"""

from __future__ import annotations

import logging
import random
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tsae.runtime import files, metadata
from tsae.runtime.checksums import Checksum, checksum_of
from tsae.runtime.errors import TsaeError
from tsae.runtime.metadata import NATURAL
from tsae.runtime.space import free_on_gpu
from tsae.runtime.streams import stream_for

PREFIX = "step_"
RECORD = {"bytes": NATURAL, "crc32c": NATURAL, "belongs_to": {str: str}}
PASSABLE = ("version of tsae", "version of torch")
"""Of what a state depends on, what may be another: the training then goes on, to rounding and other random numbers."""

MOST_OF_FREE = 0.5
"""Share of a GPU's free memory that a copy of the state may take for a moment."""

log = logging.getLogger("tsae")


class Damaged(Exception):
    """A state that is not what was written."""


class ResumeStates:
    """The states in the folder `path`, of which the newest `keep` stay.

    `belongs_to` says what the states of this run depend on, in words and values; one that was saved under other
    values is refused. At most one state is being written at a time.
    """

    def __init__(self, path: Path, belongs_to: Mapping[str, str], keep: int) -> None:
        self.path, self.newest = path, -1
        self._belongs_to, self._keep = dict(belongs_to), keep
        self._copy: Any = None
        self._writer = ThreadPoolExecutor(1, "resume")
        self._writing: Future[None] | None = None

    def load(self, inexact: bool = False) -> dict[str, Any] | None:
        """The newest whole state, or None; its entry `inexact` says in words where this run went on with other versions.

        Raises TsaeError for a state of another run or configuration, and for one of another version unless `inexact`.
        """
        state, counted = None, self._counted()
        for n, folder in enumerate(counted, start=1):
            try:
                state = self._read(folder, inexact)
            except Damaged as damage:
                instead = (
                    "the state before it is taken" if n < len(counted) else "no other is left: training begins again"
                )
                log.warning("%s: %s; %s", folder, damage, instead)
                continue
            self.newest = _step(folder)
            break
        return state

    def remove_leftovers(self) -> None:
        """Remove what a killed process left besides the loaded state and those before it."""
        for leftover in self._folders():
            if _step(leftover) > self.newest:
                shutil.rmtree(leftover)

    def save(self, step: int, state: dict[str, Any], first: Callable[[], object]) -> None:
        """Copy `state`, as it is before update `step`, and write it in the background after calling `first` there.

        Waits for the state before it, if that is still being written. Raises TsaeError if that failed.
        """
        self.wait()
        self._copy, there = _begin_host_copy(state, self._copy)
        self._writing = self._writer.submit(self._write, step, self._copy, first, there)
        self.newest = step

    @property
    def busy(self) -> bool:
        """Whether a state is being written: `save` would have to wait."""
        return self._writing is not None and not self._writing.done()

    def wait(self) -> None:
        """Return when nothing is being written. Raises TsaeError if the last state could not be."""
        writing, self._writing = self._writing, None
        if writing is None:
            return
        try:
            writing.result()
        except (OSError, RuntimeError) as error:
            raise TsaeError(f"{self.path}: a resumable state could not be written: {error}") from error

    def raise_failure(self) -> None:
        """Raise TsaeError if the last state is known to have failed; does not wait."""
        if not self.busy:
            self.wait()

    def close(self) -> None:
        """No more states will be written."""
        self.wait()
        self._writer.shutdown()

    def _write(
        self, step: int, state: dict[str, Any], first: Callable[[], object], there: Callable[[], None] | None
    ) -> None:
        if there is not None:
            there()
        first()
        folder = self.path / f"{PREFIX}{step}"
        checksum = Checksum()
        # The format's own checksums would take a third of the time, and say nothing that this one does not.
        files.write_atomically(folder / "state.pt", lambda stream: checksum.save(state, stream, zip_checksums=False))
        record = {"bytes": checksum.bytes, "crc32c": checksum.value, "belongs_to": self._belongs_to}
        metadata.write(folder / "state.json", record)
        files.sync_folder(self.path)
        files.write_text(self.path / "latest", folder.name)
        for stale in self._folders()[self._keep :]:
            shutil.rmtree(stale)

    def _read(self, folder: Path, inexact: bool) -> dict[str, Any]:
        path, changes = folder / "state.pt", []
        try:
            record = metadata.read(folder / "state.json", RECORD, "it does not count")
            length = path.stat().st_size
            if length != record["bytes"]:
                raise Damaged(f"state.pt is damaged: {length} bytes instead of {record['bytes']}")
            if checksum_of(path) != record["crc32c"]:
                raise Damaged("state.pt is damaged: its checksum does not fit")
        except (OSError, TsaeError) as error:
            raise Damaged(f"not readable ({error})") from None
        for name, now in self._belongs_to.items():
            then = record["belongs_to"].get(name)
            if then == now:
                continue
            if not (inexact and name in PASSABLE):
                anyway = " continue all the same with --inexact," if name in PASSABLE else ""
                raise TsaeError(
                    f"{folder}: saved with another {name} ({then}, now {now}), so it cannot be continued exactly; "
                    f"go back to that,{anyway} or remove {self.path} to begin again"
                )
            changes.append(f"from step {_step(folder)} with another {name} ({then}, then {now})")
        # Mapped: of moments that processes share out, each reads its part alone.
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return {**state, "inexact": [*state.get("inexact", []), *changes]}

    def _counted(self) -> list[Path]:
        """Folders of the states up to `latest`, newest first."""
        latest, folders = self.path / "latest", self._folders()
        if not latest.exists():
            return []
        pointed = self.path / latest.read_text(errors="replace").strip()
        if not _is_state(pointed):
            log.warning("%s: names no state; the newest whole one is taken", latest)
            return folders
        return [folder for folder in folders if _step(folder) <= _step(pointed)]

    def _folders(self) -> list[Path]:
        """Folders of all states, newest first."""
        return sorted(filter(_is_state, self.path.glob(f"{PREFIX}*")), key=_step, reverse=True)


def _is_state(folder: Path) -> bool:
    return folder.name.startswith(PREFIX) and folder.name.removeprefix(PREFIX).isdecimal()


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix(PREFIX))


def _begin_host_copy(state: dict[str, Any], spare: Any) -> tuple[Any, Callable[[], None] | None]:
    """`state`, as it is now, in host memory, and what returns once it is there, for another thread; None: it is.

    On a GPU it is copied within its memory first, in a thousandth of the time that it takes to leave it; from there it
    leaves while training goes on. Where there is no room for that, training waits.
    """
    on_gpu = [tensor for tensor in _tensors(state) if tensor.is_cuda]
    if not on_gpu:
        return _host_copy(state, spare), None
    device = on_gpu[0].device
    taken: dict[int, Tensor] = {}
    if sum(tensor.nbytes for tensor in on_gpu) <= MOST_OF_FREE * free_on_gpu(device):
        with suppress(torch.OutOfMemoryError):  # what is free may lie in pieces
            taken = {id(tensor): tensor.detach().clone() for tensor in on_gpu}
    if not taken:
        copy = _host_copy(state, spare)
        torch.cuda.synchronize(device)
        return copy, None
    stream = stream_for("states", device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        copy = _host_copy(state, spare, taken)

    def there() -> None:
        stream.synchronize()
        taken.clear()  # not only when all is on the disk

    return copy, there


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for entry in value.values() if isinstance(value, dict) else value:
            yield from _tensors(entry)


def _host_copy(value: Any, spare: Any, taken: Mapping[int, Tensor] = MappingProxyType({})) -> Any:
    """`value` with its tensors copied to host memory: that of `spare`, an earlier copy, where it fits.

    `taken` has copies of some of them, by their ids.
    """
    if isinstance(value, Tensor):
        value = taken.get(id(value), value.detach())
        fits = isinstance(spare, Tensor) and (spare.shape, spare.dtype) == (value.shape, value.dtype)
        if not fits or spare.stride() != value.stride():
            spare = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda)
        return spare.copy_(value, non_blocking=True)
    if isinstance(value, dict):
        named = spare if isinstance(spare, dict) else {}
        return {key: _host_copy(entry, named.get(key), taken) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        spares = spare if isinstance(spare, (list, tuple)) and len(spare) == len(value) else [None] * len(value)
        return type(value)(_host_copy(entry, before, taken) for entry, before in zip(value, spares, strict=True))
    return value


def random_state() -> dict[str, Any]:
    """State of the generators of torch (all devices), numpy and Python."""
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [name, torch.from_numpy(np.asarray(keys, np.int64)), int(position), int(has_gauss), float(gauss)],
        "python": random.getstate(),
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Continue every generator from what `random_state()` returned; GPUs only where there are as many as then."""
    torch.set_rng_state(state["torch"])
    if len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    name, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    random.setstate(state["python"])
