"""The reward server: images and prompts in, scores out. No pickle, and nothing that a client sends is run."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import json
import logging
import platform
import socket
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict
from typing import Any

import torch
import uvicorn
from fastapi import Depends, FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from uvicorn.protocols.http.h11_impl import H11Protocol

from fmg.core.cache import content_hash
from fmg.core.errors import FmgError, RefusedImageError, UsageError, one_line, reason, suggestion
from fmg.core.events import Notice, Observer, ignore
from fmg.core.hub import locate
from fmg.core.machine import installed_versions
from fmg.core.model_folder import weight_files
from fmg.recipe.sections import RewardRef
from fmg.rewards.base import Checked, probe_prompt
from fmg.rewards.service.batching import Batcher, BusyError, Limits
from fmg.rewards.service.wire import SAFETENSORS, ScoreRequest, decode_request, encode_scores, probe_image
from fmg.version import __version__

_log = logging.getLogger("uvicorn.error")
_PACKAGES = ("torch", "transformers", "onnxruntime", "rapidocr", "pillow")
_MAX_PORT = 65535
# asyncio accepts as many connections at once as the backlog is long, before any of them can be refused
_BACKLOG = 128
_MAX_CONNECTIONS = 4096
# Headers are small, so a client sends them at once.
_HEADERS_S = 20.0
# A client that is still sending reads its answer late, and the next request of a connection may take a while.
_KEEP_ALIVE_S = 5.0
# Time to finish answers after the server is told to stop.
_SHUTDOWN_S = 10


def describe(
    rewards: Mapping[str, Checked], references: Sequence[RewardRef], device: torch.device
) -> dict[str, object]:
    """What `/info` returns beside the limits, as plain JSON values.

    Every reward scores the probe image on `device`, which loads its weights and shows that it works. The weights of
    networks are listed with the sha256 of their first file, those of a folder with that of every file.

    Raises:
        FmgError: when a reward cannot score it.
    """
    entries: dict[str, object] = {}
    for reference in references:
        reward = rewards[reference.label]
        prompt = probe_prompt(reward)
        reward(probe_image().to(device), [prompt])
        entries[reference.label] = {
            "component": reference.name,
            "options": reference.config.model_dump(mode="json"),
            "probe_prompt": prompt,
            "weights": _weights(reference),
        }
    return {
        "fmg": __version__,
        "python": platform.python_version(),
        "packages": installed_versions(_PACKAGES),
        "rewards": entries,
    }


def _weights(reference: RewardRef) -> list[dict[str, str]]:
    located = [locate(asset, "reward", reference.label) for asset in reference.config.assets()]
    return [
        {"what": one.asset.what, "source": one.asset.source, "sha256": content_hash(file)}
        for one in located
        for file in (weight_files(one.path) if one.path.is_dir() else [one.path])
    ]


class _RefusedError(Exception):
    """A request that is answered with an error status."""

    def __init__(self, status: int, what: str, fix: str, retry_after: int | None = None) -> None:
        super().__init__(what)
        self.status = status
        self.what = what
        self.fix = fix
        self.headers = {} if retry_after is None else {"Retry-After": str(retry_after)}


def create_app(
    rewards: Mapping[str, Checked],
    info: Mapping[str, object],
    limits: Limits,
    *,
    token: str | None,
    device: torch.device,
) -> FastAPI:
    """The server as an ASGI application.

    Args:
        rewards: what it scores, by name.
        info: the answer of `/info` about the rewards, as plain JSON values.
        limits: what it accepts.
        token: required as `Authorization: Bearer TOKEN` for everything but `/health`; None lets every client in.
        device: where images are scored.
    """
    batcher = Batcher(rewards, limits, device)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(batcher.close)

    # no interactive documentation: its pages load scripts from elsewhere
    app = FastAPI(title="fmg reward server", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    expected = None if token is None else f"Bearer {token}".encode()

    async def authorised(request: Request) -> None:
        given = request.headers.get("authorization", "").encode("latin-1")
        if expected is not None and not hmac.compare_digest(given, expected):
            raise _RefusedError(401, "The token is missing or wrong", "Send Authorization: Bearer TOKEN.")

    @app.exception_handler(_RefusedError)
    async def refused(_: Request, error: _RefusedError) -> Response:
        content = {"error": {"what": error.what, "fix": error.fix}}
        return JSONResponse(content, status_code=error.status, headers=error.headers)

    @app.exception_handler(HTTPException)
    async def unknown(_: Request, error: HTTPException) -> Response:
        # what the framework refuses by itself: another path, another method
        fix = "Use GET /health, GET /info or POST /score."
        content = {"error": {"what": str(error.detail), "fix": fix}}
        return JSONResponse(content, status_code=error.status_code, headers=error.headers)

    @app.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> Response:
        content = {"error": {"what": f"The server failed: {one_line(error)}", "fix": "See its log."}}
        return JSONResponse(content, status_code=500)

    @app.get("/health")
    async def health() -> dict[str, object]:
        return {"status": "ok", "queued": batcher.queued}

    @app.get("/info", dependencies=[Depends(authorised)])
    async def about() -> dict[str, object]:
        return {**info, "limits": asdict(limits)}

    @app.post("/score", dependencies=[Depends(authorised)])
    async def score(request: Request) -> Response:
        wanted = await _read_request(request, limits)
        for name in wanted.rewards:
            if name not in rewards:
                raise _RefusedError(400, f"This server has no reward '{name}'", suggestion(name, rewards))
        try:
            future = batcher.submit(wanted)
        except BusyError as error:
            raise _RefusedError(503, "The queue is full", "Ask again later.", error.retry_after) from None
        try:
            scores = await asyncio.wait_for(asyncio.wrap_future(future), limits.timeout)
        except TimeoutError:
            raise _RefusedError(504, f"No scores within {limits.timeout:g} s", "Send fewer images.") from None
        except (UsageError, RefusedImageError) as error:
            raise _RefusedError(422, error.what, error.fix) from None
        except FmgError as error:
            raise _RefusedError(500, error.what, error.fix) from None
        except Exception as error:
            _log.exception("scoring failed")
            raise _RefusedError(500, f"Scoring failed: {one_line(error)}", "See the log of the server.") from error
        return JSONResponse(encode_scores(scores))

    return app


async def _read_request(request: Request, limits: Limits) -> ScoreRequest:
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != SAFETENSORS:
        fix = f"Send {SAFETENSORS}, as docs/reward-service.md shows; JSON with images in base64 is no longer read."
        raise _RefusedError(415, f"The content type is '{content_type}'", fix)
    try:
        body = await asyncio.wait_for(_read_body(request, limits.max_body), limits.timeout)
    except TimeoutError:
        raise _RefusedError(408, f"The body took longer than {limits.timeout:g} s", "Send fewer images.") from None
    try:
        return await asyncio.to_thread(decode_request, body, max_images=limits.max_images, max_pixels=limits.max_pixels)
    except UsageError as error:
        raise _RefusedError(400, error.what, error.fix) from None


async def _read_body(request: Request, limit: int) -> bytes:
    too_large = _RefusedError(413, f"The body has more than {limit} bytes", "Send fewer images.")
    declared = request.headers.get("content-length", "0")
    if declared.isascii() and declared.isdigit() and int(declared) > limit:
        raise too_large
    body = bytearray()
    try:
        async for chunk in request.stream():
            body += chunk
            if len(body) > limit:
                raise too_large
    except ClientDisconnect:
        raise _RefusedError(400, "The body ended early", "Send the whole body.") from None
    return bytes(body)


class _Connections:
    """The open connections of a server: how many there may be, and how long one may go without a complete request.

    A waiting connection has not sent complete headers since it was opened or answered. When there are too many, the one
    that has been waiting longest is closed, so that clients that keep connections open shut out each other, not those
    with a request.

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
    """An error of `fmg.rewards.service.server` as bytes, where there is no request to answer."""
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
        info: the answer of `/info` about them.
        host: address to listen on.
        port: 0 for a free one.
        limits: what it accepts.
        token: for clients to send; required unless `host` is a loopback address.
        device: where images are scored.

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
                f"Other machines can reach the address {host}, but no token is set",
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
        raise UsageError(f"{port} is not a port", f"Give a port from 0 to {_MAX_PORT}.")
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except OSError as error:
        raise UsageError(
            f"The server cannot listen on {host}:{port}: {reason(error)}", "Give another --host or --port."
        ) from None
