"""A web server on loopback that does what a test tells it to, one behaviour for each request."""

from __future__ import annotations

import json
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass(frozen=True)
class Call:
    """One request as it arrived."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes


class Handler(BaseHTTPRequestHandler):
    """Passes each request to the server's `respond`."""

    server: FakeServer  # type: ignore[assignment]

    def do_GET(self) -> None:
        """A request without a body."""
        self._handle()

    def do_HEAD(self) -> None:
        """A request for the headers alone."""
        self._handle()

    def do_POST(self) -> None:
        """A request with a body."""
        self._handle()

    def do_PUT(self) -> None:
        """An upload."""
        self._handle()

    def answer(self, value: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
        """JSON; bytes are sent as they are."""
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def reset(self) -> None:
        """Ends the connection with an RST, as a killed process does."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing."""

    def _handle(self) -> None:
        length = int(self.headers.get("Content-Length", 0))
        call = Call(self.command, self.path, dict(self.headers), self.rfile.read(length))
        with self.server.lock:
            self.server.calls.append(call)
        self.server.respond(self, call)


Respond = Callable[[Handler, Call], None]


class FakeServer(ThreadingHTTPServer):
    """`calls` lists what arrived; `respond` may be replaced at any time."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(self, respond: Respond) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.respond = respond
        self.calls: list[Call] = []
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: object, client_address: object) -> None:
        """Ignores a client that hangs up."""


@contextmanager
def fake_server(respond: Respond) -> Iterator[FakeServer]:
    """A running `FakeServer`."""
    server = FakeServer(respond)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@dataclass
class Script:
    """Behaviours in turn; the last one repeats."""

    steps: list[Respond]
    used: int = field(default=0, init=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False)

    def __call__(self, handler: Handler, call: Call) -> None:
        """The next behaviour."""
        with self._lock:
            step = self.steps[min(self.used, len(self.steps) - 1)]
            self.used += 1
        step(handler, call)
