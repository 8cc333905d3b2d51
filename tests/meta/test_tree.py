"""Rules of the repository that no linter checks."""

from __future__ import annotations

import itertools
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from fmg.recipe import resolve

ROOT = Path(__file__).resolve().parents[2]
MAX_LINES = 600
MAX_BYTES = 12_000_000
TEXT = {"", ".cfg", ".json", ".jsonl", ".md", ".py", ".sh", ".toml", ".txt", ".yaml", ".yml"}


def files(*patterns: str) -> list[Path]:
    """What git tracks or would track, under the given path patterns."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z", "--", *patterns]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [path for name in listed.split("\0") if name and (path := ROOT / name).is_file()]


def offenders(pattern: str, paths: list[Path]) -> list[str]:
    """`file:line` of every line that matches, this file excepted."""
    found = []
    for path in paths:
        if path == Path(__file__) or path.suffix not in TEXT:
            continue
        lines = path.read_text(encoding="utf-8").splitlines()
        found += [f"{path.relative_to(ROOT)}:{i}" for i, line in enumerate(lines, 1) if re.search(pattern, line)]
    return found


def test_no_module_is_long() -> None:
    long = {path: count for path in files("*.py") if (count := len(path.read_text("utf-8").splitlines())) > MAX_LINES}
    assert not long


def test_no_file_is_large() -> None:
    assert not [path for path in files() if path.stat().st_size > MAX_BYTES]


@pytest.mark.parametrize(
    ("rule", "pattern", "where"),
    [
        ("paths of one machine", r"(?<![\w.<])/(?:farm|home|opt|root|Users|work)/", ["."]),
        ("torchvision", r"^\s*(?:from|import) torchvision", ["*.py"]),
        ("torchvision as a dependency", "torchvision", ["*.toml", "*.txt", "Makefile", ".ci"]),
        (
            "pickle",
            r"\bpickle\.(?:dump|load|Pickler|Unpickler)\w*\(|allow_pickle *= *True",
            ["fmg", "benchmarks", "examples"],
        ),
        ("unsafe loading", r"weights_only *= *False", ["fmg", "benchmarks", "examples"]),
        ("loading without weights_only", r"torch\.load\((?!.*weights_only=True)", ["fmg", "benchmarks", "examples"]),
        ("code from a checkpoint", r"trust_remote_code *= *True", ["*.py"]),
        # an index has another project under the name of the command
        (
            "an installation of another project's fmg",
            r"\b(?:pip\d?|uv|pipx) (?:install|add)(?: +-\S+)* +['\"]?fmg(?![\w-])"
            r"|\bfmg\[\w|dependencies.*\"fmg[\"\[<>=~]",
            ["."],
        ),
        ("leftovers", r"\b(?:TODO|FIXME|XXX)\b|raise NotImplementedError", ["fmg", "benchmarks", "examples"]),
    ],
)
def test_no_trace_of(rule: str, pattern: str, where: list[str]) -> None:
    assert not offenders(pattern, files(*where)), rule


@pytest.mark.parametrize(("library", "rooms"), [("typer", {"cli"}), ("rich", {"cli", "progress"})])
def test_only_the_rooms_that_print_know(library: str, rooms: set[str]) -> None:
    others = [path for path in files("fmg/*.py") if not rooms & set(path.relative_to(ROOT).parts)]
    assert not offenders(rf"^\s*(?:from|import) {library}\b", others)


# without glob, * reaches into configs/accelerate, whose files are Accelerate's
@pytest.mark.parametrize(
    "recipe", files(":(glob)configs/*.yaml", ":(glob)configs/study-*/*.yaml"), ids=lambda path: path.stem
)
def test_every_shipped_recipe_resolves(recipe: Path) -> None:
    assert resolve(recipe).recipe.model.name


def pins_of(folder: str) -> dict[str, str]:
    lines = (ROOT / folder / "constraints.txt").read_text("utf-8").splitlines()
    exact = (line.split("==") for line in lines if line and not line.startswith("#"))
    return {canonicalize_name(name): version for name, version in exact}


@pytest.mark.parametrize("folder", [".", "runtime"])
def test_every_dependency_is_pinned_within_its_range(folder: str) -> None:
    project = tomllib.loads((ROOT / folder / "pyproject.toml").read_text("utf-8"))["project"]
    pins = pins_of(folder)
    wanted = [*project["dependencies"], *itertools.chain(*project["optional-dependencies"].values())]
    ranges = [requirement for requirement in map(Requirement, wanted) if requirement.name != project["name"]]
    assert not [str(r) for r in ranges if pins.get(canonicalize_name(r.name), "none") not in r.specifier]


def test_the_runtime_is_tested_with_the_versions_that_it_pins() -> None:
    ours, pinned = pins_of("."), pins_of("runtime")
    assert {name for name, version in pinned.items() if ours.get(name) != version} == {"typer"}
    assert not {"torch", "diffusers"} & set(pinned)


# what fmg sends to itself, what it has just written, and what a library answers
OWN_JSON = {
    "conformance/rules.py",
    "inference/tensorrt/precision_report.py",
    "training/checkpointing.py",
    "training/distributed.py",
}


def test_files_and_networks_are_read_by_one_reader_of_json() -> None:
    readers = offenders(r"json\.loads?\(|model_validate_json\(.*read_bytes", files("fmg/*.py"))
    strange = [line for line in readers if line.partition(":")[0].removeprefix("fmg/") not in OWN_JSON]
    assert not strange, "read it by fmg.core.json_io"


def test_pictures_are_opened_in_one_place() -> None:
    opened = [line.partition(":")[0] for line in offenders(r"Image\.open\(", files("fmg/*.py"))]
    # the dump reads the pictures that it has just written
    assert set(opened) <= {"fmg/core/images.py", "fmg/eval/image_folders.py"}
