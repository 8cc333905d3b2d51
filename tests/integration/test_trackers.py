"""Trackers show what `metrics.jsonl` holds, as one curve however a run ends, and never cost a run anything."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from filelock import FileLock

from fmg import train
from fmg.core.errors import FmgWarning, MissingDependencyError
from fmg.core.events import Event, IterationDone, Notice
from fmg.data.resume_points import newest_state
from fmg.data.run_folder import RunFolder
from fmg.recipe import Recipe
from fmg.trackers import following
from fmg.training.api import resume
from fmg.training.state_files import read_state
from tests.support import trackers as read
from tests.support.cli import fmg
from tests.support.processes import environment

# what the development environment installs
NAMES = ("tensorboard", "wandb", "trackio")
MISSING = [name for name in NAMES if find_spec(name) is None]

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")]
TINY = {
    "train.iterations": 9,
    "train.updates_per_iteration": 1,
    "train.state_every": 5,
    "train.device": "cpu",
    "rollout.groups": 2,
    "rollout.group_size": 4,
    "rollout.steps": 2,
    "eval.num": 4,
    "eval.every": 3,
    "eval.rewards": [],
}
# ends itself in iteration 7, alone or with everything that it started
KILLED = """
import os, signal, sys, time
import psutil, fmg
from fmg.core.events import IterationDone

def end(event):
    if isinstance(event, IterationDone) and event.iteration == 7:
        if sys.argv[3] == "machine":
            time.sleep(3)
            for child in psutil.Process().children(recursive=True):
                child.kill()
        os.kill(os.getpid(), signal.SIGKILL)

fmg.train(sys.argv[1], sys.argv[2], end)
"""


@pytest.fixture(scope="module", autouse=True)
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """No account, store or setting of the user is read or written."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        for name in os.environ:
            if name.startswith(("WANDB", "TRACKIO", "SWANLAB", "MLFLOW", "HF_")):
                patch.delenv(name)
        patch.setenv("HOME", str(home))
        patch.setenv("TRACKIO_DIR", str(home / "trackio"))
        yield home


def recipe(*names: str, **values: object) -> Recipe:
    return Recipe.default(**{**TINY, "trackers": list(names), **values})


def as_written(run: Path, name: str) -> tuple[read.Rows, list[int], object]:
    rows, images, config = getattr(read, name)(run)
    return rows, images, config


def refuse_warnings(event: Event) -> None:
    assert not (isinstance(event, Notice) and event.level != "info" and "tracker" in event.text), event


def wait_for_followers(run: Path) -> None:
    for name in NAMES:
        with FileLock(run / "trackers" / f"{name}.lock", timeout=60):
            pass


@pytest.mark.parametrize("dies", ["process", "machine"])
def test_killed_and_resumed_is_one_curve(dies: str, tmp_path: Path) -> None:
    run, document = tmp_path / "run", tmp_path / "recipe.yaml"
    document.write_text(recipe(*NAMES).to_yaml())
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(document), str(run), dies],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    wait_for_followers(run)
    if dies == "process":
        # the processes of the trackers deliver what their run had logged
        wanted = read.logged(run)
        assert max(wanted) == 7
        for name in NAMES:
            rows, images, _ = as_written(run, name)
            read.assert_same(rows, wanted, rel=2e-7 if name == "tensorboard" else 0.0)
            assert images == [0, 3, 6]
    before = json.loads((run / "trackers" / "tracked_run.json").read_text())
    state = newest_state(run)
    assert state is not None
    assert read_state(state)["tracker"] == before
    # the state alone is enough to find the run in its trackers
    (run / "trackers" / "tracked_run.json").unlink()

    resume(run, refuse_warnings)

    assert json.loads((run / "trackers" / "tracked_run.json").read_text()) == before
    wanted = read.logged(run)
    assert sorted(wanted) == list(range(10))
    for name in NAMES:
        rows, images, config = as_written(run, name)
        # Trackio keeps the first rows of the repeated iterations, of which only the times differ
        read.assert_same(
            rows, wanted, rel=2e-7 if name == "tensorboard" else 0.0, times_from=6 if name == "trackio" else 99
        )
        assert images == [0, 3, 6, 9]
        assert isinstance(config, dict)
        assert {key: value for key, value in config.items() if not key.startswith("_")} == RunFolder(run).values()


