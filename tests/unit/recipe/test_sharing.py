"""What of a recipe leaves this computer."""

from __future__ import annotations

from pathlib import Path

import pytest

from fmg.recipe import Recipe
from fmg.recipe.sharing import changes, local_base, published, shareable

COMMIT = "0123456789" * 4


@pytest.mark.parametrize(
    ("value", "shared"),
    [
        ("/data/me/prompts.txt", "prompts.txt"),
        ("~/prompts.txt", "prompts.txt"),
        ("../data/prompts.txt", "prompts.txt"),
        (r"C:\\Users\\me\\prompts.txt", "prompts.txt"),
        ("owner/name@main:file.safetensors", "owner/name@main:file.safetensors"),
        ("https://example.org/file.pt", "https://example.org/file.pt"),
        ("meanflow-shapes", "meanflow-shapes"),
        ("~", "~"),
        (f"/x/models--owner--name/snapshots/{COMMIT}", f"owner/name@{COMMIT}"),
        (f"/x/models--owner--name/snapshots/{COMMIT}/a/b.pt", f"owner/name@{COMMIT}:a/b.pt"),
        (0.5, 0.5),
        (None, None),
        (["/a/b", {"path": "data/alice.txt"}], ["b", {"path": "alice.txt"}]),
        ({"url": "http://gpu7.corp:8000/v1"}, {"url": "http://localhost:8000"}),
        ({"url": "https://user:secret@host"}, {"url": "https://localhost"}),
        ({"weights": "https://me:key@example.org:8/a.pt?sig=secret#x"}, {"weights": "https://example.org:8/a.pt"}),
        ({"weights": "https://[broken?key=secret"}, {"weights": "https://[broken"}),
        ({"metadata": "clients/acme/train.jsonl"}, {"metadata": "train.jsonl"}),
    ],
)
def test_values_lose_paths_and_addresses(value: object, shared: object) -> None:
    assert shareable(value) == shared
    assert shareable(shareable(value)) == shared


def test_changes_name_each_value_by_its_path() -> None:
    recipe = Recipe.default().with_(
        {
            "prompts": {"name": "file", "path": "/data/me/p.txt"},
            "rewards": [{"name": "remote", "url": "http://10.0.0.7:8765", "weights": {"hpsv2": 1.0}}],
        }
    )
    assert changes(recipe) == {
        "prompts.path": ("/data/me/p.txt", "p.txt"),
        "rewards.0.url": ("http://10.0.0.7:8765", "http://localhost:8765"),
    }
    assert changes(Recipe.default()) == {}


def test_a_local_base_is_found_wherever_it_is_named(tmp_path: Path) -> None:
    assert local_base(Recipe.default()) is None
    assert local_base(Recipe.default("meanflow-flux")) is None
    student = Recipe.default("meanflow-flux", **{"model.student": "/data/me/student.pt"})
    assert local_base(student) == ("model.student", "/data/me/student.pt")
    # a file that the hub's client fetched has a name on the hub
    cached = f"/x/models--owner--name/snapshots/{COMMIT}/student.pt"
    assert local_base(Recipe.default("meanflow-flux", **{"model.student": cached})) is None
    adapters = [{"source": "owner/name:a.safetensors"}, {"source": str(tmp_path / "mine.safetensors")}]
    stacked = Recipe.default("flux-fewstep", **{"model.adapters": adapters})
    assert local_base(stacked) == ("model.adapters", str(tmp_path / "mine.safetensors"))


def test_trackers_stay_with_the_owner_of_a_run() -> None:
    recipe = Recipe.default(**{"trackers": [{"name": "wandb", "entity": "alice", "project": "shapes"}]})
    assert published(recipe).trackers == ()
    assert published(recipe) == Recipe.default()
    assert "alice" not in str(shareable(recipe.plain()))
