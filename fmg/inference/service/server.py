"""The image server: OpenAI's images API, health, metrics, and a web page to try it."""

from __future__ import annotations

import asyncio
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from importlib.resources import files
from types import MappingProxyType
from typing import Any

from fastapi import Depends, FastAPI, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from pydantic import BaseModel

from fmg.core.errors import FmgError, UsageError, suggestion
from fmg.core.machine import installed_versions
from fmg.core.prompt import is_blank
from fmg.inference.service.engine import Asked, Engine, LocalEngine, Painted
from fmg.inference.service.limits import Limits
from fmg.inference.service.models import ServedModels
from fmg.inference.service.wire import (
    JSON,
    AdapterRequest,
    ErrorAnswer,
    ImagesAnswer,
    chosen_seeds,
    encode_answer,
    error_body,
    parse_body,
    request_model,
)
from fmg.serving.access import names_loopback
from fmg.serving.app import RefusedError, Service, bearer, content_type, new_app, outcome, read_body
from fmg.serving.batching import BusyError
from fmg.serving.server import LAST_BATCH_S, Address, HttpServer
from fmg.version import __version__

_GENERATIONS = "/v1/images/generations"
_PACKAGES = ("torch", "diffusers", "onnxruntime", "numpy", "pillow")
_USAGE = "Use POST /v1/images/generations, POST /v1/adapters, GET /v1/models, /health, /info or /metrics."
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
_REFUSED: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorAnswer} for status in (400, 401, 403, 404, 408, 413, 415, 500, 503, 504)
}
# Maximum values of the images in an answer that is encoded on the event loop: a few images of 64 x 64 pixels
_SMALL = 1 << 16

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """Counters of one server, separate from those of others in the process.

    Args:
        queued: returns the number of images that wait or are being generated.
    """

    def __init__(self, queued: Callable[[], float]) -> None:
        own = self._registry = CollectorRegistry()
        Gauge("fmg_queued_images", "Images that wait or are being generated", registry=own).set_function(queued)
        self._requests = Counter("fmg_requests", "Image requests by HTTP status", ["status"], registry=own)
        self._latency = Histogram(
            "fmg_request_seconds", "Seconds from request to answer", buckets=_SECONDS, registry=own
        )
        self._images = Counter("fmg_images", "Images generated", ["model"], registry=own)
        self._queueing = Histogram("fmg_queue_seconds", "Seconds in the queue", buckets=_SECONDS, registry=own)
        self._batch = Histogram("fmg_batch_images", "Batch size, by request", buckets=_BATCHES, registry=own)

    @contextmanager
    def request(self) -> Iterator[None]:
        """Counts and times the answer to a request."""
        with self._latency.time():
            try:
                yield
            except RefusedError as error:
                self._requests.labels(error.status).inc()
                raise
            except Exception:
                self._requests.labels(500).inc()
                raise
        self._requests.labels(200).inc()

    def generated(self, model: str, painted: Painted) -> None:
        """Counts the images of a request."""
        self._images.labels(model).inc(len(painted.images))
        self._queueing.observe(painted.seconds["queued"])
        self._batch.observe(painted.batch)

    def text(self) -> bytes:
        """All counters in Prometheus format."""
        return generate_latest(self._registry)


