"""`fmg serve`: generates images for other programs, over HTTP."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from fmg.cli import completion
from fmg.cli.options import (
    Backend,
    Device,
    Int8,
    LoadedDtype,
    Offline,
    Resolution,
    Threads,
    hardware_option,
    panel,
)
from fmg.cli.output import stderr
from fmg.core.errors import UsageError, suggestion
from fmg.core.events import Notice
from fmg.core.runtime import require
from fmg.inference.service.limits import DEFAULTS, Limits
from fmg.progress.reporters import LOADING, reporter_for

_limit = panel("Limits")
_network = panel("Network")
_replicas = panel("Replicas")
_ENGINES = ("local", "ray")


def serve(
    targets: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[NAME=]TARGET",
            help="Models, run folders, artifacts, or owner/name or owner/name@revision on the hub; the first is the"
            " default model.",
            show_default="the newest run",
            autocompletion=completion.targets,
        ),
    ] = None,
    adapters: Annotated[
        list[str] | None,
        typer.Option(
            "--adapter",
            metavar="[MODEL:]NAME=RUN[=WEIGHT]",
            help="LoRA of a run, served as MODEL:NAME on the weights of its model; repeat for several. LoRAs with the"
            " same NAME are added up.",
            show_default=False,
        ),
    ] = None,
    host: Annotated[
        str, _network("--host", metavar="A", help="Address to listen on; any address but loopback needs a token.")
    ] = "127.0.0.1",
    port: Annotated[int, _network("--port", min=0, max=65535, metavar="N", help="Port; 0 picks a free one.")] = 8000,
    token_env: Annotated[
        str,
        _network("--token-env", metavar="VAR", help="Environment variable with the token that clients must send."),
    ] = "FMG_SERVE_TOKEN",
    drain: Annotated[
        float,
        _network("--drain", min=0.0, metavar="S", help="Seconds to finish accepted requests after SIGTERM or Ctrl-C."),
    ] = 30.0,
    engine: Annotated[
        str,
        _replicas(
            "--engine",
            metavar="E",
            help="Where images are generated: local (this process) or ray (replicas on Ray Serve).",
            autocompletion=completion.one_of(*_ENGINES),
        ),
    ] = "local",
    replicas: Annotated[
        int | None, _replicas("--replicas", min=1, metavar="N", help="Number of replicas.", show_default="1")
    ] = None,
    min_replicas: Annotated[
        int | None,
        _replicas("--min-replicas", min=1, metavar="N", help="Fewest replicas, with --max-replicas.", show_default="1"),
    ] = None,
    max_replicas: Annotated[
        int | None,
        _replicas("--max-replicas", min=1, metavar="N", help="Most replicas; the number follows the load."),
    ] = None,
    ray_address: Annotated[
        str | None,
        _replicas(
            "--ray-address",
            metavar="A",
            help="Running Ray cluster to use: auto, or HOST:PORT.",
            show_default="one of its own on this machine",
        ),
    ] = None,
    backend: Backend = "auto",
    device: Device = "auto",
    dtype: LoadedDtype = None,
    resolution: Resolution = None,
    int8: Int8 = False,
    threads: Threads = None,
    batch_size: Annotated[
        int | None,
        hardware_option(
            "--batch-size", min=1, metavar="N", help="Largest batch of images.", show_default=str(DEFAULTS.max_batch)
        ),
    ] = None,
    max_wait: Annotated[
        float,
        hardware_option(
            "--max-wait", min=0.0, max=10_000, metavar="MS", help="Milliseconds to wait for a batch to fill up."
        ),
    ] = DEFAULTS.gather * 1000,
    allow_code: Annotated[
        bool, hardware_option("--allow-code", help="Run the code inside version-compatible TensorRT engines.")
    ] = False,
    offline: Offline = False,
    max_queued: Annotated[
        int,
        _limit("--max-queued", min=1, metavar="N", help="Images that may wait; beyond that the server answers 503."),
    ] = DEFAULTS.max_queued,
    max_images: Annotated[
        int, _limit("--max-images", min=1, metavar="N", help="Images per request.")
    ] = DEFAULTS.max_images,
    max_prompt: Annotated[
        int, _limit("--max-prompt", min=1, metavar="N", help="Characters per prompt.")
    ] = DEFAULTS.max_prompt,
    max_steps: Annotated[
        int, _limit("--max-steps", min=1, max=1000, metavar="N", help="Sampling steps (NFE) per image.")
    ] = DEFAULTS.max_steps,
    max_adapters: Annotated[int, _limit("--max-adapters", min=1, metavar="N", help="Adapters per model.")] = 16,
    timeout: Annotated[
        float,
        _limit("--timeout", min=1.0, metavar="S", help="Seconds for a request to arrive, and again for its answer."),
    ] = DEFAULTS.timeout,
) -> None:
    """Serve images over HTTP: OpenAI's images API at /v1, a web page at /, and /health, /info and /metrics."""
    number = _number(engine, replicas, min_replicas, max_replicas, ray_address)
    require("The image server", "fastapi", "uvicorn", "prometheus_client", extra="server")

    from fmg.serving.access import check_token, secret_from
    from fmg.serving.server import Address, leaving_work

    token = secret_from(token_env, required=False)
    check_token(host, token, token_env)
    with reporter_for(stderr()) as reporter, ExitStack() as stack:
        reporter(LOADING)
        from fmg.inference.service.engine import Engine, LocalEngine
        from fmg.inference.service.opening import former_names, named_targets, newest_run, open_served
        from fmg.inference.service.server import ImageServer

        named = named_targets(targets or [newest_run()])
        former = former_names(named)
        wanted = _adapters(adapters or (), former)
        # a taken port is reported before anything is loaded
        address = stack.enter_context(Address(host, port))
        options = {
            "backend": backend,
            "device": device,
            "dtype": dtype,
            "resolution": resolution,
            "int8": int8,
            "threads": threads,
            "batch_size": batch_size,
            "allow_code": allow_code,
        }
        limits = Limits(
            max_queued=max_queued,
            max_batch=batch_size or DEFAULTS.max_batch,
            gather=max_wait / 1000,
            timeout=timeout,
            max_images=max_images,
            max_prompt=max_prompt,
            max_steps=max_steps,
        )
        runs: Engine
        if engine == "ray":
            from fmg.inference.service.ray_engine import ReplicaSpec, Scale, ray_engine

            spec = ReplicaSpec(tuple(named), wanted, options, limits, max_adapters, Path.cwd(), ray_address is None)
            scale = Scale(*number, cpus=threads or 1, gpu=device != "cpu", address=ray_address, drain=drain)
            runs = stack.enter_context(ray_engine(spec, scale, reporter))
        else:
            runs = LocalEngine(open_served(named, wanted, options, max_adapters, stack, reporter), limits)
        for one in runs.names():
            facts = runs.facts(one)
            reporter(Notice("info", f"{one}: {facts['backend']} ({facts['detail']}) on {facts['device']}"))
        server = ImageServer(runs, address, limits=limits, token=token, drain=drain, former=former)
        with leaving_work(runs.close):
            server.serve(reporter)


