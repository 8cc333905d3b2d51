"""The image server: OpenAI's images API, health, metrics, and a page to try it on."""

from __future__ import annotations

import asyncio
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict
from importlib.resources import files
from typing import Any

from fastapi import Depends, FastAPI, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST

from fmg.core.errors import UsageError, suggestion
from fmg.core.machine import installed_versions
from fmg.inference.service.jobs import ImageJob, Painted, Served, generate_jobs
from fmg.inference.service.metrics import Metrics
from fmg.inference.service.wire import (
    JSON,
    ErrorAnswer,
    ImageRequest,
    ImagesAnswer,
    Limits,
    chosen_seeds,
    encode_answer,
    error_body,
    read_request,
    request_model,
)
from fmg.serving.access import names_loopback
from fmg.serving.app import RefusedError, Service, bearer, content_type, new_app, outcome, read_body
from fmg.serving.batching import BatchQueue
from fmg.serving.server import Address, HttpServer
from fmg.version import __version__

_PACKAGES = ("torch", "diffusers", "onnxruntime", "numpy", "pillow")
_USAGE = "Use POST /v1/images/generations, GET /v1/models, /health, /info or /metrics."
_PAGE = {
    "/": ("index.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
}
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:;"
    " base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_PAGE_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
_REFUSALS: tuple[int | str, ...] = (400, 401, 403, 404, 408, 413, 415, 500, 503, 504)
# Time for the batch at work to end after clients were cut off
_LAST_BATCH_S = 5.0


def create_app(models: Sequence[Served], limits: Limits, *, token: str | None) -> FastAPI:
    """The server as an ASGI application.

    Args:
        models: what it serves; the first is the default.
        limits: what it accepts.
        token: required as `Authorization: Bearer TOKEN` for everything but `/health` and the page. None lets in every
            client that names this machine by a loopback address.
    """
    queue: BatchQueue[ImageJob, Painted] = BatchQueue(generate_jobs, limits, "fmg-image-batcher", overtaking=True)
    metrics = Metrics(lambda: queue.queued)
    known = {model.name: model for model in models}
    created = int(time.time())
    app = new_app(Service("fmg image server", _USAGE, error_body, lambda: queue.close(_LAST_BATCH_S)), openapi=True)
    parse = request_model(limits)

    async def from_this_machine(request: Request) -> None:
        if token is None and not names_loopback(request.headers.get("host", "")):
            raise RefusedError(403, "The request names another machine", "Use http://127.0.0.1, or set a token.")

    guarded = [Depends(bearer(token)), Depends(from_this_machine)]

    def described(model: Served) -> dict[str, object]:
        return {"id": model.name, "object": "model", "created": created, "owned_by": "fmg", **model.facts()}

    def found(name: str | None) -> Served:
        if name is None:
            return models[0]
        if name not in known:
            what = f"There is no model '{name}'"
            raise RefusedError(404, what, suggestion(name, known), key="model", code="model_not_found")
        return known[name]

    @app.get("/health")
    async def health() -> dict[str, object]:
        return {"status": "ok", "queued": queue.queued}

    @app.get("/info", dependencies=guarded)
    async def info() -> dict[str, object]:
        return {
            "fmg": __version__,
            "python": platform.python_version(),
            "packages": installed_versions(_PACKAGES),
            "models": {model.name: model.facts() for model in known.values()},
            "limits": asdict(limits),
        }

    @app.get("/metrics", dependencies=guarded, response_class=Response)
    async def prometheus() -> Response:
        return Response(metrics.text(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/v1/models", dependencies=guarded)
    async def listed() -> dict[str, object]:
        return {"object": "list", "data": [described(model) for model in known.values()]}

    @app.get("/v1/models/{name:path}", dependencies=guarded, responses={404: {"model": ErrorAnswer}})
    async def one(name: str) -> dict[str, object]:
        return described(found(name))

    @app.post(
        "/v1/images/generations",
        dependencies=guarded,
        responses={200: {"model": ImagesAnswer}, **{status: {"model": ErrorAnswer} for status in _REFUSALS}},
        openapi_extra={"requestBody": {"required": True, "content": {JSON: {"schema": parse.model_json_schema()}}}},
        response_class=Response,
    )
    async def generations(request: Request) -> Response:
        with metrics.request():
            return await answer(request)

    async def answer(request: Request) -> Response:
        # a page of another origin cannot send this type without asking first, and is then refused
        if (given := content_type(request)) != JSON:
            raise RefusedError(415, f"The content type is '{given}'", f"Send {JSON}.")
        wanted = read_request(await read_body(request, limits.max_body, limits.timeout, "Send less."), parse)
        model = found(wanted.model)
        check_fits(wanted, model)
        seeds = chosen_seeds(wanted)
        job = ImageJob(model, wanted.prompt, seeds, wanted.steps)
        painted = await outcome(
            request,
            lambda: queue.submit(job),
            limits.timeout,
            wrong=(UsageError,),
            wrong_status=400,
            doing="Generating",
            noun="images",
            advice="Ask for fewer images or steps.",
        )
        metrics.generated(model.name, painted)
        body = await asyncio.to_thread(encode_answer, painted, model.name, wanted.output_format or "png", seeds)
        return Response(body, media_type=JSON)

    for path, (file, kind) in _PAGE.items():
        app.add_api_route(path, _static(file, kind), include_in_schema=False)
    return app


def check_fits(request: ImageRequest, model: Served) -> None:
    """Refuses what the model cannot generate, before it waits in the queue.

    Raises:
        RefusedError: the size is not the model's, or its time grid has no such number of steps.
    """
    own = "x".join(map(str, model.size))
    if request.size not in (None, "auto", own):
        what = f"The model '{model.name}' does not generate images of {request.size}"
        raise RefusedError(400, what, f"Ask for {own} or auto.", key="size")
    try:
        model.generator.times(request.steps)
    except UsageError as error:
        raise RefusedError(400, error.what, error.fix, key="steps") from None


def _static(name: str, media_type: str) -> Any:
    content = files("fmg.inference.service").joinpath("page", name).read_bytes()

    async def file() -> Response:
        return Response(content, media_type=f"{media_type}; charset=utf-8", headers=_PAGE_HEADERS)

    return file


class ImageServer(HttpServer):
    """A bound but not yet serving server of images.

    Args:
        models: what it serves; the first is the default.
        address: where it listens; one that other machines can reach needs a token (`fmg.serving.access.check_token`).
        limits: what it accepts.
        token: for clients to send.
        drain: seconds to finish what was accepted after the server is told to stop.

    Raises:
        UsageError: another process listens there.
    """

    def __init__(
        self,
        models: Sequence[Served],
        address: Address,
        *,
        limits: Limits,
        token: str | None,
        drain: float = 30.0,
    ) -> None:
        app = create_app(models, limits, token=token)
        super().__init__(app, address, error=error_body, timeout=limits.timeout, drain=drain)
