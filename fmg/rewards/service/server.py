"""The reward server: images and prompts in, scores out. No pickle, and nothing that a client sends is run."""

from __future__ import annotations

import asyncio
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict

import torch
from fastapi import Depends, FastAPI, Request, Response
from fastapi.responses import JSONResponse

from fmg.core.cache import content_hash
from fmg.core.errors import RefusedImageError, UsageError, suggestion
from fmg.core.hub import locate
from fmg.core.machine import installed_versions
from fmg.core.model_folder import weight_files
from fmg.recipe.sections import RewardRef
from fmg.rewards.base import Checked, probe_prompt
from fmg.rewards.service.batching import Batcher, Limits
from fmg.rewards.service.wire import SAFETENSORS, ScoreRequest, decode_request, encode_scores, probe_image
from fmg.serving.access import check_token
from fmg.serving.app import RefusedError, Service, bearer, content_type, new_app, outcome, read_body
from fmg.serving.server import LAST_BATCH_S, Address, HttpServer
from fmg.version import __version__

_PACKAGES = ("torch", "transformers", "onnxruntime", "rapidocr", "pillow")
_FEWER = "Send fewer images."


def describe(
    rewards: Mapping[str, Checked], references: Sequence[RewardRef], device: torch.device
) -> dict[str, object]:
    """The part of `/info` without the limits, as plain JSON values.

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


def create_app(
    rewards: Mapping[str, Checked], info: Mapping[str, object], batcher: Batcher, limits: Limits, *, token: str | None
) -> FastAPI:
    """The server as an ASGI application.

    Args:
        rewards: rewards that it computes, by name.
        info: the answer of `/info` about the rewards, as plain JSON values.
        batcher: scores images.
        limits: limits on requests.
        token: required as `Authorization: Bearer TOKEN` for everything but `/health`; None admits every client.
    """
    usage = "Use GET /health, GET /info or POST /score."
    app = new_app(Service("fmg reward server", usage, error_body, lambda: batcher.close(LAST_BATCH_S)))
    authorised = Depends(bearer(token))

    @app.get("/health")
    async def health() -> dict[str, object]:
        return {"status": "ok", "queued": batcher.queued}

    @app.get("/info", dependencies=[authorised])
    async def about() -> dict[str, object]:
        return {**info, "limits": asdict(limits)}

    @app.post("/score", dependencies=[authorised])
    async def score(request: Request) -> Response:
        wanted = await _read_request(request, limits)
        for name in wanted.rewards:
            if name not in rewards:
                raise RefusedError(400, f"This server has no reward '{name}'", suggestion(name, rewards))
        scores = await outcome(
            request,
            lambda: batcher.submit(wanted),
            limits.timeout,
            wrong=(UsageError, RefusedImageError),
            wrong_status=422,
            doing="Scoring",
            noun="scores",
            advice=_FEWER,
        )
        return JSONResponse(encode_scores(scores))

    return app


def error_body(error: RefusedError) -> object:
    """An error in this server's format."""
    return {"error": {"what": error.what, "fix": error.fix}}


async def _read_request(request: Request, limits: Limits) -> ScoreRequest:
    if (given := content_type(request)) != SAFETENSORS:
        fix = f"Send {SAFETENSORS}, as docs/reward-service.md shows; JSON with images in base64 is no longer read."
        raise RefusedError(415, f"The content type is '{given}'", fix)
    body = await read_body(request, limits.max_body, limits.timeout, _FEWER)
    try:
        return await asyncio.to_thread(decode_request, body, max_images=limits.max_images, max_pixels=limits.max_pixels)
    except UsageError as error:
        raise RefusedError(400, error.what, error.fix) from None


class RewardServer(HttpServer):
    """A server that is bound but not serving yet; its port is known before the first request.

    Args:
        rewards: rewards that it computes, by name.
        info: the answer of `/info` about them.
        host: address to listen on.
        port: 0 for a free one.
        limits: limits on requests.
        token: what clients must send; required unless `host` is a loopback address.
        device: where images are scored.
        drain: seconds to finish what was accepted after the server is told to stop.

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
        drain: float = 10.0,
    ) -> None:
        check_token(host, token, "FMG_REWARD_TOKEN")
        address = Address(host, port)
        batcher = Batcher(rewards, limits, device)
        self.close = batcher.close
        app = create_app(rewards, info, batcher, limits, token=token)
        super().__init__(app, address, error=error_body, timeout=limits.timeout, drain=drain)
