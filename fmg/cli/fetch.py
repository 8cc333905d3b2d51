"""`fmg fetch`: downloads the weights of a model, a reward or a feature extractor."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from fmg.cli import completion
from fmg.cli.options import Offline, reward_options
from fmg.cli.output import stdout, table
from fmg.core import hub
from fmg.core.errors import UsageError

if TYPE_CHECKING:
    from fmg.registry.config import ComponentConfig

_EXTRACTOR = "feature-extractor"
_KINDS = {"reward": "reward", "rewards": "reward", _EXTRACTOR: _EXTRACTOR, f"{_EXTRACTOR}s": _EXTRACTOR}


def fetch(
    names: Annotated[
        list[str],
        typer.Argument(
            metavar="NAME",
            help="A model; or a kind (reward, feature-extractor) and one of its names.",
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
        list[str] | None,
        typer.Option(
            "--set",
            metavar="K=V",
            help="Any value of the recipe, such as model.student; for a reward or a feature extractor, one of its"
            " options.",
        ),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask for confirmation.")] = False,
    offline: Offline = False,
) -> None:
    """Download the weights of a model, a reward or a feature extractor, after showing their size and licence."""
    match names:
        case [kind, name] if kind in _KINDS:
            from fmg.registry import registry_for

            options = reward_options([f"options.{text}" for text in sets or ()]).get("options")
            _fetch(_KINDS[kind], name, registry_for(_KINDS[kind]).config(name, options), yes=yes)
        case [name] | ["model" | "models", name]:
            from fmg.recipe import resolve

            _fetch("model", name, resolve(config, {"model": name}, sets or []).recipe.model.config, yes=yes)
        case _:
            raise UsageError(
                f"'fmg fetch {' '.join(names)}' does not name one component", "Write fmg fetch [KIND] NAME."
            )


def _fetch(kind: str, name: str, config: ComponentConfig, *, yes: bool) -> None:
    assets = config.assets()
    wanted = hub.downloads(assets)
    out = stdout()
    if not wanted:
        local = [problem for asset in assets if (problem := hub.problem(asset)) is not None]
        if local:
            raise UsageError(f"The {kind} '{name}': {local[0]}", "Give a hub id, or correct the path.")
        out.print(f"Everything that '{name}' needs is on this computer.")
        return
    if not hub.is_offline():
        wanted = tuple(hub.exact(download) for download in wanted)
    rows = [(d.asset.what, d.asset.source, _size(d), d.licence or config.about.licence) for d in wanted]
    out.print(table(["part", "from", "size", "licence"], rows))
    options = config.source_options()
    hub.refuse_offline(hub.fetch_command(kind, name, options), ", ".join(f"'{d.asset.source}'" for d in wanted))
    hub.check_space(wanted)
    _ask(yes=yes)
    for download in wanted:
        out.print(f"{download.asset.what}: {hub.fetch(download.asset, kind, name).pinned}", soft_wrap=True)
    train = f" Try: fmg train --model {name}{hub.set_flags(kind, options)} --dry-run" if kind == "model" else ""
    out.print(f"Fetched.{train}", soft_wrap=True)


def _size(download: hub.Download) -> str:
    size = download.size_gb
    if not size:
        return "-"
    about = "" if download.exact else "about "
    return f"{about}{size:.1f} GB" if size >= 0.1 else f"{about}{max(1, round(1000 * size))} MB"


def _ask(*, yes: bool) -> None:
    if yes:
        return
    if not sys.stdin.isatty():
        raise UsageError("The download needs your consent, and stdin is not a terminal", "Give --yes.")
    if not typer.confirm("Download under this licence?"):
        raise UsageError("Nothing was downloaded", "Run the command again, and confirm the download.")
