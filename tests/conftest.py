"""Fixtures shared by several test packages."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from fmg.inference.artifact import Artifact
from tests.support.fake_hub import FakeHub, fake_hub, point_at


def pytest_configure() -> None:
    """Handles Ctrl-C even in a background job, which ignores it: tests send it to themselves and their children."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def shapes_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the embedded two-time model."""
    from tests.support.artifact import make_run, shapes_recipe

    return make_run(tmp_path_factory.mktemp("runs") / "first", shapes_recipe(), seed=1)


@pytest.fixture(scope="session")
def other_shapes_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A second run of the same model, with a different adapter, target modules, steps and reward."""
    from tests.support.artifact import make_run, shapes_recipe

    recipe = shapes_recipe(
        **{"lora.rank": 2, "lora.targets": "attention-mlp", "rollout.steps": 3, "rewards": ["jpeg-compressibility"]}
    )
    return make_run(tmp_path_factory.mktemp("runs") / "second", recipe, seed=2)


@pytest.fixture(scope="session")
def shapes_artifact(shapes_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """The fp32 artifact of `shapes_run`, with 8-bit weights as well. Do not change it: copy it."""
    from fmg.export.options import ExportOptions
    from tests.support.artifact import exported

    out = tmp_path_factory.mktemp("artifacts") / "shapes"
    return exported(shapes_run, out, ExportOptions(int8=True, resolutions=(32, 48), batch=(1, 4, 64)))


@pytest.fixture(scope="session")
def student_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a tiny single-time FLUX student with embedded guidance, with a cache of its own."""
    from tests.support.artifact import make_run, student_recipe

    folder = tmp_path_factory.mktemp("student")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FMG_CACHE", str(folder / "cache"))
        return make_run(folder / "run", student_recipe(folder), seed=3)


@pytest.fixture(scope="session")
def student_artifact(student_run: Path) -> Artifact:
    """The artifact of `student_run`, fp32. Do not change it: copy it."""
    from tests.support.artifact import exported

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FMG_CACHE", str(student_run.parent / "cache"))
        return exported(student_run, student_run.parent / "artifact")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """The stand-in, with caches of the test's own, in an empty working directory."""
    monkeypatch.setenv("FMG_CACHE", str(tmp_path / "fmg"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with fake_hub() as running:
        point_at(running, monkeypatch, str(tmp_path / "hub"))
        yield running
