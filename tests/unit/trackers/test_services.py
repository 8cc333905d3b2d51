"""What services are told."""

from __future__ import annotations

import warnings
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest

from fmg.core.protocols import TrackedRun
from fmg.trackers.configs import TrackioConfig
from fmg.trackers.services import Trackio, folder_name


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("my run", "my run"),
        # a recipe of a stranger can state a name
        ("../../home/.config/x", "..-..-home-.config-x"),
        ("..\\x\0", "..-x-"),
        ("x" * 255, "x" * 200),
        ("é" * 255, "é" * 100),
        ("a" + "é" * 255, "a" + "é" * 99),
    ],
)
def test_a_name_of_a_run_is_one_folder(name: str, folder: str) -> None:
    assert folder_name(name) == folder


@pytest.mark.parametrize("action", ["error", "ignore"])
def test_problems_of_trackio_are_told_whatever_the_filters_of_warnings(
    action: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    trackio = pytest.importorskip("trackio")

    def init(*args: object, **options: object) -> object:
        warnings.warn("the disk is full", stacklevel=2)
        return SimpleNamespace(id="x")

    monkeypatch.setattr(trackio, "init", init)
    monkeypatch.setenv("TRACKIO_SERVER_URL", "http://127.0.0.1:9")
    warn = Mock()
    run = Mock(spec=TrackedRun, path=Path(), id="0123abcd", logged=0, recipe={}, warn=warn)
    run.name = "run"
    with warnings.catch_warnings():
        warnings.simplefilter("error" if action == "error" else "ignore")
        Trackio(TrackioConfig()).open(run)
    warn.assert_called_once_with("the disk is full")
