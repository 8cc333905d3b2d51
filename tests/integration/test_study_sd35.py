"""The study on SD3.5-Medium: its plan, and on a tiny folder an arm that is killed, resumed, evaluated and tabulated."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from fmg.core.errors import UsageError
from fmg.data.resume_points import newest_state
from scripts import study_sd35
from tests.support.processes import ROOT, environment
from tests.support.run_files import metrics

EIGHT = {"imagereward", "pickscore", "aesthetic", "clipscore", "hpsv2", "hpsv3", "geneval2", "ocr"}
ITERATIONS = 4
SHRUNK = {
    "rewards": ["jpeg-incompressibility"],
    "eval.rewards": [],
    "eval.num": 2,
    "eval.batch_size": None,
    "rollout.groups": 2,
    "rollout.group_size": 2,
    "rollout.batch_size": None,
    "train.iterations": ITERATIONS,
    "train.state_every": 1,
    "train.micro_batch": None,
    "train.dtype": "fp32",
    "train.device": "cpu",
    "lora.rank": 2,
}


@pytest.fixture(autouse=True)
def nothing_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FMG_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))


def test_the_plan_adds_up(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    prompts = tmp_path / "drawbench.txt"
    prompts.write_text("a red circle\na blue square\n")
    given = ["--plan", "--eval-prompts", "drawbench", str(prompts), "--adapter", "owner/name@main:one.pt"]
    assert study_sd35.main([*given, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    arms = found["arms"]
    assert next(iter(arms)) == "meanflow-nft"
    assert len(arms) == 6
    assert {arm["images"] for arm in arms.values()} == {1152}
    hours = {name: arm["hours_per_100"]["H100 SXM"] for name, arm in arms.items()}
    # 4608 calls of the rollout, and in the updates 4608 with gradients and three times as many without
    assert hours["meanflow-nft"] == pytest.approx(hours["mean-flow-advantage"])
    assert hours["meanflow-nft"] > 2 * hours["grpo-chain"] > 20 * hours["grpo-branch"]
    assert hours["null"] == hours["grpo-branch"]
    spent = sum(arm["hours_per_100"]["H100 SXM"] * arm["iterations"] / 100 for arm in arms.values())
    assert found["hours"]["H100 SXM"] == pytest.approx(spent + found["evaluation"]["hours"]["H100 SXM"])
    assert found["evaluation"]["prompts"] == {"drawbench": 2, "hpsv3": 104, "ocr": 64, "geneval2": 0}
    assert found["evaluation"]["images"] == 2 * 6 * 170
    assert not arms["meanflow-nft"]["fits"]["RTX 4090"]
    assert arms["grpo-branch"]["fits"]["L40S"]
    # ocr brings its networks with its package
    wanted = {f"fmg fetch reward {name}" for name in EIGHT - {"ocr"}} | {"fmg fetch sd35-meanflow"}
    assert {one["command"] for one in found["downloads"]} == wanted
    assert all(one["licence"] for one in found["downloads"])
    page = (ROOT / "docs" / "study.md").read_text(encoding="utf-8")
    for name, arm in arms.items():
        figures = f"| {hours[name]:.2g} | {arm['memory_bytes'] / 1e9:.0f} GB |"
        assert any(line.startswith(f"| `{name}` |") and line.endswith(figures) for line in page.splitlines()), figures
    assert f"take {spent:.0f} GPU-hours" in page
    assert not [note for note in found["notes"] if "adapter" in note or "drawbench" in note]

    assert study_sd35.main(given) == 0
    shown = capsys.readouterr().out
    assert "| grpo-branch | 1152 |" in shown
    assert "count the transformer alone" in shown


def test_nothing_starts_while_something_is_missing(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert study_sd35.main(["--out", str(out), "--arm", "null"]) == 1
    assert "Fetch it with `fmg fetch" in capsys.readouterr().err
    assert study_sd35.main(["--plan", "--eval-prompts", "drawbensh", "x.txt"]) == 1
    assert "Did you mean 'drawbench'" in capsys.readouterr().err
    assert not out.exists()


def test_a_run_without_a_state_stays_and_another_begins(tmp_path: Path) -> None:
    from fmg.data.run_folder import RunFolder

    assert study_sd35.place(tmp_path, "null") == (tmp_path / "null", "new")
    RunFolder.create(tmp_path / "null", "sd35-meanflow")
    assert study_sd35.place(tmp_path, "null") == (tmp_path / "null-2", "new")
    RunFolder.create(tmp_path / "null-2", "sd35-meanflow")
    (tmp_path / "null-2" / "state" / "iteration-00000003").mkdir(parents=True)
    assert study_sd35.place(tmp_path, "null") == (tmp_path / "null-2", "resume")
    with RunFolder(tmp_path / "null-2").lock(), pytest.raises(UsageError, match="by another process"):
        study_sd35.place(tmp_path, "null")
    (tmp_path / "grpo-chain").mkdir()
    (tmp_path / "grpo-chain" / "mine.txt").touch()
    with pytest.raises(UsageError, match="not a run of the study"):
        study_sd35.place(tmp_path, "grpo-chain")


@pytest.mark.slow
def test_an_arm_is_killed_resumed_evaluated_and_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tests.tiny_sd35 import sd35_options

    options = {f"model.{key}": value for key, value in sd35_options(tmp_path / "folder").items()}
    sets = [f"{key}={json.dumps(value)}" for key, value in {**SHRUNK, **options}.items()]
    (tmp_path / "heldout.txt").write_text("a red circle\na blue square on the left\n")
    out = tmp_path / "out"
    given = [
        "--out",
        str(out),
        "--gpus",
        "1",
        "--arm",
        "meanflow-nft",
        "--dtype",
        "fp32",
        "--resolution",
        "96",
        "--json",
    ]
    given += ["--evaluation", "quick", "jpeg-compressibility", str(tmp_path / "heldout.txt")]
    given += [part for text in sets for part in ("--set", text)]
    command = [sys.executable, str(ROOT / "scripts" / "study_sd35.py"), *given]
    run = out / "meanflow-nft"

    killed = subprocess.Popen(
        command, env=environment(), stderr=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
    )
    deadline = time.monotonic() + 300
    while newest_state(run) is None and killed.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(killed.pid, signal.SIGKILL)
    _, log = killed.communicate()
    assert newest_state(run) is not None, log
    assert len(metrics(run)) < ITERATIONS + 2

    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"meanflow-nft: resuming {run}" in done.stderr
    assert [line["iteration"] for line in metrics(run) if "loss" in line] == list(range(1, ITERATIONS + 1))
    assert sorted(path.name for path in out.iterdir() if path.is_dir()) == ["eval", "meanflow-nft"]
    table = json.loads(done.stdout)
    base, arm = table["arms"]
    assert (arm["images"], arm["iterations"]) == (4 * ITERATIONS, ITERATIONS)
    assert arm["gpu_hours"] > 0
    scores, gain = base["scores"]["jpeg-compressibility"], arm["scores"]["jpeg-compressibility"]
    assert gain["difference"] == pytest.approx(gain["mean"] - scores["mean"], abs=1e-9)
    report = json.loads((out / "eval" / "meanflow-nft-quick.json").read_text())["report"]
    assert (report["target"], report["num"]) == (f"{run} at 96 px", 2)

    # finished: the table again at once, and other settings are refused
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file() and path.name != ".lock"}
    assert study_sd35.main(given) == 0
    assert json.loads(capsys.readouterr().out) == table
    assert study_sd35.main([*given, "--set", "optimizer.lr=1.0"]) == 1
    assert "another value of optimizer.lr" in capsys.readouterr().err
    assert study_sd35.main([*given, "--resolution", "64"]) == 1
    assert "measured with other settings" in capsys.readouterr().err
    after = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file() and path.name != ".lock"}
    assert after == before
