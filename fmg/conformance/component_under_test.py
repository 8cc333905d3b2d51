"""The component under test: a registered name, what a module registers, or a plain function as a reward."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fmg.core.errors import FmgError, UsageError, one_line
from fmg.recipe.sections import PYTHON_REWARD
from fmg.registry.catalog import REGISTRIES, registry_for, rewards
from fmg.registry.config import ComponentConfig
from fmg.registry.registry import Registry, Row, load


@dataclass(frozen=True)
class ComponentUnderTest:
    """A component and the options that it is checked with."""

    registry: Registry[Any]
    row: Row
    config: ComponentConfig

    @property
    def name(self) -> str:
        return self.row.name

    @property
    def kind(self) -> str:
        return self.row.kind

    @property
    def built_in(self) -> bool:
        return self.row.factory.startswith("fmg.")

    def build(self) -> Any:
        """A new instance.

        Raises:
            FmgError: when it cannot be imported or built.
        """
        return self.registry.build_config(self.name, self.config)


def find_component(target: str, name: str | None, options: Mapping[str, object]) -> ComponentUnderTest:
    """The component `name` of the kind `target`; without a name, the one behind the path `target`.

    Args:
        target: a kind, or `module:attribute` of a factory that is registered, by its decorator or by an entry point,
            or of a plain function `fn(images, prompts)`, which is a reward. Modules are looked up in the working
            directory first.
        name: a registered name.
        options: options of the component.

    Raises:
        UsageError: unknown kind, name or option; a module that is missing, or an attribute that is not registered.
    """
    if name is not None:
        registry = registry_for(target)
        return ComponentUnderTest(registry, registry.row(name), registry.config(name, options))
    if ":" not in target:
        raise UsageError(
            f"'{target}' is neither a kind with a name nor module:attribute",
            "Write `fmg check-component my_pkg:MyReward`, or `fmg check-component reward my-reward`.",
        )
    factory = _imported(target)
    for registry in REGISTRIES:
        for known in registry.names():
            if registry.row(known).factory == target:
                return ComponentUnderTest(registry, registry.row(known), registry.config(known, options))
    if inspect.isfunction(factory):
        config = rewards.config(PYTHON_REWARD, {"target": target, **options})
        return ComponentUnderTest(rewards, rewards.row(PYTHON_REWARD), config)
    raise UsageError(
        f"'{target}' is not registered",
        "Decorate it with @<registry>.register(name, Config), or name an entry point of the group fmg.components.",
    )


def _imported(target: str) -> object:
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        return load(target)
    except FmgError:
        raise
    except (Exception, SystemExit) as error:
        raise UsageError(
            f"'{target}' cannot be imported: {one_line(error)}", "Install its package, or run where its module is."
        ) from None
