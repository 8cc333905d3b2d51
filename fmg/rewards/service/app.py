"""The endpoints: `GET /health`, `GET /info`, `POST /score`.

Errors are JSON, `{"error": {"what": ..., "fix": ...}}`: 400 a request that cannot be read, 401 no or a wrong token,
404 and 405 another path or method, 408 a body that came too slowly, 413 one that is too large, 415 of another type,
422 prompts or pictures that a reward refuses, 500 a reward that failed, 503 with `Retry-After` when the queue is full,
504 no scores in time.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import asdict

import torch
from fastapi import Depends, FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from fmg.core.errors import FmgError, RefusedImageError, UsageError, suggestion
from fmg.rewards.base import Checked, one_line
from fmg.rewards.service.batching import Batcher, BusyError, Limits
from fmg.rewards.service.wire import JSON, SAFETENSORS, ScoreRequest, decode_json, decode_tensors, encode_scores

_log = logging.getLogger("uvicorn.error")
_DECODERS = {JSON: decode_json, SAFETENSORS: decode_tensors}


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
        info: what `/info` says of the rewards, as plain JSON values.
        limits: what it accepts.
        token: needed as `Authorization: Bearer TOKEN` for everything but `/health`; None lets everybody in.
        device: where pictures are scored.
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
        fix = "Ask GET /health, GET /info or POST /score."
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
        _check_rewards(wanted, rewards)
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
    decode = _DECODERS.get(content_type)
    if decode is None:
        raise _RefusedError(415, f"The content type is '{content_type}'", f"Send {' or '.join(_DECODERS)}.")
    try:
        body = await asyncio.wait_for(_read_body(request, limits.max_body), limits.timeout)
    except TimeoutError:
        raise _RefusedError(408, f"The body took longer than {limits.timeout:g} s", "Send fewer images.") from None
    try:
        return await asyncio.to_thread(decode, body, max_images=limits.max_images, max_pixels=limits.max_pixels)
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
        raise _RefusedError(400, "The body broke off", "Send the whole body.") from None
    return bytes(body)


def _check_rewards(request: ScoreRequest, rewards: Mapping[str, Checked]) -> None:
    for name in request.rewards:
        if name not in rewards:
            raise _RefusedError(400, f"This server has no reward '{name}'", suggestion(name, rewards))
