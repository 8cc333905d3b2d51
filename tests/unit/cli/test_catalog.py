from __future__ import annotations

import json

import pytest

from fmg.registry.catalog import REGISTRIES
from tests.support.cli import fmg


def test_list_names_every_component_of_every_kind() -> None:
    shown = fmg("list")
    assert shown.code == 0
    for registry in REGISTRIES:
        for name in registry.names():
            assert any(line.split()[:2] == [registry.kind, name] for line in shown.stdout.splitlines())


@pytest.mark.parametrize("kind", ["reward", "rewards", "prompt-set", "prompt_sets"])
def test_a_kind_may_be_singular_or_plural(kind: str) -> None:
    rows = json.loads(fmg("list", kind, "--json").stdout)
    assert {row["kind"] for row in rows} == {kind.rstrip("s").replace("_", "-")}


def test_show_states_type_default_range_and_meaning_of_every_option() -> None:
    shown = fmg("show", "objective", "grpo")
    line = next(line for line in shown.stdout.splitlines() if line.startswith("clip_range"))
    assert line.split()[:3] == ["clip_range", "float", "0.0001"]
    assert "> 0 and < 1" in line
    assert "half-width of the ratio clip" in line


def test_show_says_where_published_weights_come_from_and_on_which_terms() -> None:
    shown = fmg("show", "reward", "pickscore")
    assert "licence: MIT" in shown.stdout
    assert "to cite: Kirstain et al." in shown.stdout
    assert "weights: yuvalkirstain/PickScore_v1@" in shown.stdout
    plain = json.loads(fmg("show", "reward", "pickscore", "--json").stdout)
    assert {"licence", "citation", "weights"} <= plain.keys()
    assert "licence:" not in fmg("show", "reward", "shapes").stdout


def test_every_component_can_be_shown_as_json() -> None:
    for registry in REGISTRIES:
        for name in registry.names():
            shown = json.loads(fmg("show", registry.kind, name, "--json").stdout)
            assert shown["name"] == name
            assert shown["summary"]
            assert all(option["doc"] for option in shown["options"]), (registry.kind, name)
