"""Recipe values that can be published: without local paths and addresses. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path, PureWindowsPath
from typing import Any
from urllib.parse import urlsplit

from fmg.core.hub import cached_place, names_a_file
from fmg.recipe.document import leaves
from fmg.recipe.recipe import Recipe

# options that hold a path or an address, whatever their value looks like
_PATH, _ADDRESS, _FOLDER = "path", "url", "folder"
# trackers name accounts and servers of the owner, and the result does not depend on them
_TRACKERS = "trackers"
_LOCAL = re.compile(r"~|\.{1,2}[/\\]")
_URL = re.compile(r"(?P<scheme>https?://)([^/?#]*@)?(?P<place>[^?#]*).*", re.DOTALL)


def shareable(value: object) -> Any:
    """The values with paths cut to their last part, and server addresses to their port.

    A path in the hub's cache becomes the repository and the commit that it belongs to. The URL of a file loses its
    user, query and fragment, which can contain secrets. Trackers are left out.
    """
    if isinstance(value, Mapping):
        return {key: _named(key, child) for key, child in value.items()}
    if isinstance(value, (list, tuple)):
        return [shareable(child) for child in value]
    if isinstance(value, str) and (is_local(value) or names_a_file(value)):
        return _published(value) or _last(value)
    if isinstance(value, str) and (address := _URL.fullmatch(value)) is not None:
        return address["scheme"] + address["place"]
    return value


def is_local(text: str) -> bool:
    """Whether a value is a path that begins at the root, the home or the working directory of some computer."""
    return Path(text).is_absolute() or PureWindowsPath(text).is_absolute() or _LOCAL.match(text) is not None


def changes(recipe: Recipe) -> dict[str, tuple[str, str]]:
    """The values of a recipe that `shareable` replaces, by dotted path: before and after."""
    before: dict[str, Any] = dict(leaves(recipe.plain(), into_lists=True))
    after: dict[str, Any] = dict(leaves(shareable(recipe.plain()), into_lists=True))
    return {path: (before[path], value) for path, value in after.items() if before.get(path, value) != value}


def published(recipe: Recipe) -> Recipe:
    """The recipe with its values as `shareable` gives them."""
    values: dict[str, object] = {path: after for path, (_, after) in changes(recipe).items()}
    return recipe.with_({**values, _TRACKERS: []} if recipe.trackers else values)


def local_base(recipe: Recipe) -> tuple[str, str] | None:
    """A model option that refers to files nobody else has, and its value; None if there is none.

    An adapter works only with the base that it was trained on, so a recipe with such a base is of no use elsewhere.
    """
    config = recipe.model.config
    assets = config.assets()
    for asset in assets:
        if isinstance(asset.place, Path) and _published(asset.source) is None:
            return asset.option, asset.source
    known = {asset.source for asset in assets}
    for path, value in leaves(config.model_dump(mode="json"), ("model",), into_lists=True):
        if not isinstance(value, str) or value in known or _published(value) is not None:
            continue
        if path == f"model.{_FOLDER}" or is_local(value):
            return path, value
    return None


def _named(key: object, value: object) -> object:
    if key == _TRACKERS:
        return []
    if isinstance(value, str) and key == _PATH:
        return _last(value)
    if isinstance(value, str) and key == _ADDRESS and (parts := urlsplit(value)).hostname is not None:
        port = "" if parts.port is None else f":{parts.port}"
        return f"{parts.scheme}://localhost{port}"
    return shareable(value)


def _published(text: str) -> str | None:
    """The source of a path in the hub's cache, as `fmg.core.hub.parse_source` takes it."""
    place = cached_place(Path(text))
    if place is None:
        return None
    source, file = place
    return f"{source.repository}@{source.revision}{':' if file else ''}{file}"


def _last(text: str) -> str:
    return PureWindowsPath(text).name or text
