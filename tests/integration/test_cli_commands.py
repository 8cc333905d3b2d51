"""The commands on the embedded model, in the order in which a user runs them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fmg.data.run_folder import RunFolder
from fmg.version import __version__
from tests.support.cli import Invocation, fmg
from tests.support.schemas import check

pytestmark = pytest.mark.slow

SMALL = ["--set", "rollout.groups=2", "--set", "rollout.group_size=4", "--set", "eval.num=8", "--set", "eval.every=1"]


def size(picture: Path) -> tuple[int, int]:
    with Image.open(picture) as image:
        return image.size


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("cli")
    with contextlib.chdir(folder):
        yield folder


@pytest.fixture(scope="module")
def trained(workplace: Path) -> Invocation:
    return fmg("train", "--run", "runs/first", "--iterations", "2", "--json", *SMALL)


def test_train_prints_the_lines_of_metrics_jsonl_and_then_the_run(trained: Invocation) -> None:
    assert trained.code == 0, trained.stderr
    lines = [json.loads(line) for line in trained.stdout.splitlines()]
    for line in lines:
        check(line, "train")
    stored = [json.loads(line) for line in Path("runs/first/metrics.jsonl").read_text().splitlines()]
    assert lines[:-1] == stored
    assert [line["iteration"] for line in stored] == [0, 1, 1, 2, 2]
    assert lines[-1]["run"] == "runs/first"
    assert lines[-1]["best"]["iteration"] in (0, 1, 2)


def test_a_run_folder_has_pictures_recipe_and_state(trained: Invocation) -> None:
    run = RunFolder(Path("runs/first"))
    assert run.state().state == "finished"
    assert "--iterations" in run.recipe.read_text()
    for picture in (run.before_after, run.curve, *run.samples.glob("*.png")):
        assert min(size(picture)) > 100
    assert len(list(run.samples.glob("*.png"))) == 3


def test_eval_json_follows_its_schema_and_pairs_two_targets(trained: Invocation) -> None:
    done = fmg("eval", "--against", "meanflow-shapes", "--num", "8", "--steps", "1,4", "--json")
    assert done.code == 0, done.stderr
    report = json.loads(done.stdout)
    check(report, "eval")
    assert report["target"] == "runs/first"
    assert {row["steps"] for row in report["results"]} == {1, 4}
    for ours, theirs, gap in zip(report["results"], report["against"]["results"], report["differences"], strict=True):
        assert gap["mean"] == pytest.approx(ours["mean"] - theirs["mean"], abs=1e-9)


def test_eval_prints_both_targets_and_their_difference(trained: Invocation) -> None:
    done = fmg("eval", "runs/first", "--against", "meanflow-shapes", "--num", "8", "--report", "pages")
    assert "Report: pages/report.html" in done.stdout
    heading = next(line for line in done.stdout.splitlines() if line.startswith("steps"))
    assert heading.split("  ")[0] == "steps"
    assert heading.index("meanflow-shapes") < heading.index("runs/first") < heading.index("difference")
    assert any(line.split()[1:3] == ["shapes", "strict"] for line in done.stdout.splitlines() if line)


def test_generate_writes_new_numbers_and_says_where(trained: Invocation, workplace: Path) -> None:
    command = ["generate", "a red circle left", "a blue square right", "--num", "2", "--sheet", "--json"]
    first, second = fmg(*command), fmg(*command, "--from", "meanflow-shapes")
    assert first.code == second.code == 0, first.stderr + second.stderr
    shown = [json.loads(done.stdout) for done in (first, second)]
    for value in shown:
        check(value, "generate")
    assert [(image["prompt"], image["seed"]) for image in shown[0]["images"]] == [
        ("a red circle left", 0),
        ("a red circle left", 1),
        ("a blue square right", 0),
        ("a blue square right", 1),
    ]
    paths = [image["path"] for value in shown for image in value["images"]]
    assert len(set(paths)) == 8
    assert all(size(Path(path)) == (32, 32) for path in paths)
    assert len(list((workplace / "images").iterdir())) == 10


def test_runs_lists_the_run(trained: Invocation) -> None:
    (row,) = json.loads(fmg("runs", "--json").stdout)
    assert (row["run"], row["state"], row["iterations"]) == ("runs/first", "finished", 2)


def test_dry_run_names_every_source_and_starts_nothing(trained: Invocation) -> None:
    before = sorted(Path("runs").rglob("*"))
    shown = fmg("train", "--dry-run", "--lr", "1e-3", "--set", "lora.rank=4")
    assert shown.code == 0, shown.stderr
    rows = {line.split()[0]: line for line in shown.stdout.splitlines() if line.strip()}
    assert rows["optimizer.lr"].split()[1:] == ["0.001", "--lr"]
    assert rows["lora.rank"].split()[1:] == ["4", "--set", "lora.rank=4"]
    assert "configs/meanflow-shapes.yaml:" in rows["rollout.groups"]
    assert sorted(Path("runs").rglob("*")) == before


def start(*args: str, **streams: Any) -> subprocess.Popen[bytes]:
    # a test-suite that runs in the background has SIGINT ignored, and its children would inherit that
    return subprocess.Popen(
        [sys.executable, "-m", "fmg", *args],
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        **streams,
    )


def test_ctrl_c_saves_the_adapter_and_reports_it(workplace: Path) -> None:
    run = RunFolder(Path("runs/stopped"))
    command = ["train", "--run", str(run.path), "--iterations", "100000", *SMALL, "--set", "eval.every=100000"]
    with start(*command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        while process.poll() is None and not (run.metrics.is_file() and len(run.metrics.read_text().splitlines()) > 2):
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=120)
    assert process.returncode == 130, err.decode()
    assert b"Traceback" not in err
    assert b"saved in runs/stopped" in out
    assert run.state().state == "interrupted"
    assert fmg("generate", "a red circle left", "--from", "runs/stopped").code == 0


@pytest.mark.skipif(sys.platform == "win32", reason="pseudo-terminals are POSIX")
def test_a_terminal_sees_the_live_view(workplace: Path) -> None:
    ours, theirs = os.openpty()
    command = ["train", "--run", "runs/seen", "--iterations", "1", *SMALL]
    with start(
        *command, stdout=theirs, stderr=theirs, env={**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    ) as process:
        os.close(theirs)
        shown = b""
        # a closed pseudo-terminal is an error on Linux and an end of file elsewhere
        with contextlib.suppress(OSError):
            while chunk := os.read(ours, 4096):
                shown += chunk
    os.close(ours)
    assert process.returncode == 0, shown.decode()
    text = shown.decode()
    assert "iteration" in text
    assert "1/1" in text
    # advice from libraries is not meant for users of the command
    assert "torchvision" not in text
    assert "fmg eval runs/seen --against base" in text
    assert "--from runs/seen" in text


def test_the_module_is_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "fmg", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"fmg {__version__}\n"
