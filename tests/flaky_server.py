"""A real HTTP server on loopback that serves a folder, and does to each request what a test asks for."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

Fault = Callable[[BaseHTTPRequestHandler, bytes], None]
"""Answers a request for a file, whose content is given."""


def whole(handler: BaseHTTPRequestHandler, body: bytes) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body)


def status(code: int) -> Fault:
    return lambda handler, body: handler.send_error(code)


def other(body: bytes) -> Fault:
    """Another file's content, sent as if nothing were wrong."""
    return lambda handler, _: whole(handler, body)


def drop(handler: BaseHTTPRequestHandler, body: bytes) -> None:
    """The connection breaks after a third."""
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body[: len(body) // 3])


def drop_unnoticed(handler: BaseHTTPRequestHandler, body: bytes) -> None:
    """The connection breaks after a third, and no length was announced."""
    handler.send_response(200)
    handler.end_headers()
    handler.wfile.write(body[: len(body) // 3])


def slow(seconds: float) -> Fault:
    """All of it, in four pieces, over so many seconds."""

    def answer(handler: BaseHTTPRequestHandler, body: bytes) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        for i in range(4):
            handler.wfile.write(body[i * len(body) // 4 : (i + 1) * len(body) // 4])
            handler.wfile.flush()
            time.sleep(seconds / 4)

    return answer


class FlakyServer:
    """Serves `folder` at `url`. `faults[name]` are for the next requests of that file, `always[name]` for all later."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.requests: list[str] = []
        self.faults: dict[str, list[Fault]] = {}
        self.always: dict[str, Fault] = {}
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, self))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}/data"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def count(self, name: str) -> int:
        return self.requests.count(name)

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        name = Path(handler.path).name
        with self._lock:
            self.requests.append(name)
            faults = self.faults.get(name)
            fault = faults.pop(0) if faults else self.always.get(name, whole)
        path = self.folder / name
        if path.is_file():
            fault(handler, path.read_bytes())
        else:
            handler.send_error(404)


class _Handler(BaseHTTPRequestHandler):
    def __init__(self, flaky: FlakyServer, *args: Any) -> None:
        self._flaky = flaky
        super().__init__(*args)

    def do_GET(self) -> None:
        try:
            self._flaky.answer(self)
        except (BrokenPipeError, ConnectionResetError):  # the client had enough
            self.close_connection = True

    def log_message(self, *args: Any) -> None:
        pass
