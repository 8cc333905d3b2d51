"""`Recipe`, the description of a run, and `resolve`, which merges its layers and records the source of each value.

Imports no torch.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import cast

from pydantic import ValidationError

from fmg.core.display import counted, html_text
from fmg.core.errors import CompositionError, UsageError, WrongTypeError, python_call, suggestion
from fmg.core.files import RECIPE, SUMS, from_home
from fmg.recipe.composition import problems
from fmg.recipe.document import Node, Plain, Source, leaves, node_of, read_document, render
from fmg.recipe.layers import (
    AUTO,
    EXTENDS,
    anchored,
    argument_layers,
    flag_layers,
    merge,
    merge_all,
    refuse_code,
    set_layers,
)
from fmg.recipe.sections import ModelRef, RecipeFields
from fmg.registry.catalog import models
from fmg.registry.config import ModelConfig
from fmg.registry.validation import Problem, first_problem, validate_strictly

DEFAULT_MODEL = "meanflow-shapes"
_STUDIES = "study-*"
"""Folders of recipes that are compared with each other, below that of the shipped recipes."""
_BESIDE_IT = ("run.json", SUMS)
_DEFAULT = Source("built-in", "default")
_PACKAGE = Path(__file__).resolve().parent.parent


class Recipe(RecipeFields):
    """Everything that determines a training run. Immutable and validated; components are resolved to typed configs.

    Example:
        >>> from fmg import Recipe
        >>> recipe = Recipe.default(model="meanflow-shapes", **{"train.iterations": 3})
        >>> recipe.with_(iterations=5, **{"objective.kl_beta": 0.01})
        Recipe(meanflow-shapes, asfmc, grpo, rewards: shapes, 5 iterations)
    """

    @classmethod
    @python_call
    def default(cls, model: str | None = None, **overrides: object) -> Recipe:
        """The default recipe of a model with some values replaced.

        Args:
            model: name of a model; the embedded two-time model when None.
            overrides: dotted path of the recipe → value, as `**{"train.iterations": 3}`, or a flag of `fmg train` →
                value, as `iterations=3`.

        Raises:
            UsageError: unknown name or key, wrong type, value out of range.
            CompositionError: components that do not fit together.
        """
        return resolve_arguments(overrides if model is None else {"model": model, **overrides}).recipe

    @classmethod
    @python_call
    def from_yaml(cls, path: str | Path, *, allow_code: bool = False) -> Recipe:
        """The recipe in a file, over the default recipe of the model that it names. Errors as in `resolve`."""
        return resolve(Path(path), allow_code=allow_code).recipe

    @classmethod
    @python_call
    def of_run(cls, path: str | Path, *, allow_code: bool = False) -> Recipe:
        """The recipe of a run folder, `recipe.yaml`, with which the run was made. Errors as in `resolve`."""
        return resolve_run(path, allow_code=allow_code).recipe

    @python_call
    def with_(self, values: Mapping[str, object] | None = None, /, **overrides: object) -> Recipe:
        """This recipe with some values replaced; another component's name drops the old options.

        Args:
            values: as `overrides`, for keys that are not Python identifiers.
            overrides: as in `default`: `recipe.with_(iterations=3, **{"lora.rank": 4})`.

        Raises:
            UsageError: unknown name or key, wrong type, value out of range.
            CompositionError: components that do not fit together.
        """
        return override(self, {**(values or {}), **overrides}).recipe

    def to_yaml(self) -> str:
        """YAML 1.2 that `from_yaml` reads back to an equal recipe; relative prompt files are relative to its file."""
        return render(self.plain(), {})

    def __repr__(self) -> str:
        rewards = " + ".join(ref.label if ref.weight == 1 else f"{ref.weight:g} {ref.label}" for ref in self.rewards)
        parts = (self.model.name, self.stochasticizer.name, self.objective.name, f"rewards: {rewards}")
        return f"Recipe({', '.join(parts)}, {counted(self.train.iterations, 'iteration')})"

    __str__ = __repr__

    def _repr_html_(self) -> str:
        return html_text(repr(self), self.to_yaml())


@dataclass(frozen=True)
class Row:
    """One value of a resolved recipe: dotted path, value, and where it came from."""

    path: str
    value: Plain
    source: Source


@dataclass(frozen=True)
class ResolvedRecipe:
    """A recipe and the source of each of its values, by dotted path (`rewards.0.weight`)."""

    recipe: Recipe
    provenance: Mapping[str, Source]

    def __repr__(self) -> str:
        return f"Resolved{self.recipe!r}"

    def _repr_html_(self) -> str:
        return html_text(repr(self), self.to_yaml())

    def table(self) -> tuple[Row, ...]:
        """All values in the recipe's order, with their sources."""
        return tuple(Row(path, value, self.provenance[path]) for path, value in leaves(self.recipe.plain()))

    def with_(self, values: Mapping[str, object], why: str) -> ResolvedRecipe:
        """The recipe with other values, which come from `why` unless given explicitly. Errors as in `resolve`.

        Args:
            values: values by dotted path.
            why: the end-of-line comment of a value that was not given.
        """
        changed = {path: Source("built-in", why) for path in values if self.provenance[path].kind == "built-in"}
        return ResolvedRecipe(self.recipe.with_(values), {**self.provenance, **changed})

    def to_yaml(self) -> str:
        """The recipe as YAML, the source of each value as a comment at its line's end."""
        return render(self.recipe.plain(), {path: source.text for path, source in self.provenance.items()})


