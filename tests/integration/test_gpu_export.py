"""`benchmarks/gpu_export.py` on a machine without a GPU: the same program on tiny shapes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the program builds a model of full size")
def test_the_exported_graph_equals_eager_torch(tmp_path: Path) -> None:
    out = tmp_path / "gpu_export.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_export.py"), "--repeats", "1", "--no-engines"]
    done = subprocess.run([*command, "--out", str(out)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("No GPU: tiny shapes on the CPU.")
    report = json.loads(out.read_text())
    for side in ("64px", "128px"):
        ways = report[side]["ways"]
        assert ways.keys() == {"eager", "onnxruntime"}
        assert 0 < ways["onnxruntime"]["relative_l2_to_eager"] < 1e-5
        assert all(ways["eager"]["ms_by_steps"][str(steps)] > 0 for steps in range(1, 6))
    # products grow with the tokens: 32 of them at 64 px, 80 at 128 px
    assert 2 < report["128px"]["roofline"]["flops"] / report["64px"]["roofline"]["flops"] < 4
    assert report["engines"] == {}
