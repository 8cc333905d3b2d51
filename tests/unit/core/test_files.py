"""Names that come from a file stay within their folder."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from fmg.core.errors import CheckpointError
from fmg.core.files import digest, inside


@pytest.mark.parametrize("name", ["checkpoint-3", "transformer/model.onnx", "a/./b", "..a", "it's", "é"])
def test_a_name_within_a_folder_is_joined(tmp_path: Path, name: str) -> None:
    assert inside(tmp_path, name) == tmp_path / name


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "../x", "a/../../x", "a/..", "/etc", "\\etc", "C:\\x", "C:x", "..\\x", "a\0b", "\ud800", 3, None],
)
def test_a_name_that_leads_out_of_a_folder_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match="no path within"):
        inside(tmp_path, name)


def test_a_link_may_not_lead_out_of_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    (folder / "real").mkdir(parents=True)
    (tmp_path / "victim").mkdir()
    (folder / "near").symlink_to(folder / "real")
    (folder / "far").symlink_to(tmp_path / "victim")
    (folder / "loop").symlink_to(folder / "loop")
    assert inside(folder, "near/x") == folder / "near" / "x"
    for name in ("far", "far/x"):
        with pytest.raises(CheckpointError, match=f"'index.json' names '{name}'"):
            inside(folder, name, named_in=Path("index.json"))


def test_a_folder_may_itself_be_reached_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert inside(tmp_path / "link", "x") == tmp_path / "link" / "x"


def test_a_long_name_is_cut_in_the_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        inside(tmp_path, "/" + "x" * 100_000)
    assert len(str(caught.value)) < 500 + len(str(tmp_path))


def test_the_digest_is_the_sha256_of_the_bytes(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"x" * 3_000_000)
    assert digest(tmp_path / "f") == hashlib.sha256(b"x" * 3_000_000).hexdigest()
