"""Names from a file stay in their folder, a refusal of the system is one line, and no partial file is left."""

from __future__ import annotations

import errno
import hashlib
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from fmg.core.errors import CheckpointError, StorageError, system_refusal, writing
from fmg.core.files import (
    OLD,
    PARTIAL,
    atomic_file,
    atomic_folder,
    digest,
    inside,
    leftovers,
    lock,
    partial_folder,
    remove_leftovers,
    write_atomic,
)
from fmg.data.pictures import write_picture


@pytest.mark.parametrize("name", ["checkpoint-3", "transformer/model.onnx", "a/./b", "..a", "it's", "é"])
def test_a_name_within_a_folder_is_joined(tmp_path: Path, name: str) -> None:
    assert inside(tmp_path, name) == tmp_path / name


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "../x", "a/../../x", "a/..", "/etc", "\\etc", "C:\\x", "C:x", "..\\x", "a\0b", "\ud800", 3, None],
)
def test_a_name_that_leads_out_of_a_folder_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match="not a path within"):
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


@pytest.fixture(scope="module")
def dead() -> int:
    """The id of a process that has ended."""
    done = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    return int(done.stdout)


def test_only_what_dead_processes_left_of_that_name_is_removed(tmp_path: Path, dead: int) -> None:
    stack = ExitStack()
    mine = stack.enter_context(partial_folder(tmp_path / "x"))
    kept = [
        f".x.{os.getppid()}.ab.partial",
        f".x.{dead}.ab.old",
        f".x.y.{dead}.ab.partial",
        f"x.{dead}.ab.partial",
        ".x.partial",
    ]
    # an earlier process had the id of this one, as in a container, where it is always 1
    gone = [f".x.{dead}.ab.partial", f".x.{os.getpid()}.ab.partial"]
    for name in (*kept, *gone):
        (tmp_path / name / "inside").mkdir(parents=True)
    assert [path.name for path in leftovers(tmp_path / "x", PARTIAL)] == sorted(gone)
    assert [path.name for path in leftovers(tmp_path / "x", OLD)] == [f".x.{dead}.ab.old"]
    again = stack.enter_context(partial_folder(tmp_path / "x"))
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*kept, mine.name, again.name])
    stack.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(kept)


def test_a_new_folder_does_not_meet_a_leftover_of_its_own_process_id(tmp_path: Path, dead: int) -> None:
    (tmp_path / f".x.{dead}.ab.partial").mkdir()
    (tmp_path / f".x.{os.getpid()}.partial").mkdir()
    with atomic_folder(tmp_path / "x") as partial:
        (partial / "file").write_text("whole")
        assert partial.stat().st_mode == tmp_path.joinpath(f".x.{os.getpid()}.partial").stat().st_mode
    assert (tmp_path / "x" / "file").read_text() == "whole"
    assert not (tmp_path / f".x.{dead}.ab.partial").exists()


def test_a_place_whose_parent_is_not_there_has_no_leftovers(tmp_path: Path) -> None:
    assert leftovers(tmp_path / "absent" / "x", PARTIAL) == []


def test_leftovers_of_every_name_are_removed_from_a_folder(tmp_path: Path, dead: int) -> None:
    (tmp_path / "kept").mkdir()
    victim = tmp_path / "victim"
    victim.mkdir()
    (tmp_path / f".y.{dead}.0123abcd.partial" / "inside").mkdir(parents=True)
    (tmp_path / f".z.{dead}.0123abcd.partial").symlink_to(victim)
    for name in (f".index.json.{dead}.tmp", f".index.json.{os.getpid()}.tmp", f".index.json.{os.getppid()}.tmp"):
        (tmp_path / name).write_text("half")
    (tmp_path / f".run.json.{dead}.0123abcd.tmp").write_text("half")
    with partial_folder(tmp_path / "x") as mine:
        remove_leftovers(tmp_path)
        assert mine.is_dir()
    alive = f".index.json.{os.getppid()}.tmp"
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["kept", "victim", alive])


FULL = OSError(errno.ENOSPC, "No space left on device")


class ForeignError(Exception):
    """As in libraries that wrap the system's errors in their own."""


@pytest.mark.parametrize(
    "error",
    [
        FULL,
        ForeignError("Error while serializing: I/O error: No space left on device (os error 28)"),
        RuntimeError("[enforce fail] PytorchStreamWriter failed writing file: No space left on device"),
    ],
)
def test_a_full_disk_is_recognised_by_number_and_by_message(error: Exception) -> None:
    assert system_refusal(error) == "No space left on device"


def test_a_refusal_is_found_behind_the_error_of_a_library() -> None:
    wrapped = ForeignError("could not save")
    wrapped.__cause__ = PermissionError(errno.EACCES, "Permission denied")
    assert system_refusal(wrapped) == "Permission denied"


@pytest.mark.parametrize("text", ["encoder error -2 when writing image file", "1024 requested and 0 written"])
def test_a_write_that_stopped_short_is_a_refusal(text: str) -> None:
    assert system_refusal(OSError(text)) == "the file could not be written completely"


@pytest.mark.parametrize("error", [ValueError("shape"), OSError("cannot identify image file"), KeyError("x")])
def test_other_errors_are_not_refusals(error: Exception) -> None:
    assert system_refusal(error) is None


def test_what_a_damaged_file_says_is_not_taken_for_a_refusal() -> None:
    error = CheckpointError("damaged", "Restore it.")
    error.__cause__ = FULL
    assert system_refusal(error) is None


def test_safetensors_refused_by_the_system_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"cannot be written: (Is a directory|No such file)"), writing(tmp_path):
        save_file({"x": torch.zeros(2)}, tmp_path / "none" / "x.safetensors")


def test_errors_of_a_network_are_passed_on(tmp_path: Path) -> None:
    with pytest.raises(ConnectionResetError), atomic_file(tmp_path / "x"):
        raise ConnectionResetError(errno.ECONNRESET, "Connection reset by peer")


@pytest.mark.parametrize("writer", [atomic_file, atomic_folder])
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


@pytest.mark.skipif(sys.platform == "win32", reason="locks of Windows need no flock")
@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_holds_nothing(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does it leave a marker by which a killed run could not be resumed on another machine."""

    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", refuse)
    (tmp_path / ".lock").write_text("12345\nanother-machine\n")
    with lock(tmp_path, "The run is being trained by another process"), lock(tmp_path, "The same run"):
        pass
