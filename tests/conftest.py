"""Fixtures shared by several test packages."""

from __future__ import annotations

import gc
import os
import shutil
import signal
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import pytest
from filelock import FileLock

from fmg.inference.artifact import Artifact, open_artifact
from tests.support.fake_hub import FakeHub, fake_hub, point_at


def pytest_configure() -> None:
    """Handles Ctrl-C even in a background job, which ignores it: tests send it to themselves and their children."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Spares the garbage collector modules and tests, which stay: a million objects to visit each time."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first, so that processes that share the files end at about the same time."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


Once = Callable[[str, Callable[[Path], object]], Path]


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Once:
    """A folder by its name, which the first of the processes that share the tests makes for all of them."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent

    def made(name: str, make: Callable[[Path], object]) -> Path:
        folder, done = root / "once" / name, root / "once" / f"{name}.done"
        folder.parent.mkdir(exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not done.exists():
                # of a process that failed
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                make(folder)
                done.touch()
        return folder

    return made


@pytest.fixture(scope="session")
def shapes_run(once: Once) -> Path:
    """A run of the embedded two-time model."""
    from tests.support.artifact import make_run, shapes_recipe

    return once("shapes-run", lambda folder: make_run(folder / "run", shapes_recipe(), seed=1)) / "run"


@pytest.fixture(scope="session")
def other_shapes_run(once: Once) -> Path:
    """A second run of the same model, with a different adapter, target modules, steps and reward."""
    from tests.support.artifact import make_run, shapes_recipe

    recipe = shapes_recipe(
        **{"lora.rank": 2, "lora.targets": "attention-mlp", "rollout.steps": 3, "rewards": ["jpeg-compressibility"]}
    )
    return once("other-shapes-run", lambda folder: make_run(folder / "run", recipe, seed=2)) / "run"


@pytest.fixture(scope="session")
def shapes_artifact(shapes_run: Path, once: Once) -> Artifact:
    """The fp32 artifact of `shapes_run`, with 8-bit weights as well. Do not change it: copy it."""
    from fmg.export.options import ExportOptions
    from tests.support.artifact import exported

    options = ExportOptions(int8=True, resolutions=(32, 48), batch=(1, 4, 64))
    folder = once("shapes-artifact", lambda folder: exported(shapes_run, folder / "shapes", options))
    return open_artifact(folder / "shapes")


@pytest.fixture(scope="session")
def student_run(once: Once) -> Path:
    """A run of a tiny single-time FLUX student with embedded guidance, with a cache of its own."""
    from tests.support.artifact import make_run, student_recipe

    def make(folder: Path) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("FMG_CACHE", str(folder / "cache"))
            make_run(folder / "run", student_recipe(folder), seed=3)

    return once("student-run", make) / "run"


@pytest.fixture(scope="session")
def student_artifact(student_run: Path, once: Once) -> Artifact:
    """The artifact of `student_run`, fp32. Do not change it: copy it."""
    from tests.support.artifact import exported

    def make(folder: Path) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("FMG_CACHE", str(student_run.parent / "cache"))
            exported(student_run, folder / "artifact")

    return open_artifact(once("student-artifact", make) / "artifact")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """The stand-in, with caches of the test's own, in an empty working directory."""
    monkeypatch.setenv("FMG_CACHE", str(tmp_path / "fmg"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with fake_hub() as running:
        point_at(running, monkeypatch, str(tmp_path / "hub"))
        yield running
