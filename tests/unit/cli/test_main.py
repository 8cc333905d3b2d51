from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fmg.core.errors import CheckpointError, GateError, UsageError
from fmg.version import __version__
from tests.support.cli import fmg


def test_version() -> None:
    assert fmg("--version").stdout == f"fmg {__version__}\n"


@pytest.mark.parametrize("flag", ["-h", "--help"])
@pytest.mark.parametrize(
    "command", [(), ("train",), ("eval",), ("generate",), ("list",), ("show",), ("runs",), ("pretrain", "shapes")]
)
def test_every_command_has_help(command: tuple[str, ...], flag: str) -> None:
    shown = fmg(*command, flag)
    assert (shown.code, shown.stderr) == (0, "")
    assert f"Usage: fmg {' '.join(command)}" in shown.stdout


@pytest.mark.parametrize("group", [(), ("pretrain",)])
def test_a_group_without_a_command_prints_its_help(group: tuple[str, ...]) -> None:
    assert fmg(*group).stdout == fmg(*group, "--help").stdout


@pytest.mark.parametrize("closed", [(1,), (2,), (0, 1, 2)])
def test_a_closed_stream_is_like_one_to_nowhere(closed: tuple[int, ...], tmp_path: Path) -> None:
    program = (
        "import os\n"
        f"for number in {closed}: os.close(number)\n"
        "import sys\n"
        f"if 1 in {closed}: sys.stdout = None\n"
        f"if 2 in {closed}: sys.stderr = None\n"
        "sys.argv = ['fmg', 'runs']\n"
        "from fmg.cli.main import run\n"
        "run()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert done.stderr == ""
    assert (done.stdout == "") == (1 in closed)


def test_a_missing_package_is_a_line_that_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    fail_with(ModuleNotFoundError("No module named 'torch._C'", name="torch._C"), monkeypatch)
    shown = fmg("runs")
    assert (shown.code, shown.stdout) == (2, "")
    assert shown.stderr == "error: The package 'torch' is not installed. Run: pip install flow-map-grpo.\n"


def fail_with(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    def raises(root: object) -> None:
        raise error

    monkeypatch.setattr("fmg.data.run_folder.sorted_runs", raises)


@pytest.mark.parametrize(
    ("error", "code"),
    [(UsageError("No", "Do"), 2), (CheckpointError("No", "Do"), 1), (GateError("No", "Do"), 1)],
)
def test_an_expected_error_is_two_sentences_on_one_line(
    error: Exception, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_with(error, monkeypatch)
    shown = fmg("runs")
    assert (shown.code, shown.stdout, shown.stderr) == (code, "", "error: No. Do.\n")


def test_an_error_of_the_program_says_how_to_see_the_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a folder").mkdir()
    fail_with(ZeroDivisionError("first line\nsecond line"), monkeypatch)
    shown = fmg("runs", "a folder")
    assert shown.code == 70
    assert shown.stderr == ("error: Unexpected ZeroDivisionError: first line. See where: fmg --debug runs 'a folder'\n")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. GPU 0 has a capacity of 79 GiB. See"),
            "CUDA out of memory. Tried to allocate 2 GiB",
        ),
        (torch.OutOfMemoryError("Allocation on device 0\nCurrently allocated: 7 GiB"), "Allocation on device 0"),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors"), "CUDA error: out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "DefaultCPUAllocator: can't allocate memory"),
        (MemoryError(), "MemoryError"),
    ],
)
def test_running_out_of_memory_is_not_a_bug_of_the_program(
    error: Exception, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_with(error, monkeypatch)
    shown = fmg("runs")
    assert shown.code == 1
    assert shown.stderr.startswith(f"error: Memory ran out: {said}. Use smaller batches: --batch-size")
    assert shown.stderr.count("\n") == 1


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    fail_with(ZeroDivisionError("x"), monkeypatch)
    shown = fmg("--debug", "runs")
    assert "Traceback (most recent call last)" in shown.stderr
    assert shown.stderr.endswith("error: Unexpected ZeroDivisionError: x.\n")


def test_ctrl_c_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    fail_with(KeyboardInterrupt(), monkeypatch)
    shown = fmg("runs")
    assert shown.code == 130
    assert shown.stderr.startswith("error: Interrupted.")
    assert shown.stderr.count("\n") == 1


@pytest.mark.parametrize("command", [["list"], ["list", "--json"]])
def test_a_reader_that_closes_the_pipe_is_not_an_error(command: list[str]) -> None:
    call = [sys.executable, "-m", "fmg", *command]
    with subprocess.Popen(call, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 1


def test_a_narrow_encoding_loses_letters_but_does_not_fail(tmp_path: Path) -> None:
    (tmp_path / "größe").mkdir()
    call = [sys.executable, "-m", "fmg", "runs", "größe"]
    environment = {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "1"}
    done = subprocess.run(call, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "no run under 'gr??e'" in done.stdout


def test_what_the_system_refuses_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    fail_with(OSError(28, "No space left on device", "runs/x"), monkeypatch)
    shown = fmg("runs")
    assert shown.code == 1
    assert shown.stderr.startswith("error: The system refused the file or folder 'runs/x': No space left on device.")
    fail_with(OSError("a library's own"), monkeypatch)
    assert fmg("runs").code == 70


def test_control_characters_of_a_name_do_not_reach_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    fail_with(UsageError("No 'a\x1b[31m\nb\u2028c' für", "Do"), monkeypatch)
    assert fmg("runs").stderr == "error: No 'a\\x1b[31m\\nb\\u2028c' für. Do.\n"
