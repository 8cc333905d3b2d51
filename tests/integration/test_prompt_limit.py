"""Prompts over the token limit: every command truncates them as diffusers does, with one warning."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.cli import fmg

pytestmark = pytest.mark.slow

LONG = "a very " + "long and " * 100 + "red circle"
SAID = "the model reads the first 16"


@pytest.mark.filterwarnings("default::fmg.core.errors.FmgWarning")
def test_every_command_truncates_a_long_prompt_and_warns_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FMG_CACHE", str(tmp_path / "cache"))
    (tmp_path / "long.txt").write_text(f"{LONG}\n{LONG} left\na blue square\n", encoding="utf-8")
    (tmp_path / "held.txt").write_text(f"{LONG}\na green square\n", encoding="utf-8")
    sizes = {
        "rollout.groups": 1,
        "rollout.group_size": 2,
        "eval.num": 2,
        "eval.rewards": "[]",
        "eval.prompts": "held.txt",
    }
    sets = [word for key, value in sizes.items() for word in ("--set", f"{key}={value}")]
    trained = ("--prompts", "long.txt", "--reward", "jpeg-compressibility", "--iterations", "1", "--run", "run")
    commands = {
        "2 of 4 prompts": ("train", *trained, *sets),
        "1 of 2 prompts": ("eval", "run", "--num", "4"),
        "The prompt 'a very long": ("generate", LONG, "--from", "run", "--num", "2"),
    }
    for begins, command in commands.items():
        done = fmg(*command)
        assert done.code == 0, done.stderr
        # the lines of a training go to stdout
        (line,) = [line for line in (done.stdout + done.stderr).splitlines() if SAID in line]
        assert begins in line
