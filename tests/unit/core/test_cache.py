"""An entry of the cache is valid for one state of a file, and a cache that cannot be written is not an error."""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from fmg.core import cache
from fmg.core.cache import DIGESTS, _without_home, cache_dir, content_hash, made_once, required_cache
from fmg.core.errors import FmgError, FmgWarning, UsageError


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FMG_CACHE", str(tmp_path / "cache"))


def settle(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if every file had been there for a minute."""
    later = SimpleNamespace(time_ns=lambda: time.time_ns() + 60 * 10**9)
    monkeypatch.setattr(cache, "time", later)


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def write_in_place(file: Path, content: bytes) -> None:
    """Different content with the same length, size and modification time."""
    stat = file.stat()
    file.write_bytes(content)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_without_a_home_the_cache_is_a_private_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FMG_CACHE", raising=False)
    monkeypatch.setattr("os.path.expanduser", lambda path: path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    _without_home.cache_clear()
    with pytest.warns(FmgWarning, match="There is no home folder"):
        folder = cache_dir()
    assert folder.parent == tmp_path
    assert folder.stat().st_mode & 0o777 == 0o700
    _without_home.cache_clear()
    folder.chmod(0o777)
    with pytest.raises(UsageError, match="open to others"):
        cache_dir()
    monkeypatch.setenv("FMG_CACHE", "~nobody-here/cache")
    assert cache_dir() == Path("~nobody-here/cache")


def test_a_file_that_stays_as_it_is_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settle(monkeypatch)
    file = tmp_path / "a"
    file.write_bytes(b"one")
    assert content_hash(file) == sha256(b"one")
    monkeypatch.setattr(cache, "digest", lambda _: pytest.fail("the file was read again"))
    assert content_hash(file) == sha256(b"one")


def test_a_change_that_keeps_name_size_and_time_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settle(monkeypatch)
    file = tmp_path / "a"
    file.write_bytes(b"good")
    assert content_hash(file) == sha256(b"good")
    whole = Path(shutil.copy2(file, tmp_path / "copy"))
    write_in_place(file, b"BAD!")
    assert content_hash(file) == sha256(b"BAD!")
    # the good copy is put back, with its times: the hash of the bad one is forgotten
    shutil.copy2(whole, file)
    assert content_hash(file) == sha256(b"good")
    file.unlink()
    whole.rename(file)
    assert content_hash(file) == sha256(b"good")
    assert len(list((cache_dir() / "hashes").iterdir())) == 1


def test_a_file_that_has_just_changed_is_read_again(tmp_path: Path) -> None:
    # within one tick of the file system's clock a second change would leave no trace
    file = tmp_path / "a"
    file.write_bytes(b"one")
    assert content_hash(file) == sha256(b"one")
    assert not (cache_dir() / "hashes").exists()


@pytest.mark.parametrize("note", [b"", b"\xff" * 8, b"1 2 3 4 5 short", b"nonsense"])
def test_a_damaged_note_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, note: bytes) -> None:
    settle(monkeypatch)
    file = tmp_path / "a"
    file.write_bytes(b"one")
    content_hash(file)
    (noted,) = (cache_dir() / "hashes").iterdir()
    noted.write_bytes(note)
    assert content_hash(file) == sha256(b"one")


def test_a_cache_that_cannot_be_written_costs_one_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settle(monkeypatch)
    file = tmp_path / "a"
    file.write_bytes(b"one")
    # a file where the folder should be: permissions do not stop root
    cache_dir().write_bytes(b"")
    with pytest.warns(FmgWarning, match=r"cache .*cannot be written \(.*FMG_CACHE"):
        assert content_hash(file) == sha256(b"one")
    with pytest.raises(FmgError, match=r"cannot be written .*set FMG_CACHE"), required_cache():
        made_once(cache_dir() / "x", lambda _: None)


def test_a_damaged_conversion_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    settle(monkeypatch)
    calls: list[Path] = []

    def make(folder: Path) -> None:
        calls.append(folder)
        (folder / "a").write_bytes(b"converted")
        (folder / "b").write_bytes(b"")

    folder = cache_dir() / "models" / "x"
    for _ in range(2):
        assert made_once(folder, make) == folder
    assert len(calls) == 1
    for damage in (
        lambda: write_in_place(folder / "a", b"CONVERTED"),
        lambda: (folder / "b").unlink(),
        lambda: (folder / DIGESTS).unlink(),
        lambda: (folder / DIGESTS).write_text('{"../../x": "0"}'),
    ):
        damage()
        made_once(folder, make)
        assert (folder / "a").read_bytes() == b"converted"
        assert (folder / "b").exists()
    assert len(calls) == 5
    assert [path.name for path in folder.parent.iterdir()] == ["x"]
