"""The typed registry: one per component kind, generic over the protocol of that kind."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from types import UnionType
from typing import Any, Generic, TypeGuard, TypeVar, cast, get_args

from pydantic import BaseModel, ValidationError

from fmg.core.errors import FmgError, UsageError, one_line, reason, suggestion
from fmg.core.runtime import beyond_runtime
from fmg.core.stdout_redirect import fenced
from fmg.registry.config import ComponentConfig
from fmg.registry.validation import first_problem
from fmg.version import is_runtime

P = TypeVar("P")
C = TypeVar("C", bound=ComponentConfig)

ENTRY_POINT_GROUP = "fmg.components"
_NAME = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")


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
    """One option of a component; `fields` are its own options if it is a section of them."""

    name: str
    type: str
    default: object
    doc: str
    required: bool
    fields: tuple[FieldInfo, ...] = ()


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

    Args:
        kind: what one component is called.
        rows: the built-in components, of this kind and of others.
        config_base: what the config of every component of this kind derives from.

    Example:
        >>> from fmg.registry import stochasticizers
        >>> stochasticizers.config("asfmc", {"gap": 0.0147}).gap
        0.0147
    """

    def __init__(self, kind: str, rows: tuple[Row, ...], config_base: type[ComponentConfig]) -> None:
        self.kind = kind
        self.plural = f"{kind}s"
        self.config_base = config_base
        self._rows = {row.name: row for row in rows if row.kind == kind}
        self._configs: dict[str, type[ComponentConfig]] = {}
        self._factories: dict[str, Callable[[Any], P]] = {}
        self._loaded_entry_points = False

    def register(self, name: str, config: type[C], summary: str = "") -> Callable[[Callable[[C], P]], Callable[[C], P]]:
        """Registers a class or function that builds a component of this kind from a `C`.

        For components of other packages and of the current session; built-in ones have a row in the catalog.

        Args:
            name: lower-case words joined by hyphens.
            config: class of the options; derives from `config_base`.
            summary: one line for `fmg list`; by default the first line of the docstring.

        Raises:
            UsageError: the name is malformed or taken, or the config has the wrong base class.
        """

        def decorate(factory: Callable[[C], P]) -> Callable[[C], P]:
            target = cast(Any, factory)
            where = f"{target.__module__}:{target.__qualname__}"
            if not issubclass(config, self.config_base):
                raise UsageError(
                    f"The config of the {self.kind} '{name}' is not a {self.config_base.__name__}",
                    f"Derive {config.__name__} from fmg.registry.{self.config_base.__name__}.",
                )
            line = summary or (target.__doc__ or "").strip().split("\n")[0]
            self._insert(Row(self.kind, name, f"{config.__module__}:{config.__qualname__}", where, line))
            self._configs[name] = config
            self._factories[name] = factory
            return factory

        return decorate

    def add(self, name: str, config: str, factory: str, summary: str) -> None:
        """Registers a component by the `module:attribute` paths of its config and factory, importing neither.

        Other packages use it so that listing their components does not import torch.

        Raises:
            UsageError: when the name is malformed or taken.
        """
        self._insert(Row(self.kind, name, config, factory, summary))

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
        """The config class of `name`; imports no torch.

        Raises:
            UsageError: unknown name, or a row that does not name a config class of this kind.
        """
        if name in self._configs:
            return self._configs[name]
        row = self.row(name)
        loaded = self._import(row, row.config)
        if not (isinstance(loaded, type) and issubclass(loaded, self.config_base)):
            raise UsageError(
                f"The {self.kind} '{name}' has the config {row.config}, which is not a {self.config_base.__name__}",
                "Correct the package that registers it.",
            )
        return loaded

    def option_names(self, name: str) -> frozenset[str]:
        """The names of the options of `name`. Errors as `config_class`."""
        return frozenset(self.config_class(name).model_fields)

    def config(self, name: str, options: Mapping[str, object] | None = None) -> ComponentConfig:
        """Validated options of `name`.

        Raises:
            UsageError: unknown name, unknown option (with a suggestion), wrong type or value out of range.
        """
        cls = self.config_class(name)
        try:
            return cls.model_validate(dict(options or {}))
        except ValidationError as error:
            problem = first_problem(error, cls, f"The {self.kind} '{name}'")
            raise UsageError(problem.what, problem.fix) from None

    def build(self, name: str, options: Mapping[str, object] | None = None) -> P:
        """The component `name` with the given options; everything else takes its default.

        Raises:
            UsageError: as `config`, or when the component cannot be imported.
        """
        return self.build_config(name, self.config(name, options))

    def build_config(self, name: str, config: ComponentConfig) -> P:
        """The component `name` from an already validated config."""
        if name not in self._factories:
            row = self.row(name)
            # a module of another package may register its factory itself when it is imported
            factory = self._import(row, row.factory)
            self._factories.setdefault(name, cast("Callable[[Any], P]", factory))
        with fenced(f"The {self.kind} '{name}'"):
            return self._factories[name](config)

    def describe(self, name: str) -> Description:
        """Summary and options of `name`; imports no torch."""
        row, cls = self.row(name), self.config_class(name)
        doc = inspect.cleandoc(cls.__doc__ or "")
        return Description(row.kind, row.name, row.summary, row.config, row.factory, doc, tuple(_fields(cls)))

    def _insert(self, row: Row) -> None:
        if not _NAME.fullmatch(row.name):
            raise UsageError(
                f"'{row.name}' cannot be the name of a {self.kind}", "Use lower-case words joined by hyphens."
            )
        known = self._rows.get(row.name)
        if known is not None and (known.config, known.factory) != (row.config, row.factory):
            raise UsageError(
                f"The {self.kind} '{row.name}' is already registered by {known.factory}",
                f"Register {row.factory} under another name.",
            )
        self._rows[row.name] = row

    def _import(self, row: Row, path: str) -> object:
        try:
            return load(path)
        except FmgError:
            raise
        except (ImportError, AttributeError) as error:
            if isinstance(error, ModuleNotFoundError) and (error.name or "").startswith("fmg.") and is_runtime():
                raise beyond_runtime(f"The {self.kind} '{row.name}'") from None
            raise UsageError(
                f"The {self.kind} '{row.name}' cannot be imported from {path}: {reason(error)}",
                "Install what it needs, or correct the package that registers it.",
            ) from error

    def _load_entry_points(self) -> None:
        if self._loaded_entry_points:
            return
        self._loaded_entry_points = True
        for point in entry_points(group=ENTRY_POINT_GROUP):
            _load_entry_point(point)