def resolve(
    config: str | Path | None = None,
    flags: Mapping[str, object] | None = None,
    sets: Sequence[str] = (),
    allow_code: bool = False,
) -> ResolvedRecipe:
    """Merges the layers of a recipe: the model's own default recipe < `config` < `flags` < `sets`.

    The recipe of a run folder states every option of its version of fmg; newer options take their built-in values, as
    in `resolve_run`, so that the same run is repeated. Reads no weights and imports no torch.

    Args:
        config: path of a YAML file, or the name of a shipped recipe.
        flags: the flags of `fmg.recipe.layers.FLAGS` by name; None means not given. `reward` is a list of
            `NAME[=WEIGHT]` or `python:module:function[=WEIGHT]` and replaces the recipe's rewards.
        sets: `path=value` texts, the value in YAML 1.2.
        allow_code: whether a recipe file may name reward code to run and servers to send images to.

    Raises:
        UsageError: a wrong name, key, type or range, with the file and line or the flag that gave it.
        CompositionError: components that do not fit together.
    """
    layers = [*flag_layers(flags or {}), *set_layers(sets)]
    if config is None:
        return _resolve(layers, allow_code=allow_code)
    return _over_file(config, layers, allow_code=allow_code)


def resolve_run(path: str | Path, *, allow_code: bool = False) -> ResolvedRecipe:
    """The recipe of a run folder, which states every option of its version of fmg.

    Newer options take their built-in values, which keep the earlier behaviour, and not those of the model's default
    recipe. Errors as in `resolve`.
    """
    return _finish(merge_all([_read(Path(path))]), allow_code=allow_code)


def resolve_arguments(values: Mapping[str, object]) -> ResolvedRecipe:
    """The default recipe of a model with the values at some dotted paths replaced. Errors as in `resolve`."""
    return _resolve(argument_layers(values), allow_code=True)


def recipe_of(
    given: str | PathLike[str] | Mapping[str, object] | Recipe | ResolvedRecipe | None,
    values: Mapping[str, object] | None = None,
    *,
    allow_code: bool = False,
) -> ResolvedRecipe:
    """The recipe that an argument of a Python call means.

    Args:
        given: a recipe; the name of a shipped one, or of a model, whose default recipe is taken; the path of a file;
            a mapping of sections; None is the default recipe of the embedded two-time model.
        values: replaced in it, by dotted path or short name (`fmg.recipe.layers.ARGUMENTS`).
        allow_code: whether a recipe file may name reward code to run and servers to send images to.

    Raises:
        WrongTypeError: it is none of these.
        UsageError: as in `resolve`.
        CompositionError: as in `resolve`.
    """
    values = values or {}
    if isinstance(given, ResolvedRecipe):
        return override(given.recipe, values) if values else given
    if isinstance(given, Recipe):
        return override(given, values)
    if given is None:
        return resolve_arguments(values)
    if isinstance(given, Mapping):
        return _resolve([node_of(given, Source("argument", "recipe")), *argument_layers(values)], allow_code=True)
    if not isinstance(given, (str, PathLike)):
        raise WrongTypeError("recipe", given, "a Recipe, the name of a model or of a shipped recipe, or a path")
    if isinstance(given, str) and given not in recipe_names() and given in models.names() and not Path(given).exists():
        return resolve_arguments({"model": given, **values})
    config = given if isinstance(given, str) else Path(given)
    return _over_file(config, argument_layers(values), allow_code=allow_code)


