"""Finds what a Markdown page tells the reader to type.

Fenced blocks marked `console`, `bash` or `sh` hold commands: in a `console` block the lines that begin with `$ `, in
the others every line; a backslash continues a line. Blocks marked `python` hold programs. A comment before a block
changes what a test does with it:

    <!-- test: with --iterations 1 -->    appends arguments to every `fmg` command of the block
    <!-- test: file NAME -->              writes the block to a file, of whatever language, instead of running it
    <!-- test: skip REASON -->            leaves the block out
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass

_FENCE = re.compile(r"^(?P<ticks>```+)(?P<language>\w*).*\n(?P<body>(?:.*\n)*?)(?P=ticks) *$", re.MULTILINE)
_DIRECTIVE = re.compile(r"<!-- test: (?P<verb>with|file|skip) (?P<rest>.+?) -->\s*\Z")
_SHELLS = ("console", "bash", "sh")


@dataclass(frozen=True)
class Command:
    """One command of a shell block, as words."""

    words: tuple[str, ...]
    line: int


@dataclass(frozen=True)
class Program:
    """A block of Python."""

    source: str
    line: int


@dataclass(frozen=True)
class NewFile:
    """A block that the reader saves."""

    name: str
    content: str


Step = Command | Program | NewFile


def steps(page: str) -> Iterator[Step]:
    """The steps in the order of the page; `line` counts from 1 in `page`."""
    for match in _FENCE.finditer(page):
        directive = _DIRECTIVE.search(page, 0, match.start())
        verb = directive["verb"] if directive else ""
        first = page.count("\n", 0, match.start("body")) + 1
        if verb == "skip":
            continue
        if directive and verb == "file":
            yield NewFile(directive["rest"], match["body"])
        elif match["language"] == "python":
            yield Program(match["body"], first)
        elif match["language"] in _SHELLS:
            extra = tuple(shlex.split(directive["rest"])) if directive else ()
            yield from _commands(match["body"], first, extra, prompted=match["language"] == "console")


def _commands(body: str, first: int, extra: tuple[str, ...], *, prompted: bool) -> Iterator[Command]:
    lines = body.replace("\\\n", " \x00").split("\n")
    number = first
    for line in lines:
        text = line.replace("\x00", "")
        words = (
            tuple(shlex.split(text.removeprefix("$ "), comments=True)) if text.startswith("$ ") or not prompted else ()
        )
        if words:
            yield Command((*words, *extra) if words[0] == "fmg" else words, number)
        number += 1 + line.count("\x00")