def _number(
    engine: str, replicas: int | None, fewest: int | None, most: int | None, address: str | None
) -> tuple[int, int]:
    """The smallest and the largest number of replicas.

    Raises:
        UsageError: there is no such engine, or the options do not go together.
    """
    if engine not in _ENGINES:
        raise UsageError(f"--engine: '{engine}' is unknown", suggestion(engine, _ENGINES))
    given = {"--replicas": replicas, "--min-replicas": fewest, "--max-replicas": most, "--ray-address": address}
    used = [flag for flag, value in given.items() if value is not None]
    if used and engine != "ray":
        raise UsageError(f"{used[0]} is an option of --engine ray", "Add --engine ray, or leave it out.")
    if replicas is not None and (fewest, most) != (None, None):
        raise UsageError("--replicas cannot be used with --min-replicas or --max-replicas", "Leave out one of them.")
    if fewest is not None and (most is None or most < fewest):
        raise UsageError("--min-replicas needs --max-replicas, at least as many", "Give both, or --replicas.")
    return (fewest or 1, most) if most is not None else (replicas or 1, replicas or 1)


def _adapters(texts: Sequence[str], former: Mapping[str, str]) -> dict[tuple[str | None, str], list[str]]:
    """The runs of `[MODEL:]NAME=RUN[=WEIGHT]`, each with its weight, by model and name."""
    found: dict[tuple[str | None, str], list[str]] = {}
    for text in texts:
        name, equals, run = text.partition("=")
        model, colon, rest = name.rpartition(":")
        if not equals or not run or not rest:
            raise UsageError(f"--adapter {text}: this is not NAME=RUN", "Write --adapter NAME=RUN, or MODEL:NAME=RUN.")
        found.setdefault((former.get(model, model) if colon else None, rest), []).append(run)
    return found
