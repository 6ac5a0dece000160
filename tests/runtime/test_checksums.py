"""Files of torch that several threads write, each with the checksums that were asked for."""

from __future__ import annotations

import io
import zipfile
from threading import Event, Thread
from typing import Any

import torch

from tsae.runtime.checksums import Checksum


class Held(io.BytesIO):
    """Waits, at its first byte, until it may go on."""

    def __init__(self) -> None:
        super().__init__()
        self.begun, self.may_go_on = Event(), Event()

    def write(self, data: Any) -> int:
        self.begun.set()
        assert self.may_go_on.wait(60)
        return super().write(data)


def checksums_of(stream: io.BytesIO) -> list[int]:
    return [each.CRC for each in zipfile.ZipFile(stream).infolist()]


def test_weights_that_are_saved_while_a_state_is_written_have_their_checksums() -> None:
    state, weights, value = Held(), io.BytesIO(), {"weights": torch.arange(1000)}
    writing = [
        Thread(target=Checksum().save, args=(value, state, False)),
        Thread(target=Checksum().save, args=(value, weights)),
    ]
    writing[0].start()
    assert state.begun.wait(60)
    writing[1].start()
    writing[1].join(0.2)  # it waits for the other, or is done already
    state.may_go_on.set()
    for thread in writing:
        thread.join()
    assert zipfile.ZipFile(weights).testzip() is None
    assert not any(checksums_of(state))
    assert all(checksums_of(weights))
    assert torch.equal(torch.load(io.BytesIO(state.getvalue()))["weights"], value["weights"])


def test_length_and_checksum_are_those_of_the_file() -> None:
    import google_crc32c

    checksum, stream = Checksum(), io.BytesIO()
    checksum.save(torch.arange(10), stream)
    assert (checksum.bytes, checksum.value) == (len(stream.getvalue()), google_crc32c.value(stream.getvalue()))
