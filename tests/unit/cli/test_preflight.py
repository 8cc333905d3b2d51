"""Errors that can be found early are reported before torch is imported, and a refused command leaves no files."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from fmg.core.errors import UsageError
from fmg.core.files import check_place
from fmg.data.run_folder import RunFolder
from fmg.rewards.functions import check_module
from tests.support.cli import fmg


@pytest.fixture(autouse=True)
def _workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "fmg.training.api", None)
    monkeypatch.setitem(sys.modules, "fmg.eval.evaluate", None)


def test_a_writable_destination_is_left_unchanged(tmp_path: Path) -> None:
    check_place(tmp_path / "a" / "b.html", "--out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("place", "reason"),
    [("file/below", "is a file"), ("x" * 300, "File name too long"), ("loop/below", "Too many levels")],
)
def test_a_destination_that_cannot_be_made_is_refused(place: str, reason: str, tmp_path: Path) -> None:
    Path("file").touch()
    Path("loop").symlink_to("loop")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UsageError, match=rf"--out .*{reason}"):
        check_place(Path(place), "--out")
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs Linux: a file system on which nobody can write")
@pytest.mark.parametrize(
    "command",
    [
        ["train", "--run", "/proc/nope/x"],
        ["train", "--run", "/proc/nope/x", "--dry-run"],
        ["eval", "meanflow-shapes", "--report", "/proc/nope/x.html"],
        ["eval", "meanflow-shapes", "--dump", "geneval", "/proc/nope/x"],
        ["eval", "meanflow-shapes", "--path-check", "/proc/x.png"],
        ["generate", "a red circle", "--out", "/proc/nope/x"],
        ["export", "meanflow-shapes", "/proc/nope/x"],
        ["bench", "meanflow-shapes", "--frontier", "--out", "/proc/x.png"],
        ["report", "--out", "/proc/nope/x.html"],
        ["pretrain", "shapes", "--out", "/proc/nope/x"],
    ],
    ids=" ".join,
)
def test_every_command_checks_its_destination_first(command: list[str]) -> None:
    done = fmg(*command)
    assert (done.code, done.stdout) == (2, "")
    assert re.search("cannot be (written|used for a run): No such file or directory", done.stderr)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--set", "model.folder=nope"], "nope"),
        (["--model", "flux-fewstep", "--set", "model.folder=nope"], "there is no file or folder 'nope'"),
        (["--reward", "python:os:nope"], "The module 'os' has no function 'nope'"),
        (["--reward", "python:mine:nope"], "The module 'mine' has no function 'nope'"),
        (["--reward", "python:half:fn"], "The module 'half' cannot be imported at half.py:1: SyntaxError"),
        (["--reward", "hpsv2", "--set", "rewards.0.weights=nope.pt"], "there is no file or folder 'nope.pt'"),
        (["--device", "gpu"], "device"),
    ],
)
@pytest.mark.parametrize("dry", [True, False])
def test_a_dry_run_and_a_run_refuse_alike(options: list[str], message: str, dry: bool, tmp_path: Path) -> None:
    Path("mine.py").write_text("raise RuntimeError\n\ndef fn(images, prompts): ...\n", encoding="utf-8")
    Path("half.py").write_text("def fn(:\n", encoding="utf-8")
    done = fmg("train", *options, *(["--dry-run"] if dry else []))
    assert (done.code in (1, 2), message in done.stderr) == (True, True), done.stderr
    assert not Path("runs").exists()


def test_a_model_that_has_not_been_fetched_can_be_planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    options = ["train", "--model", "sana-sprint", "--reward", "jpeg-incompressibility"]
    planned = fmg(*options, "--dry-run")
    assert (planned.code, "fmg fetch sana-sprint" in planned.stderr) == (0, True), planned.stderr
    run = fmg(*options)
    assert (run.code, "fmg fetch sana-sprint" in run.stderr) == (2, True), run.stderr


@pytest.mark.parametrize(
    "text",
    [
        "def fn(images, prompts): ...",
        "if True:\n    fn = len",
        "from x import fn",
        "import y as fn",
        "from x import *",
        "def __getattr__(name): ...",
        "globals()['fn'] = len",
        "class fn: ...",
        "for fn in []: ...",
    ],
)
def test_a_name_that_a_module_may_have_is_accepted(text: str) -> None:
    Path("maybe.py").write_text(text, encoding="utf-8")
    check_module("maybe:fn")
    check_module("maybe:fn.inner")


def test_verify_finds_the_artifact_of_a_run() -> None:
    run = RunFolder.create("r", "meanflow-shapes").path
    missing = fmg("verify", str(run), "--alone")
    assert (missing.code, "fmg export r" in missing.stderr) == (2, True)
    (run / "artifact").mkdir()
    (run / "artifact" / "manifest.json").write_text("{}", encoding="utf-8")
    found = fmg("verify", str(run), "--alone")
    assert "r/artifact" in found.stderr
    assert found.code == 1


def test_an_unknown_device_is_refused_before_torch_is_imported() -> None:
    done = fmg("eval", "meanflow-shapes", "--device", "gpu")
    assert (done.code, "--device gpu" in done.stderr) == (2, True)
