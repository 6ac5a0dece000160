"""Headless Chromium, spoken to over its debugging pipe: opens a page, runs scripts in it, types like a person."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Any

PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "chrome")


def find_chromium() -> str | None:
    """The browser's program, or None."""
    return next((found for name in PROGRAMS if (found := shutil.which(name))), None)


class Browser:
    """One page of a browser of its own; leaving the block ends it."""

    def __init__(self, program: str, profile: Path, size: tuple[int, int] = (1400, 900)) -> None:
        from_us, self._write = os.pipe()
        self._read, to_us = os.pipe()
        options = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--hide-scrollbars",
            "--remote-debugging-pipe",
            f"--user-data-dir={profile}",
            f"--window-size={size[0]},{size[1]}",
        ]
        # The browser reads from descriptor 3 and writes to descriptor 4.
        command = ["bash", "-c", f'exec "$@" 3<&{from_us} 4>&{to_us}', "bash", program, *options]
        self._process = subprocess.Popen(command, pass_fds=(from_us, to_us), stderr=subprocess.DEVNULL)
        os.close(from_us)
        os.close(to_us)
        self._numbers, self._pending, self._session = itertools.count(1), b"", ""
        self.requests: list[str] = []
        target = self._ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime"):
            self._ask(f"{domain}.enable")

    def __enter__(self) -> Browser:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.terminate()
        self._process.wait(30)
        os.close(self._read)
        os.close(self._write)

    def open(self, path: Path, address: str = "", ready: str = "document.documentElement?.dataset?.ready") -> None:
        """Open a file, and wait until it says that it is ready, or `ready` is true of one that says nothing."""
        self._ask("Page.navigate", url="about:blank")
        self._ask("Page.navigate", url=f"{path.as_uri()}{address}")
        self._wait(ready)

    def reload(self, ready: str = "document.documentElement?.dataset?.ready") -> None:
        """The same file once more, in the process that has it: another one may not know yet what this one has stored."""
        self.run("window.before = true")
        self._ask("Page.reload")
        self._wait(f"!window.before && ({ready})")

    def _wait(self, ready: str) -> None:
        until = time.monotonic() + 60
        while not self.run(ready):
            assert time.monotonic() < until, self.run("document.body.innerText")
            time.sleep(0.02)

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression, a promise's once it is there."""
        answer = self._ask("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def type(self, text: str) -> None:
        """Type into whatever has the focus."""
        for letter in text:
            self._ask("Input.dispatchKeyEvent", type="keyDown", text=letter)
            self._ask("Input.dispatchKeyEvent", type="keyUp")

    def press(self, key: str) -> None:
        """Press a key that writes nothing."""
        written = {"text": "\r"} if key == "Enter" else {}
        self._ask("Input.dispatchKeyEvent", type="keyDown", key=key, **written)
        self._ask("Input.dispatchKeyEvent", type="keyUp", key=key)

    def set_media(self, name: str, value: str) -> None:
        """Answer the media feature `name` with `value`, as a system with that preference does."""
        self._ask("Emulation.setEmulatedMedia", features=[{"name": name, "value": value}])

    def click(self, selector: str) -> None:
        """Click into the middle of an element."""
        box = self.run(
            f"(({{x, y, width, height}}) => [x + width / 2, y + height / 2])({_element(selector)}.getBoundingClientRect())"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self._ask("Input.dispatchMouseEvent", type=kind, x=box[0], y=box[1], button="left", clickCount=1)

    def _ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("method") == "Network.requestWillBeSent":
                self.requests.append(answer["params"]["request"]["url"])
            if answer.get("id") == number:
                assert "error" not in answer, answer["error"]
                result: dict[str, Any] = answer["result"]
                return result

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._pending:
            received = os.read(self._read, 1 << 16)
            assert received, "the browser has ended"
            self._pending += received
        message, _, self._pending = self._pending.partition(b"\0")
        found: dict[str, Any] = json.loads(message)
        return found


def _element(selector: str) -> str:
    return f"document.querySelector({json.dumps(selector)})"
