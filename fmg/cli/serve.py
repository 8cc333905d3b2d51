"""`fmg serve`: generates images for other programs, over HTTP."""

from __future__ import annotations

from contextlib import ExitStack
from importlib.util import find_spec
from typing import Annotated

import typer

from fmg.cli import completion
from fmg.cli.options import (
    Backend,
    BatchSize,
    Device,
    Int8,
    LoadedDtype,
    Offline,
    Resolution,
    Threads,
    given_text,
    hardware_option,
    panel,
)
from fmg.cli.output import stderr
from fmg.core.errors import MissingDependencyError, UsageError
from fmg.core.events import Notice
from fmg.progress.reporters import LOADING, reporter_for
from fmg.version import install_line

_limit = panel("Limits")
_network = panel("Network")


def serve(
    targets: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[NAME=]TARGET",
            help="Models, run folders, artifacts, or owner/name[@revision] on the hub; the first is the default model.",
            show_default="the newest run",
            autocompletion=completion.targets,
        ),
    ] = None,
    adapters: Annotated[
        list[str] | None,
        typer.Option(
            "--adapter",
            metavar="[MODEL:]NAME=RUN",
            help="LoRA of a run, served as MODEL:NAME from the weights of its model; repeat for several.",
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
    backend: Backend = "auto",
    device: Device = "auto",
    dtype: LoadedDtype = None,
    resolution: Resolution = None,
    int8: Int8 = False,
    threads: Threads = None,
    batch_size: BatchSize = None,
    max_wait: Annotated[
        float,
        hardware_option(
            "--max-wait", min=0.0, max=10_000, metavar="MS", help="Milliseconds to wait for others to share a batch."
        ),
    ] = 5.0,
    allow_code: Annotated[
        bool, hardware_option("--allow-code", help="Run the code inside version-compatible TensorRT engines.")
    ] = False,
    offline: Offline = False,
    max_queued: Annotated[
        int, _limit("--max-queued", min=1, metavar="N", help="Images that may wait; the server answers 503 to more.")
    ] = 256,
    max_images: Annotated[int, _limit("--max-images", min=1, metavar="N", help="Images per request.")] = 10,
    max_prompt: Annotated[int, _limit("--max-prompt", min=1, metavar="N", help="Characters per prompt.")] = 4000,
    max_steps: Annotated[
        int, _limit("--max-steps", min=1, max=1000, metavar="N", help="Sampling steps (NFE) per image.")
    ] = 50,
    max_adapters: Annotated[int, _limit("--max-adapters", min=1, metavar="N", help="Adapters per model.")] = 16,
    timeout: Annotated[
        float,
        _limit("--timeout", min=1.0, metavar="S", help="Seconds for a request to arrive, and again for its answer."),
    ] = 300.0,
) -> None:
    """Serve images over HTTP: OpenAI's images API at /v1, a web page at /, and /health, /info and /metrics."""
    for text in targets or ():
        given_text(text, "TARGET")
    if missing := [name for name in ("fastapi", "uvicorn", "prometheus_client") if find_spec(name) is None]:
        what = f"The image server needs {missing[0].replace('_', '-')}"
        raise MissingDependencyError(what, f"Run: {install_line('server')}")

    from fmg.serving.access import check_token, secret_from
    from fmg.serving.server import Address

    wanted = [_adapter(text) for text in adapters or ()]
    token = secret_from(token_env, required=False)
    check_token(host, token, token_env)
    with reporter_for(stderr()) as reporter, ExitStack() as stack:
        reporter(LOADING)
        from fmg.inference.service.models import ServedModels
        from fmg.inference.service.opening import named_targets, newest_run, open_models
        from fmg.inference.service.server import ImageServer
        from fmg.inference.service.wire import Limits

        named = named_targets(targets or [newest_run()])
        # a taken port is reported before anything is loaded
        address = stack.enter_context(Address(host, port))
        options = {
            "backend": "torch" if adapters and backend == "auto" else backend,
            "device": device,
            "dtype": dtype,
            "resolution": resolution,
            "int8": int8,
            "threads": threads,
            "batch_size": batch_size,
            "allow_code": allow_code,
        }
        models = ServedModels(open_models(named, options, stack, reporter), max_adapters)
        for model, name, run in wanted:
            models.install(models.read_adapter(name, run, model))
        for one in models:
            runtime = one.generator.backend
            reporter(Notice("info", f"{one.name}: {runtime.name} ({runtime.detail}) on {runtime.device}"))
        defaults = Limits()
        limits = Limits(
            max_queued=max_queued,
            max_batch=batch_size or defaults.max_batch,
            gather=max_wait / 1000,
            timeout=timeout,
            max_images=max_images,
            max_prompt=max_prompt,
            max_steps=max_steps,
        )
        ImageServer(models, address, limits=limits, token=token, drain=drain).serve(reporter)


def _adapter(text: str) -> tuple[str | None, str, str]:
    """Model, name and run of `[MODEL:]NAME=RUN`."""
    name, equals, run = text.partition("=")
    model, colon, rest = name.rpartition(":")
    if not equals or not run or not rest:
        raise UsageError(f"--adapter {text}: this is not NAME=RUN", "Write --adapter NAME=RUN, or MODEL:NAME=RUN.")
    return model if colon else None, rest, run
