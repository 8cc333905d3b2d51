"""What services are told."""

from __future__ import annotations

import pytest

from fmg.trackers.services import folder_name


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
