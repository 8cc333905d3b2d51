"""`fmg fetch`: downloads what a model or a reward reads, after showing size and licence."""

from __future__ import annotations

import sys
from typing import Annotated, cast

import typer

from fmg.cli import completion
from fmg.cli.console import stdout
from fmg.cli.options import Offline
from fmg.cli.tables import table
from fmg.core.errors import UsageError
from fmg.core.offline import is_offline, refuse_offline

_EXTRACTOR = "feature-extractor"
_KINDS = {"reward": "reward", "rewards": "reward", _EXTRACTOR: _EXTRACTOR, f"{_EXTRACTOR}s": _EXTRACTOR}


def fetch(
    names: Annotated[
        list[str],
        typer.Argument(
            metavar="[KIND] NAME",
            help="A model; or reward and a reward, feature-extractor and an extractor.",
            show_default=False,
            autocompletion=completion.components("model"),
        ),
    ],
    config: Annotated[
        str | None,
        typer.Option(
            metavar="F",
            help="Recipe whose model to fetch.",
            show_default="the model's own",
            autocompletion=completion.recipes,
        ),
    ] = None,
    sets: Annotated[
        list[str] | None, typer.Option("--set", metavar="K=V", help="Any value of the recipe, such as model.student.")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    offline: Offline = False,
) -> None:
    """Download the weights of a model, a reward or a feature extractor; size and licence are shown first."""
    match names:
        case [kind, name] if kind in _KINDS:
            _fetch_network(_KINDS[kind], name, yes=yes)
        case [name] | ["model" | "models", name]:
            _fetch_model(name, config, sets or [], yes=yes)
        case _:
            raise UsageError(f"'fmg fetch {' '.join(names)}' names no one thing", "Write fmg fetch [KIND] NAME.")


def _fetch_model(name: str, config: str | None, sets: list[str], *, yes: bool) -> None:
    from fmg.models import fetch as work
    from fmg.models.published import PublishedConfig
    from fmg.models.sources import missing
    from fmg.registry.resolve import resolve

    model = resolve(config, {"model": name}, sets).recipe.model
    parts = model.config.parts() if isinstance(model.config, PublishedConfig) else ()
    wanted = work.downloads(parts)
    out = stdout()
    if not wanted:
        local = [problem for part in parts if (problem := missing(part)) is not None]
        if local:
            raise UsageError(f"The model '{name}': {local[0]}", "Give a hub id, or correct the path.")
        out.print(f"Everything that '{name}' reads is on this computer.")
        return
    if not is_offline():
        wanted = tuple(work.exact(download) for download in wanted)
    rows = [(d.part.what, d.part.source, f"{'' if d.exact else 'about '}{d.size_gb:.1f} GB", d.licence) for d in wanted]
    out.print(table(["part", "from", "size", "licence"], rows))
    refuse_offline(f"fmg fetch {name}", ", ".join(f"'{d.part.source}'" for d in wanted))
    work.check_space(wanted)
    _ask(yes=yes)
    for download in wanted:
        out.print(f"{download.part.what}: {work.fetch(download)}", soft_wrap=True)
    out.print(f"Fetched. Try: fmg train --model {name} --dry-run")


def _fetch_network(kind: str, name: str, *, yes: bool) -> None:
    from fmg.registry import registry_for
    from fmg.rewards.weights import Asset, missing
    from fmg.rewards.weights import fetch as download

    config = registry_for(kind).config(name)
    assets = cast("tuple[Asset, ...]", getattr(config, "assets", tuple)())
    wanted = [asset for asset in assets if missing(asset)]
    out = stdout()
    if not wanted:
        out.print(f"Everything that '{name}' reads is on this computer.")
        return
    out.print(table(["part", "from"], [(asset.what, asset.source) for asset in wanted]))
    for line in config.about.weights:
        out.print(line)
    out.print(f"licence: {config.about.licence}")
    refuse_offline(f"fmg fetch {kind} {name}", ", ".join(f"'{asset.source}'" for asset in wanted))
    _ask(yes=yes)
    for located in download(name, assets, kind=kind):
        if located.asset in wanted:
            out.print(f"{located.asset.what}: {located.pinned}", soft_wrap=True)
    out.print("Fetched.")


def _ask(*, yes: bool) -> None:
    if yes:
        return
    if not sys.stdin.isatty():
        raise UsageError("Nobody is there to agree to the download", "Give --yes.")
    if not typer.confirm("Fetch it, under this licence?"):
        raise UsageError("Nothing was fetched", "Run the command again to fetch it.")