def load(path: str) -> object:
    """The attribute behind a `module:attribute` path."""
    module, _, attribute = path.partition(":")
    with fenced(f"The module '{module}'"):
        loaded: object = importlib.import_module(module)
    for part in attribute.split("."):
        loaded = getattr(loaded, part)
    return loaded


def _load_entry_point(point: EntryPoint) -> None:
    try:
        with fenced(f"The plug-in '{point.name}'"):
            point.load()
    except FmgError:
        raise
    except Exception as error:
        raise UsageError(
            f"The plug-in '{point.name}' ({point.value}) failed to import: {one_line(error)}",
            "Fix or uninstall the package that provides it.",
        ) from error


def _fields(cls: type[BaseModel], prefix: str = "") -> Iterator[FieldInfo]:
    for key, info in cls.model_fields.items():
        name = f"{prefix}{key}"
        sections = [kind for kind in _alternatives(info.annotation) if _is_section(kind)]
        yield FieldInfo(
            name=name,
            type=_type_name(info.annotation),
            default=None if info.is_required() else info.get_default(call_default_factory=True, validated_data={}),
            doc=info.description or "",
            required=info.is_required(),
            fields=tuple(field for section in sections for field in _fields(section, f"{name}.")),
        )


def _alternatives(annotation: object) -> tuple[object, ...]:
    return get_args(annotation) if isinstance(annotation, UnionType) else (annotation,)


def _is_section(annotation: object) -> TypeGuard[type[BaseModel]]:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _type_name(annotation: object) -> str:
    if isinstance(annotation, type) and not hasattr(annotation, "__args__"):
        return annotation.__name__
    if any(_is_section(kind) for kind in _alternatives(annotation)):
        return " | ".join("section" if _is_section(kind) else "None" for kind in _alternatives(annotation))
    return str(annotation).replace("typing.", "")
