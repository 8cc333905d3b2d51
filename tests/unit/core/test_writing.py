"""What the system refuses is one line, whichever library was writing."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from fmg.core.cache import new_folder, replacing_file
from fmg.core.errors import CheckpointError, StorageError, system_refusal, writing
from fmg.core.unfinished import new_folder as new_checkpoint
from fmg.core.unfinished import write_atomic
from fmg.data.pictures import write_picture

FULL = OSError(errno.ENOSPC, "No space left on device")


class ForeignError(Exception):
    """As libraries have that wrap the system's errors in their own."""


@pytest.mark.parametrize(
    "error",
    [
        FULL,
        ForeignError("Error while serializing: I/O error: No space left on device (os error 28)"),
        RuntimeError("[enforce fail] PytorchStreamWriter failed writing file: No space left on device"),
    ],
)
def test_a_full_disk_is_known_by_number_and_by_words(error: Exception) -> None:
    assert system_refusal(error) == "No space left on device"


def test_a_refusal_is_found_behind_the_error_of_a_library() -> None:
    wrapped = ForeignError("could not save")
    wrapped.__cause__ = PermissionError(errno.EACCES, "Permission denied")
    assert system_refusal(wrapped) == "Permission denied"


@pytest.mark.parametrize("text", ["encoder error -2 when writing image file", "1024 requested and 0 written"])
def test_a_write_that_stopped_short_is_a_refusal(text: str) -> None:
    assert system_refusal(OSError(text)) == "the file could not be written to its end"


@pytest.mark.parametrize("error", [ValueError("shape"), OSError("cannot identify image file"), KeyError("x")])
def test_other_errors_are_no_refusal(error: Exception) -> None:
    assert system_refusal(error) is None


def test_what_a_damaged_file_says_is_not_taken_for_a_refusal() -> None:
    error = CheckpointError("damaged", "Restore it.")
    error.__cause__ = FULL
    assert system_refusal(error) is None


def test_safetensors_refused_by_the_system_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"cannot be written: (Is a directory|No such file)"), writing(tmp_path):
        save_file({"x": torch.zeros(2)}, tmp_path / "none" / "x.safetensors")


def test_errors_of_a_network_are_passed_on(tmp_path: Path) -> None:
    with pytest.raises(ConnectionResetError), replacing_file(tmp_path / "x"):
        raise ConnectionResetError(errno.ECONNRESET, "Connection reset by peer")


@pytest.mark.parametrize("writer", [replacing_file, new_folder, new_checkpoint])
def test_a_failed_write_leaves_nothing(writer: Callable[[Path], AbstractContextManager[Path]], tmp_path: Path) -> None:
    place = tmp_path / "place"
    with pytest.raises(StorageError, match=r"'.*place' cannot be written: No space left on device"), writer(place):
        raise FULL
    assert not list(tmp_path.iterdir())


def test_a_picture_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, picture = tmp_path / "a.png", Image.new("RGB", (8, 8))
    write_picture(picture, path)
    before = path.read_bytes()

    def full(_: int) -> None:
        raise FULL

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError):
        write_picture(Image.new("RGB", (9, 9)), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_an_atomic_write_names_its_file(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"'.*none/a.json' cannot be written: No such file"):
        write_atomic(tmp_path / "none" / "a.json", b"{}")
