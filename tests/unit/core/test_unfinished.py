from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fmg.core.unfinished import OLD, PARTIAL, leftovers, new_folder, partial_folder, remove_leftovers


@pytest.fixture(scope="module")
def dead() -> int:
    """The id of a process that has ended."""
    done = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    return int(done.stdout)


def test_only_what_dead_processes_left_of_that_name_is_removed(tmp_path: Path, dead: int) -> None:
    mine = partial_folder(tmp_path / "x")
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
    again = partial_folder(tmp_path / "x")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*kept, mine.name, again.name])


def test_a_new_folder_does_not_meet_a_leftover_of_its_own_process_id(tmp_path: Path, dead: int) -> None:
    (tmp_path / f".x.{dead}.ab.partial").mkdir()
    (tmp_path / f".x.{os.getpid()}.partial").mkdir()
    with new_folder(tmp_path / "x") as partial:
        (partial / "file").write_text("whole")
        assert partial.stat().st_mode == tmp_path.joinpath(f".x.{os.getpid()}.partial").stat().st_mode
    assert (tmp_path / "x" / "file").read_text() == "whole"
    assert not (tmp_path / f".x.{dead}.ab.partial").exists()


def test_a_place_whose_parent_is_not_there_has_no_leftovers(tmp_path: Path) -> None:
    assert leftovers(tmp_path / "absent" / "x", PARTIAL) == []


def test_leftovers_of_every_name_are_removed_from_a_folder(tmp_path: Path, dead: int) -> None:
    mine = partial_folder(tmp_path / "x")
    (tmp_path / "kept").mkdir()
    victim = tmp_path / "victim"
    victim.mkdir()
    (tmp_path / f".y.{dead}.0123abcd.partial" / "inside").mkdir(parents=True)
    (tmp_path / f".z.{dead}.0123abcd.partial").symlink_to(victim)
    for name in (f".index.json.{dead}.tmp", f".index.json.{os.getpid()}.tmp", f".index.json.{os.getppid()}.tmp"):
        (tmp_path / name).write_text("half")
    remove_leftovers(tmp_path)
    alive = f".index.json.{os.getppid()}.tmp"
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([mine.name, "kept", "victim", alive])
