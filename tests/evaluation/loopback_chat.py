"""A chat-completions endpoint on this machine that says what a test tells it to."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = dict[str, Any] | int | str | float | tuple[int, dict[str, str]]
"""A message, an HTTP status, a raw body, seconds of silence, or a status with headers."""


class LoopbackChat:
    """Serves `/v1/chat/completions`; `reply(body, n)` answers the n-th request, `requests` remembers all."""

    def __init__(self, reply: Callable[[dict[str, Any], int], Reply]) -> None:
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.most_at_once = 0
        self._at_once = 0
        self._lock = threading.Lock()
        self._quit = threading.Event()
        chat = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with chat._lock:
                    chat._at_once += 1
                    chat.most_at_once = max(chat.most_at_once, chat._at_once)
                    number = len(chat.requests)
                    chat.requests.append(body)
                    chat.headers.append(dict(self.headers) | {"path": self.path})
                try:
                    said = reply(body, number)
                    if isinstance(said, float):
                        chat._quit.wait(said)
                finally:
                    # Before the answer leaves: who has it may ask again before this thread goes on.
                    with chat._lock:
                        chat._at_once -= 1
                if not isinstance(said, float):
                    self._answer(said)

            def _answer(self, said: Reply) -> None:
                status, headers, content = 200, {}, b""
                if isinstance(said, dict):
                    finish = said.pop("finish_reason", "stop")
                    choice = {"index": 0, "message": {"role": "assistant", **said}, "finish_reason": finish}
                    content = json.dumps({"choices": [choice], "usage": {"completion_tokens": 7}}).encode()
                elif isinstance(said, str):
                    content = said.encode()
                elif isinstance(said, tuple):
                    status, headers = said
                else:
                    status, content = said, json.dumps({"error": {"message": f"scripted {said}"}}).encode()
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    def __enter__(self) -> LoopbackChat:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._quit.set()
        self._server.shutdown()
        self._server.server_close()
