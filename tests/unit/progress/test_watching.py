"""Where the progress of a Python call goes: a terminal, a notebook, an observer, the log."""

from __future__ import annotations

import io
import sys
from types import ModuleType
from typing import Any

import pytest

from fmg.core.events import Event, IterationDone, Notice, Observer, StageProgress, Started
from fmg.progress import watching
from fmg.progress.reporters import NotebookReporter

WARNING = Notice("warning", "look here")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def said(monkeypatch: pytest.MonkeyPatch, stream: io.StringIO, observer: Observer | None, progress: bool | None) -> str:
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("TERM", "xterm")
    with watching(observer, progress) as tell:
        tell(Started("a-model", 1, {}))
        tell(WARNING)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("stream", "progress", "observed", "shown"),
    [
        (Terminal, None, False, True),
        (Terminal, None, True, False),
        (Terminal, True, True, True),
        (Terminal, False, False, False),
        (io.StringIO, None, False, False),
        (io.StringIO, True, False, True),
    ],
)
def test_where_progress_is_shown(
    stream: type[io.StringIO], progress: bool | None, observed: bool, shown: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[Event] = []
    text = said(monkeypatch, stream(), heard.append if observed else None, progress)
    assert ("a-model" in text) == shown
    assert len(heard) == (2 if observed else 0)


def test_a_warning_that_is_not_shown_is_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    said(monkeypatch, io.StringIO(), None, None)
    assert [(r.name, r.levelname, r.message) for r in caplog.records] == [("fmg", "WARNING", "look here")]
    caplog.clear()
    said(monkeypatch, io.StringIO(), lambda event: None, None)
    assert not caplog.records


class Handle:
    def __init__(self, pages: list[str]) -> None:
        self.pages = pages

    def update(self, page: str) -> None:
        self.pages.append(page)


def test_a_notebook_gets_one_output_that_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    pages: list[str] = []

    def display(page: str, *, display_id: bool) -> Handle:
        assert display_id
        pages.append(page)
        return Handle(pages)

    module: Any = ModuleType("IPython.display")
    module.HTML, module.display = str, display
    monkeypatch.setitem(sys.modules, "IPython", ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", module)
    with NotebookReporter() as reporter:
        reporter(Started("a-model", 2, {"reward": "<b>"}))
        reporter(StageProgress("rollout", 1, 4))
        reporter(IterationDone(1, 2, {"iteration": 1, "reward/mean": 0.5}))
        reporter(WARNING)
    assert "&lt;b&gt;" in pages[0]
    assert "a-model" in pages[-1]
    assert "1/2" in pages[-1]
    assert "look here" in pages[-1]
