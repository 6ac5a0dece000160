"""Where a training step spends its time: named phases that cost nothing unless someone records them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ContextDecorator, contextmanager
from types import TracebackType

OTHER = "other"


class PhaseTimes:
    """Seconds of each phase; while a phase runs inside another one, only the inner clock runs."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.seconds: dict[str, float] = {}
        self._clock, self._running, self._since = clock, [OTHER], clock()

    def enter(self, name: str) -> None:
        self._charge()
        self._running.append(name)

    def leave(self) -> None:
        self._charge()
        self._running.pop()

    def _charge(self) -> None:
        now, name = self._clock(), self._running[-1]
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._since
        self._since = now


_recording: PhaseTimes | None = None


class phase(ContextDecorator):
    """Names what runs within it, or within the function that it decorates."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> None:
        if _recording is not None:
            _recording.enter(self.name)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if _recording is not None:
            _recording.leave()


def recording() -> bool:
    """Whether someone records them."""
    return _recording is not None


@contextmanager
def record(clock: Callable[[], float]) -> Iterator[PhaseTimes]:
    """Time the phases of what runs within; all of them, with `other` for the rest, sum to the whole."""
    global _recording
    before, _recording = _recording, PhaseTimes(clock)
    try:
        yield _recording
    finally:
        _recording._charge()
        _recording = before
