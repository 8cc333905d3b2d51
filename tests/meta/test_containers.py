"""The Dockerfiles: what can be checked without Docker."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.support.cli import fmg

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(params=sorted((ROOT / "docker").glob("*Dockerfile")), ids=lambda file: file.name)
def instructions(request: pytest.FixtureRequest) -> list[tuple[str, str]]:
    """The instructions of a Dockerfile in order, each on one line."""
    file: Path = request.param
    lines = [line for line in file.read_text("utf-8").splitlines() if not line.startswith("#")]
    text = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [(name, rest) for name, _, rest in (line.partition(" ") for line in text.splitlines() if line)]


def test_the_base_is_pinned_and_the_user_is_not_root(instructions: list[tuple[str, str]]) -> None:
    (version,) = (rest for name, rest in instructions if name == "ARG")
    assert re.fullmatch(r"PYTHON=3\.\d+\.\d+-slim-\w+", version)
    assert all(rest.startswith("python:${PYTHON}") for name, rest in instructions if name == "FROM")
    last_stage = instructions[max(i for i, (name, _) in enumerate(instructions) if name == "FROM") :]
    assert [rest for name, rest in last_stage if name == "USER"] == ["10001:10001"]


def test_what_is_copied_is_in_the_context(instructions: list[tuple[str, str]]) -> None:
    ignored, *allowed = (
        line for line in (ROOT / ".dockerignore").read_text("utf-8").splitlines() if line and line[0] not in "#/"
    )
    assert ignored == "*"
    for name, rest in instructions:
        if name == "COPY" and not rest.startswith("--from"):
            for source in rest.split()[:-1]:
                assert (ROOT / source).exists()
                assert f"!{source}" in allowed
    for name, rest in instructions:
        if name == "RUN" and "--constraint" in rest:
            assert (ROOT / rest.partition("--constraint ")[2].split()[0]).is_file()


def test_the_command_is_run_without_a_shell_and_needs_a_token(
    instructions: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FMG_SERVE_TOKEN", raising=False)
    found = dict(instructions)
    program, *words = [*json.loads(found["ENTRYPOINT"]), *json.loads(found["CMD"])]
    assert program == "fmg"
    done = fmg(*words)
    assert done.code == 2
    assert "no token is set" in done.stderr
    check = json.loads(found["HEALTHCHECK"].partition("CMD ")[2])
    port = words[words.index("--port") + 1]
    assert check[0] == "python"
    assert f"http://127.0.0.1:{port}/health" in check[-1]
    compile(check[-1], "health", "exec")