def override(recipe: Recipe, values: Mapping[str, object]) -> ResolvedRecipe:
    """`recipe` with the values at some dotted paths replaced. Errors as in `resolve`."""
    base = node_of(recipe.plain(), Source("argument", "recipe"))
    return _finish(merge_all([base, *argument_layers(values)]), allow_code=True)


def _over_file(config: str | Path, layers: Sequence[Node], *, allow_code: bool) -> ResolvedRecipe:
    """The layers over those of a recipe file, or of a shipped recipe."""
    path = from_home(config)
    if path.name == RECIPE and any((path.parent / name).is_file() for name in _BESIDE_IT):
        return _finish(merge_all([_read(config), *layers]), allow_code=allow_code)
    return _resolve([_read(config), *layers], allow_code=allow_code)


def _resolve(layers: Sequence[Node], *, allow_code: bool) -> ResolvedRecipe:
    start = node_of({"model": {"name": DEFAULT_MODEL}}, _DEFAULT)
    given = merge_all([start, *layers])
    base = _default_recipe(_default_recipe_name(given))
    needed = (section for section in Recipe.model_fields if section != "trackers")
    missing = [section for section in needed if section not in (base.mapping or {})]
    if missing:
        # a section left out would fall back on numbers that were chosen for another model
        what = f"{base.source.text}: the default recipe of the model lacks the section '{missing[0]}'"
        raise UsageError(what, "A model's own recipe states every section; add it.")
    return _finish(merge_all([base, *layers]), allow_code=allow_code)


def _default_recipe_name(root: Node) -> str:
    name = root.exact(("model", "name"))
    if name is not None and name.value in models.names():
        stated = cast("type[ModelConfig]", models.config_class(str(name.value))).recipe
        if stated is not None:
            return stated
    return _model(root).config.spec().default_recipe


def _default_recipe(name: str) -> Node:
    if Path(name).is_absolute():
        return anchored(read_document(Path(name), "model", name), Path(name).parent)
    return read_document(config_path(name), "model", f"configs/{name}.yaml")


def _read(config: str | Path) -> Node:
    text = str(config)
    path = from_home(config)
    shipped = isinstance(config, str) and text in recipe_names()
    looks_like_path = isinstance(config, Path) or path.suffix in (".yaml", ".yml") or len(path.parts) > 1
    try:
        exists, is_file = path.exists(), path.is_file()
    except OSError as error:
        raise UsageError(f"{text} cannot be read as a recipe: {error.strerror}", "Check its path.") from None
    if is_file or (looks_like_path and not shipped):
        return _extended(path, text)
    if shipped:
        return _extended(config_path(text), f"configs/{text}.yaml")
    if exists:
        return _extended(path, text)
    known = {*recipe_names(), *models.names()}
    raise UsageError(f"There is no recipe file and no shipped recipe named '{text}'", suggestion(text, known))


def _extended(path: Path, label: str, above: tuple[Path, ...] = ()) -> Node:
    """The values of a recipe file over those of the recipe that it extends: a shipped one, or a file relative to it."""
    root = anchored(read_document(path, "file", label), path.parent)
    named = root.exact((EXTENDS,))
    if named is None:
        return root
    own = Node({key: value for key, value in (root.mapping or {}).items() if key != EXTENDS}, root.source)
    text = named.value
    if not isinstance(text, str) or not text:
        fix = f"Write, for example, {EXTENDS}: sd35-meanflow."
        raise UsageError(f"{named.source.text}: '{EXTENDS}' is not the name or the file of a recipe", fix)
    file = path.parent / text
    if text in recipe_names():
        below, called = config_path(text), f"configs/{text}.yaml"
    elif file.is_file():
        below, called = file, str(Path(label).parent / text)
    else:
        what = f"{named.source.text}: there is no recipe file and no shipped recipe named '{text}'"
        raise UsageError(what, suggestion(text, recipe_names()))
    chain = (*above, path.resolve())
    if below.resolve() in chain:
        raise UsageError(f"{named.source.text}: the recipe extends itself", f"Remove one '{EXTENDS}'.")
    return merge_all([_extended(below, called, chain), own])


