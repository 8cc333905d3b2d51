"""Runs the command line inside the test's process."""

from __future__ import annotations

import io
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass

from fmg.cli.main import main


@dataclass(frozen=True)
class Invocation:
    """The result of one command."""

    code: int
    stdout: str
    stderr: str


def fmg(*args: str) -> Invocation:
    """`fmg ARGS...` with both streams captured, as in a pipe."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = main(args)
    return Invocation(code, out.getvalue(), err.getvalue())
