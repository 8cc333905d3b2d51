"""Where files are looked for, and what is said when they are not there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fmg.core.errors import CheckpointError, MissingDependencyError
from fmg.models.sources import HubSource, Part, locate, missing, parse_source

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("owner/name", HubSource("owner/name", None, None)),
        ("owner/name@main", HubSource("owner/name", "main", None)),
        ("owner/name@v1.0:sub/file.pt", HubSource("owner/name", "v1.0", "sub/file.pt")),
        ("owner/name:file.safetensors", HubSource("owner/name", None, "file.safetensors")),
        ("weights/student.pt", Path("weights/student.pt")),
        ("./owner/name", Path("./owner/name")),
        ("/owner/name", Path("/owner/name")),
        ("name", Path("name")),
    ],
)
def test_a_source_is_a_path_or_a_place_on_the_hub(text: str, expected: object) -> None:
    assert parse_source(text) == expected


def test_what_exists_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert parse_source("owner/name") == Path("owner/name")


def hub_cache(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty snapshot of owner/name in a hub cache of its own."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder))
    repository = folder / "models--owner--name"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc123")
    snapshot = repository / "snapshots" / "abc123"
    snapshot.mkdir(parents=True)
    return snapshot


def test_a_fetched_folder_is_found_and_an_interrupted_fetch_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = hub_cache(tmp_path, monkeypatch)
    part = Part("teacher", "teacher", "owner/name@main", ("vae",))
    assert missing(part) == "'owner/name@main' has not been fetched"
    (snapshot / "vae").mkdir()
    (snapshot / "vae" / "config.json").write_text("{}")
    with pytest.raises(
        MissingDependencyError, match=r"lacks vae/diffusion_pytorch_model.safetensors.*fmg fetch some-model"
    ):
        locate(part, "some-model")
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    (snapshot / "vae" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    (snapshot / "vae" / "one.safetensors").touch()
    assert missing(part) == "'owner/name@main' lacks vae/two.safetensors"
    (snapshot / "vae" / "two.safetensors").touch()
    assert locate(part, "some-model") == snapshot


def test_a_fetched_file_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = hub_cache(tmp_path, monkeypatch)
    part = Part("student", "student", "owner/name:student.pt")
    assert missing(part) is not None
    (snapshot / "student.pt").touch()
    assert locate(part, "m") == snapshot / "student.pt"


def test_a_local_source_is_never_said_to_be_fetchable(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"Correct model\.student") as caught:
        locate(Part("student", "student", str(tmp_path / "no.pt")), "m")
    assert "fmg fetch" not in str(caught.value)


def test_a_part_wants_its_file_or_its_patterns() -> None:
    assert Part("s", "s", "a/b:x.pt").wants("x.pt")
    assert not Part("s", "s", "a/b:x.pt").wants("y.pt")
    teacher = Part("t", "t", "a/b", ("vae",), ("vae/*.safetensors", "tokenizer/*"))
    assert [f for f in ("vae/m.safetensors", "m.safetensors", "tokenizer/t.json") if teacher.wants(f)] == [
        "vae/m.safetensors",
        "tokenizer/t.json",
    ]


def test_a_link_to_a_file_that_is_gone_is_fetched_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = hub_cache(tmp_path, monkeypatch)
    part = Part("teacher", "teacher", "owner/name@main", ("vae",), ("vae/*", "tokenizer/*"))
    blobs = tmp_path / "models--owner--name" / "blobs"
    blobs.mkdir()
    for number, name in enumerate(("vae/config.json", f"vae/{WEIGHTS}", "tokenizer/tokenizer.json", "other.txt")):
        file = snapshot / name
        file.parent.mkdir(exist_ok=True)
        (blobs / str(number)).write_text("{}")
        file.symlink_to(f"{'../' * (2 + name.count('/'))}blobs/{number}")
    assert missing(part) is None
    # what the part does not read does not matter
    (blobs / "3").unlink()
    assert missing(part) is None
    (blobs / "2").unlink()
    assert missing(part) == "'owner/name@main' lacks tokenizer/tokenizer.json"
    (blobs / "1").unlink()
    assert missing(part) == f"'owner/name@main' lacks vae/{WEIGHTS}, tokenizer/tokenizer.json"


def test_a_variant_is_not_taken_for_the_weights(tmp_path: Path) -> None:
    folder = tmp_path / "vae"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / WEIGHTS.replace(".safetensors", ".fp16.safetensors")).touch()
    part = Part("teacher", "teacher", str(tmp_path), ("vae",))
    assert missing(part) == f"'{tmp_path}' lacks vae/{WEIGHTS} (it has the variant fp16)"
