"""Shared parts of fmg's server applications: errors, the token, bodies, and waiting for a result."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import Future
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from fmg.core.errors import FmgError, one_line
from fmg.serving.access import knows_token
from fmg.serving.batching import BusyError

R = TypeVar("R")

log = logging.getLogger("uvicorn.error")


class RefusedError(Exception):
    """A request that is answered with an error status.

    Args:
        status: HTTP status.
        what: what is wrong.
        fix: what to do.
        retry_after: seconds after which the client may ask again.
        key: the key of the request that is wrong.
        code: name of the error for programs, such as `model_not_found`.
    """

    def __init__(
        self,
        status: int,
        what: str,
        fix: str,
        retry_after: int | None = None,
        *,
        key: str | None = None,
        code: str | None = None,
    ) -> None:
        super().__init__(what)
        self.status = status
        self.what = what
        self.fix = fix
        self.key = key
        self.code = code
        self.headers = {} if retry_after is None else {"Retry-After": str(retry_after)}

    def __reduce__(self) -> tuple[Any, ...]:
        # replicas send it to the server, which needs all arguments
        return type(self), (self.status, self.what, self.fix), self.__dict__


@dataclass(frozen=True)
class Service:
    """The description of a server.

    Attributes:
        title: its name.
        usage: its routes, as advice for a request to an unknown one.
        error: the body of an error.
        closed: called when the server has answered its last request.
    """

    title: str
    usage: str
    error: Callable[[RefusedError], object]
    closed: Callable[[], object]


def new_app(service: Service, *, openapi: bool = False) -> FastAPI:
    """An application without routes, whose errors all have the service's format.

    It has no interactive documentation, whose pages load scripts from elsewhere.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(service.closed)

    app = FastAPI(
        title=service.title,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        openapi_url="/openapi.json" if openapi else None,
    )

    def answer(error: RefusedError, headers: dict[str, str] | None = None) -> Response:
        return JSONResponse(service.error(error), status_code=error.status, headers=headers or error.headers)

    @app.exception_handler(RefusedError)
    async def refused(_: Request, error: RefusedError) -> Response:
        return answer(error)

    @app.exception_handler(HTTPException)
    async def unknown(_: Request, error: HTTPException) -> Response:
        # unknown paths and methods, which the framework refuses by itself
        said = RefusedError(error.status_code, str(error.detail), service.usage)
        return answer(said, dict(error.headers or {}))

    @app.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> Response:
        return answer(RefusedError(500, f"The server failed: {one_line(error)}", "See its log."))

    return app


def bearer(token: str | None) -> Callable[[Request], Awaitable[None]]:
    """A dependency for routes that only clients with the token may use; None admits every client."""

    async def authorised(request: Request) -> None:
        if not knows_token(request.headers.get("authorization", ""), token):
            raise RefusedError(401, "The token is missing or wrong", "Send Authorization: Bearer TOKEN.")

    return authorised


def content_type(request: Request) -> str:
    """The media type of the body, without its parameters."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


async def read_body(request: Request, limit: int, timeout: float, advice: str) -> bytes:
    """The whole body.

    Raises:
        RefusedError: it has more than `limit` bytes, takes longer than `timeout` seconds, or ends early.
    """
    try:
        async with asyncio.timeout(timeout):
            return await _read(request, limit, advice)
    except TimeoutError:
        raise RefusedError(408, f"The body took longer than {timeout:g} s", advice) from None


async def _read(request: Request, limit: int, advice: str) -> bytes:
    too_large = RefusedError(413, f"The body has more than {limit} bytes", advice)
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
        raise RefusedError(400, "The body ended early", "Send the complete body.") from None
    return bytes(body)


async def outcome(
    request: Request,
    submit: Callable[[], Future[R] | asyncio.Future[R]],
    timeout: float,
    *,
    wrong: tuple[type[FmgError], ...],
    wrong_status: int,
    doing: str,
    noun: str,
    advice: str,
) -> R:
    """The result of a job. If the client hangs up, its job leaves the queue.

    Args:
        request: the request, whose body has been read.
        submit: puts the job into the queue.
        timeout: seconds to wait for the result.
        wrong: errors that the client caused, answered with `wrong_status`; any other is answered with 500.
        wrong_status: HTTP status for those.
        doing: what the server does, for messages: `Scoring`, `Generating`.
        noun: what it returns, for messages: `scores`, `images`.
        advice: what a client can do if it takes too long.

    Raises:
        RefusedError: there is no result.
    """
    try:
        result = asyncio.wrap_future(submit())
    except BusyError as error:
        raise _full(error) from None
    gone = asyncio.create_task(_hung_up(request))
    try:
        await asyncio.wait((result, gone), timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        if result.done():
            return result.result()
        if gone.done():
            raise RefusedError(499, "The client disconnected", "Wait for the answer.")
        raise RefusedError(504, f"No {noun} within {timeout:g} s", advice)
    except asyncio.CancelledError:
        # the server cuts off what has not ended when the time to drain is over
        raise RefusedError(503, "The server is stopping", "Try again later.", 1) from None
    except BusyError as error:
        raise _full(error) from None
    except wrong as error:
        raise RefusedError(wrong_status, error.what, error.fix) from None
    except FmgError as error:
        raise RefusedError(500, error.what, error.fix) from None
    except RefusedError:
        raise
    except Exception as error:
        log.exception("%s failed", doing)
        raise RefusedError(500, f"{doing} failed: {one_line(error)}", "See the log of the server.") from error
    finally:
        gone.cancel()
        # takes the job out of the queue
        result.cancel()


def _full(error: BusyError) -> RefusedError:
    return RefusedError(503, "The queue is full", "Try again later.", error.retry_after)


async def _hung_up(request: Request) -> None:
    """Returns when the connection ends."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
