"""Commands that only look at names, options and recipes start without the heavy libraries."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = ("torch", "numpy", "scipy", "PIL", "matplotlib", "transformers", "diffusers", "peft", "accelerate")

SCRIPT = f"""
import sys
from fmg.cli.main import main
code = main(sys.argv[1:])
loaded = [name for name in {HEAVY} if name in sys.modules]
sys.exit(f"imported {{loaded}}" if loaded else code)
"""


@pytest.mark.parametrize(
    "command",
    [
        ["--help"],
        ["--version"],
        ["train", "--help"],
        ["eval", "--help"],
        ["generate", "--help"],
        ["bench", "--help"],
        ["verify", "--help"],
        ["export", "--help"],
        ["serve", "--help"],
        ["push", "--help"],
        ["score", "--help"],
        ["report", "--help"],
        ["check-component", "--help"],
        ["doctor", "--help"],
        ["doctor", "run", "nowhere"],
        ["list", "feature-extractors"],
        ["show", "feature-extractor", "dinov2"],
        ["list"],
        ["schema"],
        ["show", "stochasticizer", "asfmc"],
        ["show", "model", "meanflow-shapes"],
        ["show", "model", "sana-sprint"],
        ["train", "--model", "sana-sprint", "--reward", "jpeg-incompressibility", "--dry-run", "--offline"],
        ["runs"],
        ["train", "--dry-run"],
        ["train", "--dry-run", "--json", "--reward", "shapes=0.5", "--set", "lora.rank=4"],
        ["train", "--lr", "-1"],
    ],
    ids=" ".join,
)
def test_no_heavy_import(command: list[str], tmp_path: Path) -> None:
    # in a folder without runs, because reading the logs of runs imports numpy
    script = [sys.executable, "-c", SCRIPT, *command]
    done = subprocess.run(script, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == (2 if {"-1", "nowhere"} & set(command) else 0), done.stderr
    assert "imported" not in done.stderr


def test_what_a_run_can_be_refused_for_needs_no_model_library() -> None:
    """Rewards, prompts and sizes are checked before the model libraries are imported, which takes ten seconds."""
    heavy = ("matplotlib", "transformers", "diffusers", "peft", "accelerate")
    script = f"import sys, fmg.training.api; sys.exit(str([n for n in {heavy} if n in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == "[]"
