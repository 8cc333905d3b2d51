"""Commands against the stand-in for the hub, and what they say when they fail."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.cli import Invocation, fmg
from tests.support.fake_hub import FakeHub, point_at

PROMPT = "a red circle on the left"
LORA = "pytorch_lora_weights.safetensors"


def fresh_cache(monkeypatch: pytest.MonkeyPatch, hub: FakeHub, folder: Path) -> None:
    """Another computer."""
    point_at(hub, monkeypatch, str(folder / "hub"), token=None)
    monkeypatch.setenv("FMG_CACHE", str(folder / "fmg"))


def picture(target: str | Path, *options: str) -> bytes:
    """The image of the prompt, by the command line."""
    done = succeeds("generate", PROMPT, "--from", str(target), "--device", "cpu", "--json", *options)
    return Path(json.loads(done.stdout)["images"][0]["path"]).read_bytes()


def succeeds(*args: str) -> Invocation:
    """A command that must not fail."""
    done = fmg(*args)
    assert done.code == 0, done.stderr
    return done


def refused(*args: str) -> str:
    """The error of a command: one line, two sentences, no traceback."""
    done = fmg(*args)
    assert done.code in (1, 2), done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, done.stderr
    assert lines[0].rstrip().endswith(".")
    assert ". " in lines[0]
    return lines[0].removeprefix("error: ")
