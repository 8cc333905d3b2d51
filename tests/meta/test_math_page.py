"""docs/math.md agrees with the docstrings that cite it and the checks that it names."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "math.md").read_text(encoding="utf-8")
NUMBERS = [int(number) for number in re.findall(r"\\tag\{(\d+)\}", PAGE)]
ROWS = re.findall(r"^\| (\d+) \| .+? \| (.+?) \|$", PAGE, re.MULTILINE)


def test_equations_are_numbered_in_order_and_listed() -> None:
    assert list(range(1, len(NUMBERS) + 1)) == NUMBERS
    assert [int(number) for number, _ in ROWS] == NUMBERS


@pytest.mark.parametrize("path", sorted({name for _, code in ROWS for name in re.findall(r"`([\w.]+)`", code)}))
def test_listed_code_exists(path: str) -> None:
    parts = path.split(".")
    found: object = importlib.import_module(".".join(parts[:3]))
    for name in parts[3:]:
        found = getattr(found, name)


def test_docstrings_cite_equations_that_exist() -> None:
    for room in ("core", "flow", "stochasticizers", "rl", "training"):
        for file in (ROOT / "fmg" / room).glob("*.py"):
            for first, last in re.findall(r"\beq\. (\d+)(?:(?:-| and )(\d+))?", file.read_text(encoding="utf-8")):
                assert {int(number) for number in (first, last) if number} <= set(NUMBERS), file.name


def test_named_checks_and_test_files_exist() -> None:
    sources = "".join(file.read_text(encoding="utf-8") for file in (ROOT / "tests" / "support").glob("*_identities.py"))
    for name in re.findall(r"`(check_\w+)`", PAGE):
        assert f"def {name}()" in sources, name
    for file in re.findall(r"`(tests/[\w/]+\.py)`", PAGE):
        assert (ROOT / file).is_file(), file


def test_every_check_of_the_flow_is_on_the_page() -> None:
    for room in ("flow", "stochasticizer", "variant", "branch", "forward", "gradient"):
        source = (ROOT / "tests" / "support" / f"{room}_identities.py").read_text(encoding="utf-8")
        # grids are lists of numbers, not equations
        missing = set(re.findall(r"^def (check_\w+)\(\)", source, re.MULTILINE)) - set(re.findall(r"check_\w+", PAGE))
        assert missing <= {"check_grids"}