def create_app(
    engine: Engine, limits: Limits, *, token: str | None, former: Mapping[str, str] = MappingProxyType({})
) -> FastAPI:
    """The server as an ASGI application.

    Args:
        engine: generates the images.
        limits: limits on requests.
        token: required as `Authorization: Bearer TOKEN` for everything but `/health` and the page. None admits every
            client that addresses this machine by a loopback name.
        former: other names that clients may use, with the names of their models.
    """
    metrics = Metrics(lambda: engine.queued)
    created = int(time.time())
    app = new_app(Service("fmg image server", _USAGE, error_body, lambda: engine.close(LAST_BATCH_S)), openapi=True)
    parse = request_model(limits)

    authorised = bearer(token)

    async def guard(request: Request) -> None:
        await authorised(request)
        if token is None and not names_loopback(request.headers.get("host", "")):
            raise RefusedError(403, "The request names another machine", "Use http://127.0.0.1, or set a token.")

    guarded = [Depends(guard)]

    def described(name: str) -> dict[str, object]:
        return {"id": name, "object": "model", "created": created, "owned_by": "fmg", **engine.facts(name)}

    def current(name: str) -> str:
        """The name of a model, or of an adapter of it, for a former one."""
        model = next((old for old in former if name == old or name.startswith(f"{old}:")), None)
        return name if model is None or name in engine.names() else former[model] + name[len(model) :]

    def found(name: str | None) -> str:
        names = engine.names()
        if name is None:
            return names[0]
        if (known := current(name)) not in names:
            what, fix = f"There is no model '{name}'", suggestion(name, names)
            raise RefusedError(404, what, fix, key="model", code="model_not_found")
        return known

    async def body_of(request: Request) -> bytes:
        # a page of another origin needs a preflight request to send this type, which is refused
        if (given := content_type(request)) != JSON:
            raise RefusedError(415, f"The content type is '{given}'", f"Send {JSON}.")
        return await read_body(request, limits.max_body, limits.timeout, "Send less.")

    @app.get("/health")
    async def health() -> dict[str, object]:
        return {"status": "degraded" if engine.problems() else "ok", "queued": engine.queued}

    @app.get("/info", dependencies=guarded)
    async def info() -> dict[str, object]:
        return {
            "fmg": __version__,
            "python": platform.python_version(),
            "packages": installed_versions(_PACKAGES),
            "models": {name: engine.facts(name) for name in engine.names()},
            "limits": asdict(limits),
            "problems": list(engine.problems()),
        }

    @app.get("/metrics", dependencies=guarded, response_class=Response)
    async def prometheus() -> Response:
        return Response(metrics.text(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/v1/models", dependencies=guarded)
    async def listed() -> dict[str, object]:
        return {"object": "list", "data": [described(name) for name in engine.names()]}

    @app.get("/v1/models/{name:path}", dependencies=guarded, responses={404: {"model": ErrorAnswer}})
    async def one(name: str) -> dict[str, object]:
        return described(found(name))

    async def generations(request: Request) -> Response:
        await guard(request)
        with metrics.request():
            return await answer(request)

    # A plain route answers. FastAPI's own, which resolves dependencies for each request, took a third of the time of a
    # request besides its images; here it only describes the route in the schema.
    app.add_route(_GENERATIONS, generations, methods=["POST"], include_in_schema=False)
    app.post(
        _GENERATIONS,
        responses={200: {"model": ImagesAnswer}, **_REFUSED},
        openapi_extra=_body_schema(parse),
        response_class=Response,
    )(generations)

    async def answer(request: Request) -> Response:
        wanted = parse_body(await body_of(request), parse)
        if is_blank(wanted.prompt):
            raise RefusedError(400, "The prompt is empty", "Describe an image.", key="prompt")
        model = found(wanted.model)
        seeds = chosen_seeds(wanted)
        asked = Asked(model, wanted.prompt, seeds, wanted.steps, wanted.size)
        painted = await outcome(
            request,
            lambda: engine.submit(asked),
            limits.timeout,
            wrong=(UsageError,),
            wrong_status=400,
            doing="Generating",
            noun="images",
            advice="Ask for fewer images or steps.",
        )
        metrics.generated(model, painted)
        encode = partial(encode_answer, painted, model, wanted.output_format or "png", seeds)
        # large files take long to encode; small ones take less time than a switch to another thread
        body = encode() if painted.images.size <= _SMALL else await asyncio.to_thread(encode)
        return Response(body, media_type=JSON)

    @app.post("/v1/adapters", dependencies=guarded, responses=_REFUSED, openapi_extra=_body_schema(AdapterRequest))
    async def add_adapter(request: Request) -> dict[str, object]:
        if token is None:
            what = "Adapters are added only with a token, and this server has none"
            raise RefusedError(403, what, "Start it with a token, or with --adapter NAME=RUN.")
        wanted = parse_body(await body_of(request), AdapterRequest)
        model = None if wanted.model is None else current(wanted.model)
        try:
            return described(await engine.add_adapter(wanted.name, wanted.run, model))
        except BusyError as error:
            raise RefusedError(503, "The server is stopping", "Try again later.", error.retry_after) from None
        except FmgError as error:
            raise RefusedError(400, error.what, error.fix) from None

    for path, (file, kind) in _PAGE.items():
        app.add_api_route(path, _static(file, kind), include_in_schema=False)
    return app


def _body_schema(model: type[BaseModel]) -> dict[str, Any]:
    """The app itself reads bodies, within the limits, so FastAPI does not know their schema."""
    return {"requestBody": {"required": True, "content": {JSON: {"schema": model.model_json_schema()}}}}


def _static(name: str, media_type: str) -> Any:
    content = files("fmg.inference.service").joinpath("page", name).read_bytes()

    async def file() -> Response:
        return Response(content, media_type=f"{media_type}; charset=utf-8", headers=_PAGE_HEADERS)

    return file


class ImageServer(HttpServer):
    """An image server that is bound but not serving yet.

    Args:
        engine: generates the images; models are sampled in this process.
        address: where it listens; one that other machines can reach needs a token (`fmg.serving.access.check_token`).
        limits: limits on requests.
        token: what clients must send.
        drain: seconds to finish what was accepted after the server is told to stop.
        former: as `create_app`.

    Raises:
        UsageError: another process listens at this address.
    """

    def __init__(
        self,
        engine: Engine | ServedModels,
        address: Address,
        *,
        limits: Limits,
        token: str | None,
        drain: float = 30.0,
        former: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        local = LocalEngine(engine, limits) if isinstance(engine, ServedModels) else engine
        app = create_app(local, limits, token=token, former=former)
        super().__init__(app, address, error=error_body, timeout=limits.timeout, drain=drain)
