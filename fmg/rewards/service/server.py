"""Runs the reward server with uvicorn."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Mapping

import torch
import uvicorn

from fmg.core.errors import UsageError
from fmg.core.events import Notice, Observer, ignore
from fmg.rewards.base import Checked
from fmg.rewards.service.app import create_app
from fmg.rewards.service.batching import Limits

_MAX_PORT = 65535
_BACKLOG = 1024
# Answers that are still being written when the server is asked to stop may take this long.
_SHUTDOWN_S = 10


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
        self._server = uvicorn.Server(
            uvicorn.Config(
                app,
                log_level="warning",
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
