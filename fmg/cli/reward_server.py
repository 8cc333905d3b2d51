"""`fmg reward-server`: scores images for training runs in other processes or on other machines."""

from __future__ import annotations

from typing import Annotated

import typer

from fmg.cli import completion
from fmg.cli.options import Device, reward_options
from fmg.cli.output import stderr
from fmg.core.errors import UsageError
from fmg.core.runtime import require
from fmg.progress.reporters import reporter_for


def reward_server(
    reward: Annotated[
        list[str],
        typer.Option(
            metavar="N",
            help="Reward to serve; repeat for several.",
            show_default=False,
            autocompletion=completion.components("reward"),
        ),
    ],
    sets: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="NAME.OPTION=VALUE", help="Option of a reward; repeat for several.", show_default=False
        ),
    ] = None,
    host: Annotated[
        str, typer.Option(metavar="A", help="Address to listen on; any but loopback needs a token.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, metavar="N", help="Port; 0 picks a free one.")] = 8765,
    token_env: Annotated[
        str, typer.Option(metavar="VAR", help="Environment variable that holds the token clients must send.")
    ] = "FMG_REWARD_TOKEN",
    drain: Annotated[
        float, typer.Option(min=0.0, metavar="S", help="Seconds to finish accepted requests after SIGTERM or Ctrl-C.")
    ] = 10.0,
    device: Device = "auto",
    max_batch: Annotated[int, typer.Option(min=1, metavar="N", help="Largest batch to score.")] = 64,
    max_queued: Annotated[
        int, typer.Option(min=1, metavar="N", help="Images that may wait; beyond that the server answers 503.")
    ] = 1024,
    max_images: Annotated[int, typer.Option(min=1, metavar="N", help="Images per request.")] = 256,
    max_mib: Annotated[int, typer.Option(min=1, metavar="N", help="Largest request to accept, in MiB.")] = 256,
    timeout: Annotated[
        float,
        typer.Option(
            min=1.0,
            metavar="S",
            help="Seconds for a request to arrive (5 to 20 of them for its headers), and as many to score it.",
        ),
    ] = 300.0,
) -> None:
    """Serve rewards over HTTP: GET /health, GET /info, POST /score. Receives only images and prompts.

    Train with it: `fmg train --reward remote --set rewards.0.url=http://HOST:PORT`.
    """
    options = reward_options(sets or ())
    unused = sorted(set(options) - set(reward))
    if unused:
        raise UsageError(f"--set {unused[0]}: this reward is not served", f"Add --reward {unused[0]}.")
    require("The reward server", "fastapi", "uvicorn", extra="server")

    from fmg.inference.torch_backend import pick_device
    from fmg.rewards.base import build_rewards, reward_refs
    from fmg.rewards.service.batching import Limits
    from fmg.rewards.service.server import RewardServer, describe
    from fmg.serving.access import secret_from
    from fmg.serving.server import leaving_work

    limits = Limits(
        max_body=max_mib << 20, max_images=max_images, max_queued=max_queued, max_batch=max_batch, timeout=timeout
    )
    torch_device = pick_device(device)
    wanted = reward_refs(reward, options)
    rewards = build_rewards(wanted)
    info = describe(rewards, wanted, torch_device)
    token = secret_from(token_env, required=False)
    with reporter_for(stderr()) as reporter:
        server = RewardServer(
            rewards, info, host=host, port=port, limits=limits, token=token, device=torch_device, drain=drain
        )
        with leaving_work(server.close):
            server.serve(reporter)
