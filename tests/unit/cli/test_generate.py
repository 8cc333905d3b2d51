from __future__ import annotations

import math
from pathlib import Path

import pytest
from PIL import Image

from fmg.core.errors import FmgError
from fmg.data.pictures import save_pictures
from fmg.inference import load
from tests.support.artifact import planted
from tests.support.cli import fmg
from tests.support.tiny_artifact import build_tiny_artifact


def picture(level: int) -> Image.Image:
    return Image.new("L", (2, 2), level)


def level(path: Path) -> object:
    with Image.open(path) as image:
        return image.getpixel((0, 0))


def test_pictures_take_the_next_free_numbers(tmp_path: Path) -> None:
    first = save_pictures([(picture(1), "a Red circle!"), (picture(2), "日本")], tmp_path / "new")
    second = save_pictures([(picture(3), "a red circle")], tmp_path / "new")
    assert [path.name for path in first] == ["0001-a-red-circle.png", "0002-image.png"]
    assert [path.name for path in second] == ["0003-a-red-circle.png"]
    assert [level(path) for path in (*first, *second)] == [1, 2, 3]


def test_a_name_that_another_process_takes_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # the other process writes after the folder was listed: the listing is empty, the file is there
    (tmp_path / "0001-x.png").write_text("theirs")
    monkeypatch.setattr(Path, "iterdir", lambda self: iter(()))
    (path,) = save_pictures([(picture(1), "x")], tmp_path)
    assert path.name == "0002-x.png"
    assert (tmp_path / "0001-x.png").read_text() == "theirs"


def test_a_folder_that_cannot_be_made_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FmgError, match=r"--out .* cannot be written"):
        save_pictures([(picture(1), "x")], tmp_path / "file" / "below", called="--out ")


@pytest.mark.parametrize(
    "command", [("generate", "a red circle", "a blue square", "--seed", "3"), ("verify", "--alone")]
)
def test_images_that_are_not_finite_are_one_line_and_no_picture(
    command: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    planted(build_tiny_artifact(tmp_path / "good"), tmp_path / "bad", "proj_out.bias", math.nan)
    name, *rest = command
    done = fmg(name, *rest, "--from", "bad", "--out", "images") if name == "generate" else fmg(name, "bad", *rest)
    assert done.code == 1
    assert not (tmp_path / "images").exists()
    if name == "verify":
        assert "drawing: an image has values that are not finite" in done.stdout
        return
    error = done.stderr.strip().splitlines()[-1]
    wanted = "The image of 'a red circle' with seed 3 has values that are not finite, as do 1 more of 2 images."
    assert wanted in error
    assert "precision" in error


def test_images_that_are_not_finite_are_not_saved_from_python(tmp_path: Path) -> None:
    broken = planted(build_tiny_artifact(tmp_path / "good"), tmp_path / "bad", "proj_out.bias", math.nan)
    with load(broken) as generator:
        made = generator.generate("a red circle")
    with pytest.raises(FmgError, match="not finite"):
        made.save(tmp_path / "image.png")
    assert not (tmp_path / "image.png").exists()
