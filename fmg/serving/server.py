"""A bound HTTP server: its connections, its address, and how it stops."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from fmg.core.errors import UsageError, reason
from fmg.core.events import Notice, Observer, ignore
from fmg.core.signals import exit_code
from fmg.serving.app import RefusedError, log

ErrorBody = Callable[[RefusedError], object]

_MAX_PORT = 65535
# asyncio accepts a whole backlog of connections at once, before any of them can be refused
_BACKLOG = 128
_MAX_CONNECTIONS = 4096
# Headers are small, so a client sends them at once.
_HEADERS_S = 20.0
# A client that is still sending reads its answer late, and the next request of a connection may take a while.
_KEEP_ALIVE_S = 5.0


class _Connections:
    """The open connections of a server, limited in number and in how long one may go without a complete request.

    A waiting connection has not sent complete headers since it was opened or answered. When there are too many, the one
    that has been waiting longest is closed. So clients that keep connections open shut each other out, not clients with
    a request.

    Args:
        most: maximum number of connections.
        patience: seconds that one may wait.
        reading: seconds that a client may take to read an answer that does not fit the buffers of the system.
        error: the body of an error.
    """

    def __init__(self, most: int, patience: float, reading: float, error: ErrorBody) -> None:
        self.most = most
        self.patience = patience
        self.reading = reading
        self.error = error
        self.waiting: dict[_Connection, asyncio.TimerHandle] = {}

    def protocol(self, **given: Any) -> _Connection:
        """The protocol of a new connection, as uvicorn asks for it."""
        return _Connection(self, **given)


class _Connection(H11Protocol):
    def __init__(self, known: _Connections, **given: Any) -> None:
        super().__init__(**given)
        self._known = known
        self._refused = False
        self._unread: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self._known.most:
            if self._known.waiting:
                next(iter(self._known.waiting))._cut_off()
            else:
                self._refused = True
        self._watch()

    def data_received(self, data: bytes) -> None:
        if self._refused:
            # an answer that is sent before the request would be lost
            self._refuse(503, "The server has too many connections", "Try again later.")
        else:
            super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget()
        self._read()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unread = self.loop.call_later(self._known.reading, self._cut_off)

    def resume_writing(self) -> None:
        self._read()
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        self._refuse(400, msg.rstrip("."), "Send an HTTP/1.1 request.")

    def _refuse(self, status: int, what: str, fix: str) -> None:
        """An error as bytes, where there is no request to answer."""
        body = json.dumps(self._known.error(RefusedError(status, what, fix))).encode()
        head = f"HTTP/1.1 {status} Refused\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
        self.transport.write(f"{head}connection: close\r\n\r\n".encode() + body)
        self.transport.close()

    def _watch(self) -> None:
        """Starts the clock when the connection begins to wait, and stops it when there is a request to answer."""
        if self.transport.is_closing() or not (self.cycle is None or self.cycle.response_complete):
            self._forget()
        elif self not in self._known.waiting:
            self._known.waiting[self] = self.loop.call_later(self._known.patience, self._cut_off)

    def _forget(self) -> None:
        if (timer := self._known.waiting.pop(self, None)) is not None:
            timer.cancel()

    def _read(self) -> None:
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None

    def _cut_off(self) -> None:
        self._forget()
        self.transport.abort()


def _says_something(record: logging.LogRecord) -> bool:
    """Whether a line of uvicorn's log is worth printing: it reports at the end that it cancelled no task, too."""
    return (record.funcName, record.args) != ("shutdown", (0,))


def _descriptors() -> int:
    """Number of files and sockets that this process may have open."""
    if sys.platform == "win32":
        return 2 * _MAX_CONNECTIONS
    import resource

    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 2 * _MAX_CONNECTIONS if soft == resource.RLIM_INFINITY else soft


class Address:
    """A bound socket, whose port is known before the server answers.

    Clients can connect only once it listens, so nobody waits for a server that is still loading. A context manager:
    leaving it closes the socket.

    Args:
        host: address to listen on.
        port: 0 for a free one.

    Raises:
        UsageError: the server cannot listen on it.
    """

    def __init__(self, host: str, port: int) -> None:
        if not 0 <= port <= _MAX_PORT:
            raise UsageError(f"{port} is not a port", f"Give a port from 0 to {_MAX_PORT}.")
        self.socket = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
        try:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self.socket.bind((host, port))
        except OSError as error:
            self.socket.close()
            raise _taken(host, port, error) from None

    def listen(self) -> None:
        """Lets clients connect.

        Raises:
            UsageError: another process has begun to listen there.
        """
        try:
            self.socket.listen(_BACKLOG)
        except OSError as error:
            host, port = self.socket.getsockname()[:2]
            raise _taken(host, port, error) from None

    def __enter__(self) -> Address:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    @property
    def url(self) -> str:
        """Where it listens."""
        host, port = self.socket.getsockname()[:2]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _taken(host: str, port: int, error: OSError) -> UsageError:
    what = f"The server cannot listen on {host}:{port}: {reason(error)}"
    return UsageError(what, "Give another --host or --port.")


class HttpServer:
    """A server that is bound but not serving yet.

    Args:
        app: the application that answers.
        address: where it listens.
        error: the body of an error that no route answers.
        timeout: seconds that a client may take to send its headers, within limits, and to read its answer.
        drain: seconds to finish answers after the server is told to stop.
    """

    def __init__(self, app: FastAPI, address: Address, *, error: ErrorBody, timeout: float, drain: float) -> None:
        self._address = address
        address.listen()
        # the other half is for connections just accepted, and for the files of models
        most = min(_MAX_CONNECTIONS, max(1, _descriptors() // 2))
        connections = _Connections(most, min(max(timeout, _KEEP_ALIVE_S), _HEADERS_S), timeout, error)
        log.addFilter(_says_something)
        self._server = uvicorn.Server(
            uvicorn.Config(
                app,
                http=connections.protocol,  # type: ignore[arg-type]
                backlog=min(_BACKLOG, max(1, most // 2)),
                # every malformed request from anyone would log a warning
                log_level="error",
                access_log=False,
                server_header=False,
                # no answer depends on the client's address
                proxy_headers=False,
                ws="none",
                timeout_graceful_shutdown=drain,  # type: ignore[arg-type]
            )
        )

    @property
    def url(self) -> str:
        """Where it listens."""
        return self._address.url

    def serve(self, observer: Observer = ignore) -> None:
        """Answers until Ctrl-C, SIGTERM or `stop`; then finishes what it has accepted, and refuses everything else."""
        observer(Notice("info", f"Serving on {self.url}"))
        with self._ended_by_sigterm():
            self._server.run(sockets=[self._address.socket])

    def stop(self) -> None:
        """Makes `serve` return, from any thread."""
        self._server.should_exit = True

    @contextmanager
    def _ended_by_sigterm(self) -> Iterator[None]:
        """SIGTERM is the normal way to stop a server, so it is not a failure.

        uvicorn drains the server on it and raises the signal again at the end, for the handler that is set here.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGTERM, lambda *_: self.stop())
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)


LAST_BATCH_S = 5.0
"""Seconds for the running batch to end after clients were cut off."""


@contextmanager
def leaving_work(close: Callable[[float], object]) -> Iterator[None]:
    """Ends the process after the block if a batch is still running, that is if `close(0)` returns False.

    Its thread would abort Python at exit.
    """
    try:
        yield
    finally:
        if close(0) is False:
            os._exit(0 if sys.exc_info()[0] is None else exit_code(signal.SIGINT))