def _model(root: Node) -> ModelRef:
    section = (root.mapping or {})["model"]
    try:
        return validate_strictly(ModelRef, section.plain())
    except ValidationError as error:
        problem = first_problem(error, ModelRef, "The section 'model'", "key")
        raise _located(Problem(("model", *problem.location), problem.what, problem.fix), root) from None


def _finish(root: Node, *, allow_code: bool) -> ResolvedRecipe:
    refuse_code(root, allowed=allow_code)
    root = _with_default_stochasticizer(root)
    try:
        recipe = validate_strictly(Recipe, root.plain())
    except ValidationError as error:
        raise _located(first_problem(error, Recipe, "The recipe", "key"), root) from None
    for problem in problems(recipe):
        raise _located(problem, root, CompositionError)
    given = {path: root.exact(path.split(".")) for path, _ in leaves(recipe.plain())}
    return ResolvedRecipe(recipe, {path: _DEFAULT if node is None else node.source for path, node in given.items()})


def _with_default_stochasticizer(root: Node) -> Node:
    name = root.exact(("stochasticizer", "name"))
    # without a model there is no default; the error then names the missing model
    if name is None or name.value != AUTO or root.exact(("model",)) is None:
        return root
    model = _model(root)
    default, options = model.config.spec().default_stochasticizer
    source = Source("model", f"{AUTO}: the default of {model.name}")
    asked = root.exact(("stochasticizer",))
    own = {key: option for key, option in ((asked and asked.mapping) or {}).items() if key != "name"}
    section = merge(node_of({"name": default, **dict(options)}, source), Node(own, source), "stochasticizer")
    return Node({**(root.mapping or {}), "stochasticizer": section}, root.source)


def _located(problem: Problem, root: Node, error: type[UsageError] = UsageError) -> UsageError:
    source = root.find(problem.location).source
    lead = "" if source.kind in ("built-in", "argument") else f"{source.text}: "
    return error(f"{lead}{problem.what}", problem.fix)


def configs_folder() -> Path:
    """The folder of shipped recipes: `fmg/configs` in an installed package, `configs/` in a source checkout.

    Raises:
        UsageError: when the installation has neither.
    """
    installed = _PACKAGE / "configs"
    if installed.is_dir():
        return installed
    checkout = _PACKAGE.parent / "configs"
    if checkout.is_dir() and (_PACKAGE.parent / "pyproject.toml").is_file():
        return checkout
    raise UsageError("The recipes that ship with fmg are missing from this installation", "Install fmg again.")


def recipe_names() -> list[str]:
    """Names of the shipped recipes, sorted; those of a study are in a folder of their own (`study-sd35/null`)."""
    folder = configs_folder()
    files = [*folder.glob("*.yaml"), *folder.glob(f"{_STUDIES}/*.yaml")]
    return sorted(path.relative_to(folder).with_suffix("").as_posix() for path in files)


def editor_line(name: str) -> str:
    """First line of a shipped recipe: where its schema is, so that editors check and complete it."""
    return f"# yaml-language-server: $schema={'../' * name.count('/')}recipe.schema.json"


def recipe_summary(name: str) -> str:
    """What a shipped recipe is for: the first sentence of its leading comment.

    Raises:
        UsageError: for an unknown name, with a suggestion and the list.
    """
    lines = config_path(name).read_text(encoding="utf-8").splitlines()
    start = int(lines[:1] == [editor_line(name)])
    comment = itertools.takewhile(lambda line: line.startswith("#"), lines[start:])
    return " ".join(line.removeprefix("#").strip() for line in comment).partition(". ")[0].rstrip(".")


def config_path(name: str) -> Path:
    """The file of a shipped recipe.

    Raises:
        UsageError: for an unknown name, with a suggestion and the list.
    """
    known = recipe_names()
    if name not in known:
        raise UsageError(f"There is no shipped recipe named '{name}'", suggestion(name, known))
    return configs_folder() / f"{name}.yaml"
