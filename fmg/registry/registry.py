"""The typed registry: one per component kind, generic over what a component of that kind must be able to do."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar, cast

from pydantic import ValidationError
from pydantic_core import PydanticUndefined

from fmg.core.errors import UsageError, suggestion
from fmg.registry.config import ComponentConfig
from fmg.registry.validation import explain

P = TypeVar("P")
C = TypeVar("C", bound=ComponentConfig)

ENTRY_POINT_GROUP = "fmg.components"


@dataclass(frozen=True)
class Row:
    """One catalog row. `config` and `factory` are `module:attribute` paths, imported only when needed."""

    kind: str
    name: str
    config: str
    factory: str
    summary: str


@dataclass(frozen=True)
class FieldInfo:
    """One option of a component."""

    name: str
    type: str
    default: object
    doc: str
    required: bool


@dataclass(frozen=True)
class Description:
    """What `fmg show` prints: summary, config path, factory path and the options."""

    kind: str
    name: str
    summary: str
    config: str
    factory: str
    doc: str
    fields: tuple[FieldInfo, ...]


class Registry(Generic[P]):
    """Components of one kind by name.

    `names`, `describe` and `config` import only torch-free config modules; `build` imports the factory.

    Example:
        >>> from fmg.registry import stochasticizers
        >>> stochasticizers.build("asfmc", {"gap": 0.0147})  # doctest: +SKIP
    """

    def __init__(self, kind: str, plural: str, rows: tuple[Row, ...], config_base: type[ComponentConfig]) -> None:
        self.kind = kind
        self.plural = plural
        self.config_base = config_base
        self._rows = {row.name: row for row in rows}
        self._factories: dict[str, Callable[[Any], P]] = {}
        self._loaded_entry_points = False

    def register(self, name: str, config: type[C], summary: str = "") -> Callable[[Callable[[C], P]], Callable[[C], P]]:
        """Registers a class or function that turns a `C` into a component of this kind.

        Built-in components have a catalog row, and the decorator checks itself against it; a component without a
        row (third party, through the entry-point group `fmg.components`, or the current session) gets one.

        Raises:
            UsageError: when the name is taken by another component.
        """

        def decorate(factory: Callable[[C], P]) -> Callable[[C], P]:
            target = cast(Any, factory)
            row = Row(
                self.kind,
                name,
                f"{config.__module__}:{config.__qualname__}",
                f"{target.__module__}:{target.__qualname__}",
                summary or (target.__doc__ or "").strip().split("\n")[0],
            )
            known = self._rows.get(name)
            if known is not None and (known.config, known.factory) != (row.config, row.factory):
                raise UsageError(
                    f"The {self.kind} '{name}' is already registered by {known.factory}",
                    f"Register {row.factory} under another name.",
                )
            if known is None:
                self._rows[name] = row
            self._factories[name] = factory
            return factory

        return decorate

    def names(self) -> list[str]:
        """All registered names, sorted."""
        self._load_entry_points()
        return sorted(self._rows)

    def row(self, name: str) -> Row:
        """The catalog row of `name`.

        Raises:
            UsageError: for an unknown name, with a suggestion and the list.
        """
        if name not in self._rows:
            self._load_entry_points()
        if name not in self._rows:
            raise UsageError(f"There is no {self.kind} named '{name}'", suggestion(name, self._rows))
        return self._rows[name]

    def config_class(self, name: str) -> type[ComponentConfig]:
        """The config class of `name`; imports no torch."""
        loaded = load(self.row(name).config)
        if not (isinstance(loaded, type) and issubclass(loaded, ComponentConfig)):
            raise TypeError(f"{self.row(name).config} is not a ComponentConfig")
        return loaded

    def config(self, name: str, options: Mapping[str, object] | None = None) -> ComponentConfig:
        """Validated options of `name`.

        Raises:
            UsageError: unknown name, unknown option (with a suggestion), wrong type or value out of range.
        """
        cls = self.config_class(name)
        try:
            return cls.model_validate(dict(options or {}))
        except ValidationError as error:
            raise UsageError(*explain(error, cls, f"{self.kind} '{name}'")) from None

    def build(self, name: str, options: Mapping[str, object] | None = None) -> P:
        """The component `name` with the given options; everything else takes its default."""
        return self.build_config(name, self.config(name, options))

    def build_config(self, name: str, config: ComponentConfig) -> P:
        """The component `name` from an already validated config."""
        if name not in self._factories:
            # importing the module runs its decorator, which fills the table; a plain attribute works as well
            factory = load(self.row(name).factory)
            self._factories.setdefault(name, cast("Callable[[Any], P]", factory))
        return self._factories[name](config)

    def describe(self, name: str) -> Description:
        """Summary and options of `name`; imports no torch."""
        row, cls = self.row(name), self.config_class(name)
        fields = tuple(
            FieldInfo(
                name=key,
                type=_type_name(info.annotation),
                default=None if info.default is PydanticUndefined else info.default,
                doc=info.description or "",
                required=info.is_required(),
            )
            for key, info in cls.model_fields.items()
        )
        doc = (cls.__doc__ or "").strip()
        return Description(row.kind, row.name, row.summary, row.config, row.factory, doc, fields)

    def _load_entry_points(self) -> None:
        if self._loaded_entry_points:
            return
        self._loaded_entry_points = True
        for point in entry_points(group=ENTRY_POINT_GROUP):
            _load_entry_point(point)


def _load_entry_point(point: EntryPoint) -> None:
    try:
        point.load()
    except UsageError:
        raise
    except Exception as error:
        raise UsageError(
            f"The plug-in '{point.name}' ({point.value}) failed to import: {type(error).__name__}: {error}",
            "Fix or uninstall the package that provides it.",
        ) from error


def load(path: str) -> object:
    """The attribute behind a `module:attribute` path."""
    module, _, attribute = path.partition(":")
    loaded: object = importlib.import_module(module)
    for part in attribute.split("."):
        loaded = getattr(loaded, part)
    return loaded


def _type_name(annotation: object) -> str:
    if isinstance(annotation, type):
        return annotation.__name__
    return str(annotation).replace("typing.", "")
