"""The two streams that commands write to: results go to stdout; errors, and progress beside a result, to stderr."""

from __future__ import annotations

import json
import sys

import typer
from rich.console import Console

from fmg.core.display import visible, visible_json
from fmg.progress.console import SafeConsole

# A pipe has no width of its own; tables for `grep` must not be folded at 80 columns.
_PIPE_WIDTH = 300


def stdout() -> Console:
    """A console on stdout. Text is printed as it is: a prompt such as `[red] :x:` is neither markup nor an emoji."""
    return _console(stderr=False)


def stderr() -> Console:
    """A console on stderr."""
    return _console(stderr=True)


def print_json(value: object, *, indent: int | None = 2) -> None:
    """One JSON document on stdout, flushed so that a reader of the pipe sees it at once."""
    typer.echo(visible_json(json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False)))
    sys.stdout.flush()


def print_error(text: str) -> None:
    """`error: text` on stderr, on one line whatever the text holds."""
    typer.secho("error: ", fg="red", bold=True, nl=False, err=True)
    typer.echo(visible(text), err=True)


def print_warning(text: str) -> None:
    """`warning: text` on stderr, on one line whatever the text holds."""
    typer.secho("warning: ", fg="yellow", bold=True, nl=False, err=True)
    typer.echo(visible(text), err=True)


def tolerate_narrow_encodings() -> None:
    """Replaces what a terminal of another encoding cannot show, where Python would stop with an error."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="replace")


def _console(*, stderr: bool) -> Console:
    interactive = (sys.stderr if stderr else sys.stdout).isatty()
    width = None if interactive else _PIPE_WIDTH
    return SafeConsole(stderr=stderr, width=width, markup=False, emoji=False, highlight=False)
