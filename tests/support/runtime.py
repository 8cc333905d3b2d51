"""The runtime distribution: built from the sources, and installed by pip in an environment that has nothing else."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
import venv
from dataclasses import dataclass
from importlib.metadata import distributions
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
_NO_INDEX = re.compile(r"from versions: none|connection|timed out|name resolution", re.IGNORECASE)


@dataclass(frozen=True)
class InstalledRuntime:
    """An environment with the runtime.

    Attributes:
        folder: of the environment.
        wheel: what was installed.
        names: the installed distributions, in lower case.
        megabytes: on disk, without pip.
        seconds: that pip took, with whatever its cache had.
    """

    folder: Path
    wheel: Path
    names: frozenset[str]
    megabytes: float
    seconds: float

    @property
    def script(self) -> Path:
        return self.folder / "bin" / "fmg"

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    def environment(self) -> dict[str, str]:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        return {**inherited, "OMP_NUM_THREADS": "1"}

    def run(self, *command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(word) for word in command],
            cwd=cwd,
            env=self.environment(),
            capture_output=True,
            text=True,
            check=False,
        )

    def add(self, requirement: str) -> None:
        """Installs more."""
        _install(self.folder, requirement)


def install_runtime(folder: Path) -> InstalledRuntime:
    """Builds the wheel and installs it, with what pip resolves; skips the test without a package index."""
    # a wheel is built without an index if the backend is at hand
    isolation = ["--no-build-isolation"] if find_spec("hatchling") else []
    _pip(sys.executable, "wheel", "--no-deps", *isolation, "--wheel-dir", str(folder), str(ROOT / "runtime"))
    (wheel,) = folder.glob("flow_map_grpo_runtime-*.whl")
    environment = folder / "venv"
    venv.create(environment, with_pip=True, symlinks=True)
    started = time.perf_counter()
    _install(environment, str(wheel))
    seconds = time.perf_counter() - started
    (site,) = environment.glob("lib/python*/site-packages")
    ours = {entry for entry in site.iterdir() if not re.match(r"(pip|setuptools|pkg_resources|_distutils)", entry.name)}
    files = (file for entry in ours for file in (entry.rglob("*") if entry.is_dir() else [entry]))
    size = sum(file.stat().st_size for file in files if file.is_file())
    names = frozenset(found.metadata["Name"].lower() for found in distributions(path=[str(site)]))
    return InstalledRuntime(environment, wheel, names, size / 1e6, seconds)


def _install(environment: Path, requirement: str) -> None:
    _pip(
        str(environment / "bin" / "python"),
        "install",
        "--constraint",
        str(ROOT / "runtime" / "constraints.txt"),
        requirement,
    )


def _pip(python: str, *words: str) -> None:
    command = [python, "-m", "pip", "--disable-pip-version-check", "--no-input", "--quiet", words[0], *words[1:]]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode and _NO_INDEX.search(done.stderr):
        pytest.skip(f"no package index: {done.stderr.splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
