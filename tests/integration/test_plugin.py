"""The examples of third-party packages: installed by pip, found by their entry points, and used."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"

# One process for all commands: most of the time goes into importing torch and diffusers.
PROGRAM = """
import sys
from fmg.cli.main import main
assert "torch" not in sys.modules
assert main(["list", "rewards"]) == 0
assert "torch" not in sys.modules, "listing the components of the package imported torch"
assert main(["show", "reward", "warmth"]) == 0
assert main(["schema"]) == 0
assert main(["check-component", "reward", "warmth"]) == 0
assert main(["check-component", "fmg_warmth.stochasticizer:Halfway", "--set", "fraction=0.8"]) == 0
small = ["rollout.groups=2", "rollout.group_size=4", "rollout.steps=2", "eval.num=8", "eval.rewards=[shapes]"]
flags = [word for value in small for word in ("--set", value)]
parts = ["--reward", "warmth", "--stochasticizer", "asfmc-halfway"]
assert main(["train", *parts, "--iterations", "2", "--run", "run", *flags]) == 0
assert main(["train", "--model", "scm-shapes", *parts, "--dry-run"]) == 2
"""


def installed(name: str, tmp_path: Path) -> dict[str, str]:
    """An environment in which an example is installed."""
    source, target = tmp_path / "source", tmp_path / "installed"
    # pip builds in the folder of the sources
    shutil.copytree(EXAMPLES / name, source)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-index"]
    subprocess.run([*pip, "--no-deps", "--no-build-isolation", "--target", str(target), str(source)], check=True)
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(target), str(ROOT)])}


def run(tmp_path: Path, environment: dict[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *words]
    return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)


def test_the_installed_example_works(tmp_path: Path) -> None:
    done = run(tmp_path, installed("fmg-plugin-warmth", tmp_path), "-c", PROGRAM)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Warm colours: red minus blue" in done.stdout
    assert "No rule is broken." in done.stdout
    # in the schema that editors read, with its options
    assert '"reward.warmth": {' in done.stdout
    assert "needs a two-time map" in done.stderr
    recipe = (tmp_path / "run" / "recipe.yaml").read_text()
    assert "name: warmth" in recipe
    assert "name: asfmc-halfway" in recipe


FAMILY = """
import sys
from fmg.cli.main import main
assert main(["show", "auraflow"]) == 0
flags = ["--model", "auraflow", "--reward", "jpeg-incompressibility", "--offline"]
assert main(["train", *flags, "--dry-run"]) == 0
assert "torch" not in sys.modules, "planning a run of the package imported torch"
assert main(["train", *flags]) == 2
"""


def test_the_installed_family_works(tmp_path: Path) -> None:
    environment = installed("fmg-plugin-auraflow", tmp_path)
    done = run(tmp_path, environment, "-c", FAMILY)
    assert done.returncode == 0, done.stdout + done.stderr
    for fact in ("transformer: AuraFlowTransformer2DModel", "map: velocity", "grid: uniform", "time: x 1000"):
        assert fact in done.stdout
    assert "second time: none" in done.stdout
    assert "Fetch it with `fmg fetch auraflow`" in done.stderr
    tests = str(tmp_path / "source" / "tests")
    done = run(tmp_path, environment, "-m", "pytest", "-q", "-p", "no:cacheprovider", tests)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "7 passed" in done.stdout