def test_a_tracker_that_joins_later_gets_the_whole_curve(tmp_path: Path) -> None:
    run = tmp_path / "run"

    def stop(event: Event) -> None:
        if isinstance(event, IterationDone) and event.iteration == 2:
            raise KeyboardInterrupt

    assert train(recipe(**{"train.iterations": 3}), run, stop).interrupted
    assert not (run / "trackers").exists()
    written = run / "recipe.yaml"
    written.write_text(written.read_text().replace("trackers: []", "trackers: tensorboard"))
    resume(run, refuse_warnings)
    rows, images, _ = read.tensorboard(run)
    read.assert_same(rows, read.logged(run), rel=2e-7)
    assert images == [0, 3]


def test_a_dead_or_silent_server_costs_one_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(following, "CLOSE_TIMEOUT", 20.0)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("TRACKIO_SERVER_URL", "http://127.0.0.1:9/?write_token=secret")
        # it accepts connections and never answers
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
        began = time.monotonic()
        with pytest.warns(FmgWarning) as warned:
            result = train(recipe("wandb", "trackio", "tensorboard", **{"train.iterations": 2}), tmp_path / "run")
        spent = time.monotonic() - began
    texts = [str(warning.message) for warning in warned]
    assert sorted(text.split("'")[1] for text in texts) == ["trackio", "wandb"], texts
    assert "secret" not in "".join(texts)
    assert result.run.state().state == "finished"
    assert spent < 90
    rows, _, _ = read.tensorboard(tmp_path / "run")
    read.assert_same(rows, read.logged(tmp_path / "run"), rel=2e-7)


def test_a_killed_tracker_does_not_hurt_its_run(tmp_path: Path) -> None:
    heard: list[Event] = []

    def kill(event: Event) -> None:
        heard.append(event)
        if isinstance(event, IterationDone) and event.iteration == 1:
            import psutil

            for child in psutil.Process().children():
                if "fmg.trackers.follower" in child.cmdline():
                    child.kill()

    with pytest.warns(FmgWarning, match=r"tracker 'tensorboard' .* ended with code -9") as warned:
        result = train(recipe("tensorboard", **{"train.iterations": 3}), tmp_path / "run", kill)
    assert len(warned) == 1
    assert result.iterations == 3
    assert not [event for event in heard if isinstance(event, Notice) and event.level != "info"]


@pytest.mark.filterwarnings("default")  # of MLflow's own libraries, which read the store here
@pytest.mark.skipif(find_spec("mlflow") is None, reason="mlflow is not installed")
def test_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    _interrupt_and_resume(tmp_path / "run", "mlflow")
    rows, images, config = read.mlflow(tmp_path / "run", uri)
    # an iteration that is repeated keeps its first times
    read.assert_same(rows, read.logged(tmp_path / "run"), times_from=2)
    assert images == [0, 2, 3]
    assert config["train.iterations"] == "3"
    assert config["rewards.0.name"] == "shapes"


@pytest.mark.skipif(find_spec("swanlab") is None, reason="swanlab is not installed")
def test_swanlab(tmp_path: Path) -> None:
    _interrupt_and_resume(tmp_path / "run", "swanlab")
    (folder,) = (tmp_path / "run" / "trackers" / "swanlab").glob("run-*")
    assert len(list((folder / "media" / "image").glob("*.png"))) == 3
    assert "meanflow-shapes" in (folder / "files" / "config.yaml").read_text()


def _interrupt_and_resume(run: Path, name: str) -> None:
    """Ctrl-C after the second of three iterations, before its evaluation."""

    def stop(event: Event) -> None:
        refuse_warnings(event)
        if isinstance(event, IterationDone) and event.iteration == 2:
            raise KeyboardInterrupt

    plan = recipe(name, **{"train.iterations": 3, "eval.every": 2, "train.state_every": 1})
    with pytest.MonkeyPatch.context() as patch:
        # a new store of MLflow takes a while
        patch.setattr(following, "INTERRUPTED_TIMEOUT", 60.0)
        assert train(plan, run, stop).interrupted
    resume(run, refuse_warnings)


def test_a_missing_package_is_said_before_anything_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fmg.recipe.composition.find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"needs the package 'wandb'. Run: pip install 'flow-map-grpo\[wa"):
        train(recipe("wandb"), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    for planned in ((), ("--dry-run",)):
        done = fmg("train", "--tracker", "wandb", *planned)
        assert (done.code, done.stdout) == (2, "")
        assert done.stderr == (
            "error: The tracker 'wandb' needs the package 'wandb'. Run: pip install 'flow-map-grpo[wandb]'.\n"
        )
