"""A small chat endpoint on this machine, which shows the faults that real ones have."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Server(ThreadingHTTPServer):
    """A chat endpoint that answers what `says` makes of a request, after the faults it was told to show.

    It answers 400 with what `refuses` says to a request that has one of its parameters, and thinks for `thoughts` tokens
    before it says a word.

    Faults: a status, `429 <seconds to wait>`, `slow`, `hang`, `cut` (fewer bytes than promised), `broken` (half a JSON
    text), `empty` (JSON of another form), `babble` (no end before the limit), `filtered` (no text at all), and the empty
    string for none.
    """

    daemon_threads = True

    def __init__(self, says: Callable[[dict[str, Any]], str]) -> None:
        super().__init__(("127.0.0.1", 0), _Chat)
        self.says = says
        self.base_url = f"http://127.0.0.1:{self.server_address[1]}/v1"
        self.faults: list[str] = []
        self.refuses: dict[str, str] = {}
        self.thoughts = 0
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.times: list[float] = []
        self.at_once, self.most_at_once = 0, 0
        self.lock = threading.Lock()
        self._thread = threading.Thread(target=self.serve_forever, args=(0.02,))

    def __enter__(self) -> Server:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self._thread.join()
        self.server_close()


class _Chat(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.requests.append(body)
            self.server.keys.append(self.headers["Authorization"])
            self.server.times.append(time.monotonic())
            fault = self.server.faults.pop(0) if self.server.faults else ""
            self.server.at_once += 1
            self.server.most_at_once = max(self.server.most_at_once, self.server.at_once)
        try:
            text = self.server.says(body)
            time.sleep({"slow": 0.05, "hang": 1.5}.get(fault, 0))
        finally:
            # Before a byte is sent: a client that has its answer may ask again before this thread goes on.
            with self.server.lock:
                self.server.at_once -= 1
        refused = next((name for name in self.server.refuses if name in body), None)
        limit = body.get("max_tokens", body.get("max_completion_tokens"))
        if refused is not None:
            self._send(400, json.dumps({"error": {"message": self.server.refuses[refused], "param": refused}}))
        elif limit is not None and limit <= self.server.thoughts:
            self._respond(None, fault, "length")
        else:
            self._respond(text, fault)

    def _respond(self, text: str | None, fault: str, ended: str = "stop") -> None:
        choice = {"message": {"role": "assistant", "content": text}, "finish_reason": ended}
        good = json.dumps({"choices": [choice]})
        match fault.split():
            case [] | ["slow"]:
                self._send(200, good)
            case ["hang"]:
                return
            case ["cut"]:
                self._send(200, good[:20], length=len(good))
            case ["broken"]:
                self._send(200, good[:20])
            case ["babble"]:
                self._respond(f"{text} and", "", "length")
            case ["filtered"]:
                self._respond(None, "", "content_filter")
            case ["empty"]:
                self._send(200, '{"choices": []}')
            case ["429", *wait]:
                self._send(429, '{"error": {"message": "slow down"}}', {"Retry-After": wait[0]} if wait else {})
            case ["302"]:
                self._send(302, "", {"Location": "http://127.0.0.1:9/elsewhere"})
            case [status]:
                self._send(int(status), '{"error": {"message": "no luck\\ntoday"}}')

    def _send(self, status: int, text: str, headers: dict[str, str] | None = None, length: int | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(text) if length is None else length))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: object) -> None:
        """Keep the test's output clean."""
