"""The wire format: requests and responses of OpenAI's images API, with a few additional keys.

A request also has `seed` and `steps`. An answer also has the seed of each image, the model, and the time that it took.
"""

from __future__ import annotations

import base64
import json
import secrets
import time
from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from fmg.core.errors import UsageError
from fmg.core.json_io import JsonError, parse_object
from fmg.data.pictures import to_pil
from fmg.inference.service.engine import Painted
from fmg.inference.service.limits import Limits
from fmg.registry.validation import first_problem
from fmg.serving.app import RefusedError

JSON = "application/json"
B = TypeVar("B", bound=BaseModel)
Format = Literal["png", "jpeg", "webp"]

# seeds that the server chooses are below this: exact in JavaScript, and short enough to copy by hand
_CHOSEN_SEEDS = 1 << 32
# every JSON parser reads integers up to this exactly
_MAX_SEED = (1 << 53) - 1
_ERROR_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error"}


class ImageRequest(BaseModel):
    """The body of `POST /v1/images/generations`."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    prompt: str = Field(min_length=1, description="what to generate")
    model: str | None = Field(default=None, description="one of /v1/models; the first by default")
    n: int | None = Field(default=1, ge=1, description="number of images")
    size: str | None = Field(default=None, description="WIDTHxHEIGHT or auto; the model's own size by default")
    response_format: Literal["b64_json"] | None = Field(
        default=None, description="b64_json, the only one: images are in the answer, not behind a link"
    )
    output_format: Format | None = Field(default="png", description="format of the image files")
    seed: int | None = Field(
        default=None, ge=0, le=_MAX_SEED, description="seed of the first image, the following integers for the others"
    )
    steps: int | None = Field(default=None, ge=1, description="sampling steps (NFE); the model's own by default")
    user: str | None = Field(default=None, description="accepted and ignored")
    quality: Literal["auto", "standard"] | None = Field(default=None, description="accepted and ignored")
    background: Literal["auto", "opaque"] | None = Field(default=None, description="accepted and ignored")


class AdapterRequest(BaseModel):
    """The body of `POST /v1/adapters`."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    name: str = Field(description="the part after the colon in the model's name: MODEL:NAME")
    run: str = Field(description="path of a run folder on the server's computer; RUN=WEIGHT weights it")
    model: str | None = Field(default=None, description="the model; by default the one that it was trained on")


class ImageEntry(BaseModel):
    """One image of an answer."""

    b64_json: str = Field(description="the image file in base64")
    seed: int = Field(description="seed that generates this image again")


class ImagesAnswer(BaseModel):
    """The answer of `POST /v1/images/generations`."""

    created: int = Field(description="seconds since 1970")
    data: list[ImageEntry]
    model: str
    size: str
    output_format: Format
    steps: int = Field(description="sampling steps (NFE) per image")
    batch: int = Field(description="images that were computed together, including those of other requests")
    timings_ms: dict[str, float] = Field(description="milliseconds in the queue (queued) and in generation (generated)")
    adapter_sha256: str | None = Field(
        default=None, description="sha256 of the adapter that was used, if adapters can be exchanged"
    )
    warnings: list[str] = Field(default_factory=list, description="for example, that the model truncates the prompt")


class ErrorDetail(BaseModel):
    """What is wrong with a request."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(BaseModel):
    """The answer to a request that is refused."""

    error: ErrorDetail


def request_model(limits: Limits) -> type[ImageRequest]:
    """`ImageRequest` with the limits of a server, which its OpenAPI schema then states."""
    fields = ImageRequest.model_fields
    return create_model(
        "ImageRequest",
        __base__=ImageRequest,
        __doc__=ImageRequest.__doc__,
        prompt=(str, Field(min_length=1, max_length=limits.max_prompt, description=fields["prompt"].description)),
        n=(int | None, Field(default=1, ge=1, le=limits.max_images, description=fields["n"].description)),
        steps=(int | None, Field(default=None, ge=1, le=limits.max_steps, description=fields["steps"].description)),
    )


def parse_body(body: bytes, model: type[B]) -> B:
    """Parses a JSON body into a request.

    Raises:
        RefusedError: it is malformed, or exceeds a limit.
    """
    try:
        return model.model_validate(parse_object(body))
    except JsonError as error:
        raise RefusedError(400, f"The body cannot be read: {error}", "Send one JSON object.") from None
    except ValidationError as error:
        problem = first_problem(error, model, "The request", noun="key")
        key = str(problem.location[0]) if problem.location else None
        raise RefusedError(400, problem.what, problem.fix, key=key) from None


def chosen_seeds(request: ImageRequest) -> tuple[int, ...]:
    """The seed of each image: consecutive ones, from the given seed or a random one."""
    first = secrets.randbelow(_CHOSEN_SEEDS) if request.seed is None else request.seed
    return tuple(range(first, first + (request.n or 1)))


def encode_answer(painted: Painted, model: str, output_format: Format, seeds: Sequence[int]) -> bytes:
    """The answer as JSON. Encoding image files takes long, so this is called outside the event loop."""
    _, _, height, width = painted.images.shape
    answer: dict[str, Any] = {
        "created": int(time.time()),
        "data": [
            {"b64_json": base64.b64encode(_file(image, output_format)).decode("ascii"), "seed": seed}
            for image, seed in zip(painted.images, seeds, strict=True)
        ],
        "model": model,
        "size": f"{width}x{height}",
        "output_format": output_format,
        "steps": painted.steps,
        "batch": painted.batch,
        "timings_ms": {name: round(1e3 * seconds, 3) for name, seconds in painted.seconds.items()},
    }
    if painted.adapter is not None:
        answer["adapter_sha256"] = painted.adapter
    if painted.warnings:
        answer["warnings"] = list(painted.warnings)
    return json.dumps(answer).encode()


def error_body(error: RefusedError) -> Mapping[str, object]:
    """An error in the format of OpenAI's API; its message also says what to do."""
    kind = "server_error" if error.status >= 500 else _ERROR_TYPES.get(error.status, "invalid_request_error")
    said = UsageError(error.what, error.fix).text
    return {"error": {"message": said, "type": kind, "param": error.key, "code": error.code}}


def _file(image: Any, output_format: Format) -> bytes:
    file = BytesIO()
    # zlib's default level takes four times as long, for files that are a sixth smaller
    options = {"compress_level": 1} if output_format == "png" else {"quality": 95}
    to_pil(image).save(file, output_format.upper(), **options)
    return file.getvalue()
