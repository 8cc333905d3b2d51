from __future__ import annotations

import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType

import pytest
from pydantic import Field

from fmg.core.errors import UsageError
from fmg.registry import ComponentConfig, Registry, optimizers, registry_for, rewards, stochasticizers
from fmg.registry.catalog import REGISTRIES


class Options(ComponentConfig):
    """Options of a test component."""

    size: int = Field(2, ge=1, description="how big")
    tags: tuple[str, ...] = Field(default_factory=lambda: ("a",), description="labels")
    path: str = Field(description="where")


def fresh() -> Registry[object]:
    return Registry("thing", (), ComponentConfig)


@pytest.mark.parametrize("kind", ["prompt-set", "prompt-sets", "prompt_set", "prompt_sets", "Prompt-Sets "])
def test_kinds_in_singular_and_plural(kind: str) -> None:
    assert registry_for(kind).kind == "prompt-set"
    assert registry_for("optimizers") is registry_for("optimizer") is optimizers


def test_unknown_kind_gets_a_suggestion_and_the_list() -> None:
    with pytest.raises(
        UsageError,
        match=r"no kind of component named 'reword'. Did you mean 'rewards'\? Known: backends, feature-extractors, ",
    ):
        registry_for("reword")


@pytest.mark.parametrize("registry", REGISTRIES, ids=lambda r: r.plural)
def test_every_catalog_row_leads_to_its_component(registry: Registry[object]) -> None:
    from fmg.registry.catalog import ROWS
    from fmg.registry.registry import load

    rows = [row for row in ROWS if row.kind == registry.kind]
    assert rows
    for row in rows:
        description = registry.describe(row.name)
        assert row.summary.rstrip(".") == row.summary != ""
        assert description.doc
        assert all(field.doc for field in description.fields), f"an option of {row.name} has no description"
        factory = load(row.factory)
        # a component of the package needs no decorator; one that is used registers this very object
        assert registry._factories.get(row.name, factory) is factory


def test_decorated_factories_are_built_with_their_typed_config() -> None:
    registry = fresh()

    @registry.register("mine", Options, "a thing")
    def make(config: Options) -> object:
        return (config.path, config.size)

    assert registry.names() == ["mine"]
    assert registry.build("mine", {"path": "x"}) == ("x", 2)
    assert registry.describe("mine").summary == "a thing"
    fields = {f.name: (f.type, f.default, f.doc, f.required) for f in registry.describe("mine").fields}
    assert fields == {
        "size": ("int", 2, "how big", False),
        "tags": ("tuple[str, ...]", ("a",), "labels", False),
        "path": ("str", None, "where", True),
    }


def test_option_mistakes() -> None:
    registry = fresh()
    registry.register("mine", Options)(lambda config: config)
    for options, text in [
        ({"pth": "x"}, "The thing 'mine' needs the option 'path'. Give 'path': where."),
        (
            {"path": "x", "siez": 1},
            "The thing 'mine' has no option 'siez'. Did you mean 'size'? Known: path, size, tags.",
        ),
        ({"path": "x", "size": 0}, "The thing 'mine': option 'size' must be greater than or equal to 1 (given: 0)."),
    ]:
        with pytest.raises(UsageError) as caught:
            registry.build("mine", options)
        assert str(caught.value).startswith(text)


def test_names_are_lower_case_words() -> None:
    for name in ("Mine", "my_thing", "", "a b", "-a", "a--b"):
        with pytest.raises(UsageError, match="cannot be the name of a thing"):
            fresh().register(name, Options)(lambda config: config)


def test_a_taken_name_is_refused_and_the_first_owner_stays() -> None:
    registry = fresh()
    registry.add("mine", "a:Config", "a:make", "first")
    with pytest.raises(UsageError, match=r"The thing 'mine' is already registered by a:make\. Register b:make under"):
        registry.add("mine", "b:Config", "b:make", "second")
    assert registry.row("mine").factory == "a:make"
    with pytest.raises(UsageError, match="already registered by fmg"):
        rewards.register("shapes", Options)(lambda config: lambda images, prompts: None)  # type: ignore[arg-type,return-value]


def test_registering_the_same_thing_again_is_allowed() -> None:
    registry = fresh()
    for _ in range(2):
        registry.add("mine", "a:Config", "a:make", "again")
    assert registry.names() == ["mine"]


def test_a_config_of_another_kind_is_refused() -> None:
    with pytest.raises(UsageError, match=r"is not a StochasticizerConfig\. Derive Options from"):
        stochasticizers.register("mine", Options)(lambda config: None)  # type: ignore[arg-type,return-value]
    stochasticizers.add("mine", f"{__name__}:Options", f"{__name__}:fresh", "wrong base")
    with pytest.raises(UsageError, match="which is not a StochasticizerConfig"):
        stochasticizers.config("mine")


def test_rows_that_lead_nowhere() -> None:
    registry = fresh()
    registry.add("mine", "no_such_module_anywhere:Config", "x:y", "broken")
    with pytest.raises(UsageError, match="cannot be imported from no_such_module_anywhere:Config: No module named"):
        registry.config("mine")


def _plug_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, source: str) -> None:
    (tmp_path / "plugged_in.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "plugged_in", raising=False)
    point = EntryPoint("plugged", "plugged_in", "fmg.components")
    monkeypatch.setattr("fmg.registry.registry.entry_points", lambda group: [point] if group == point.group else [])


def test_plug_ins_are_found_through_their_entry_point(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    source = 'import host\nhost.registry.add("theirs", "their.configs:C", "their.module:make", "from outside")\n'
    _plug_in(monkeypatch, tmp_path, source)
    host = ModuleType("host")
    host.registry = fresh()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "host", host)
    assert host.registry.names() == ["theirs"]
    assert host.registry.row("theirs").summary == "from outside"


def test_a_broken_plug_in_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _plug_in(monkeypatch, tmp_path, "1 / 0\n")
    with pytest.raises(UsageError, match=r"The plug-in 'plugged' \(plugged_in\) failed to import: ZeroDivisionError"):
        fresh().names()
