"""`make gpu-check` on a machine without a GPU: the same script on tiny shapes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the script builds the full-size student")
def test_every_check_holds_and_the_plan_fits_the_measured_peak(tmp_path: Path) -> None:
    out = tmp_path / "gpu_check.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_check.py"), "--images", "8", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("No GPU: tiny shapes on the CPU.")
    report = json.loads(out.read_text())
    assert report["replay"]["holds"]
    assert report["lora"]["holds"]
    assert report["moved"] > 0
    assert 0.75 < report["memory"]["planned_over_measured"] < 1.33
    assert report["machine"]["torch"] == torch.__version__
