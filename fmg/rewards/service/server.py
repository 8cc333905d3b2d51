"""Runs the reward server with uvicorn, within bounds on its connections."""

from __future__ import annotations

import asyncio
import ipaddress
import json
import socket
import sys
from collections.abc import Mapping
from typing import Any

import torch
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from fmg.core.errors import UsageError
from fmg.core.events import Notice, Observer, ignore
from fmg.rewards.base import Checked
from fmg.rewards.service.app import create_app
from fmg.rewards.service.batching import Limits

_MAX_PORT = 65535
# asyncio accepts as many connections at once as the backlog is long, before any of them can be refused
_BACKLOG = 128
_MAX_CONNECTIONS = 4096
# A request's headers are small, so a client that sends them has them out at once.
_HEADERS_S = 20.0
# A client that is still sending reads its answer late, and the next request of one connection may be a while away.
_KEEP_ALIVE_S = 5.0
# Answers that are still being written when the server is asked to stop may take this long.
_SHUTDOWN_S = 10


class _Connections:
    """The open connections of a server: how many there may be, and how long one may go without a whole request.

    A connection that is waiting has sent no whole headers since it was opened or answered. When there are too many,
    the one that has been waiting longest is closed, so that clients who hold connections open shut out one another
    and not those who ask something.

    Args:
        most: connections at a time.
        patience: seconds that one may be waiting.
    """

    def __init__(self, most: int, patience: float) -> None:
        self.most = most
        self.patience = patience
        self.waiting: dict[_Connection, asyncio.TimerHandle] = {}

    def protocol(self, **given: Any) -> _Connection:
        """The protocol of a new connection, as uvicorn asks for it."""
        return _Connection(self, **given)


class _Connection(H11Protocol):
    def __init__(self, known: _Connections, **given: Any) -> None:
        super().__init__(**given)
        self._known = known
        self._refused = False

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
            # an answer before the question would be lost
            self.transport.write(_refusal(503, "The server has too many connections", "Ask again later."))
            self.transport.close()
        else:
            super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        self.transport.write(_refusal(400, msg.rstrip("."), "Send an HTTP/1.1 request."))
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

    def _cut_off(self) -> None:
        self._forget()
        self.transport.abort()


def _refusal(status: int, what: str, fix: str) -> bytes:
    """An error of `fmg.rewards.service.app` as bytes, where there is no request to answer."""
    body = json.dumps({"error": {"what": what, "fix": fix}}).encode()
    head = f"HTTP/1.1 {status} Refused\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
    return f"{head}connection: close\r\n\r\n".encode() + body


def _descriptors() -> int:
    """How many files and sockets this process may have open."""
    if sys.platform == "win32":
        return 2 * _MAX_CONNECTIONS
    import resource

    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 2 * _MAX_CONNECTIONS if soft == resource.RLIM_INFINITY else soft


class RewardServer:
    """A bound but not yet serving server; the port is known before the first request.

    Args:
        rewards: what it scores, by name.
        info: what `/info` says of them.
        host: address to listen on.
        port: 0 for a free one.
        limits: what it accepts.
        token: needed by clients; required unless `host` is a loopback address.
        device: where pictures are scored.

    Raises:
        UsageError: an address other machines can reach without a token, or one that cannot be listened on.
    """

    def __init__(
        self,
        rewards: Mapping[str, Checked],
        info: Mapping[str, object],
        *,
        host: str,
        port: int,
        limits: Limits,
        token: str | None,
        device: torch.device,
    ) -> None:
        if token is None and not is_loopback(host):
            raise UsageError(
                f"Other machines can reach the address {host}, and there is no token",
                "Set a token (FMG_REWARD_TOKEN), or listen on 127.0.0.1.",
            )
        self._socket = _listen(host, port)
        app = create_app(rewards, info, limits, token=token, device=device)
        # what is left is for those that were just accepted, and for the files of rewards
        most = min(_MAX_CONNECTIONS, max(1, _descriptors() // 2))
        connections = _Connections(most, min(max(limits.timeout, _KEEP_ALIVE_S), _HEADERS_S))
        self._server = uvicorn.Server(
            uvicorn.Config(
                app,
                http=connections.protocol,  # type: ignore[arg-type]
                backlog=min(_BACKLOG, max(1, most // 2)),
                # each malformed request of a stranger would be a warning
                log_level="error",
                access_log=False,
                server_header=False,
                ws="none",
                timeout_graceful_shutdown=_SHUTDOWN_S,
            )
        )

    @property
    def url(self) -> str:
        """Where it listens."""
        host, port = self._socket.getsockname()[:2]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def serve(self, observer: Observer = ignore) -> None:
        """Answers until Ctrl-C or `stop`."""
        observer(Notice("info", f"Serving on {self.url}"))
        self._server.run(sockets=[self._socket])

    def stop(self) -> None:
        """Makes `serve` return, from any thread."""
        self._server.should_exit = True


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _listen(host: str, port: int) -> socket.socket:
    if not 0 <= port <= _MAX_PORT:
        raise UsageError(f"{port} is not a port", f"Give 0 to {_MAX_PORT}.")
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except OSError as error:
        raise UsageError(
            f"The server cannot listen on {host}:{port}: {error.strerror or error}", "Give another --host or --port."
        ) from None
