"""A FLUX folder with an AnyFlow-style adapter from end to end: train, export, verify, and a folder for diffusers."""

from __future__ import annotations

from pathlib import Path

import pytest

import fmg
from fmg import FlowMapPipeline
from fmg.recipe import Recipe
from tests.support.cli import fmg as command
from tests.tiny_flux import RESOLUTION, SEQUENCE, build_tiny_teacher
from tests.unit.models.test_stacked_adapters import ALPHA, ANYFLOW, anyflow, embedder, lora

pytestmark = pytest.mark.slow


def test_a_stock_folder_with_an_adapter_is_trained_exported_and_sampled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FMG_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    folder = build_tiny_teacher(tmp_path / "flux")
    adapter = anyflow(tmp_path / "anyflow.pt", lora(folder, 0), embedder(0))
    recipe = Recipe.default(
        "flux-fewstep",
        **{
            "model.folder": str(folder),
            "model.adapters": [{"source": str(adapter), "alpha": ALPHA}],
            "model.map": "two-time",
            "model.second_time": ANYFLOW,
            "model.time_scale": 1,
            "model.guidance": 3.5,
            "model.resolution": RESOLUTION,
            "model.max_sequence_length": SEQUENCE,
            "stochasticizer": {"name": "asfmc", "gap": 0.0147},
            "rewards": ["jpeg-incompressibility"],
            "rollout.groups": 2,
            "rollout.group_size": 4,
            "rollout.grid": "shift-3",
            "train.iterations": 2,
            "train.dtype": "fp32",
            "lora.rank": 2,
            "eval.num": 4,
        },
    )
    assert fmg.train(recipe, tmp_path / "run").iterations == 2
    exported = command("export", "run", "artifact")
    assert exported.code == 0, exported.stderr
    verified = command("verify", "artifact", "--num", "1")
    assert verified.code == 0, verified.stderr
    assert command("export", "--diffusers", "run", "tuned").code == 0
    ours = fmg.load("run").generate(["left"], [3]).images
    theirs = FlowMapPipeline.from_pretrained(tmp_path / "tuned")(["left"], seeds=3, output_type="pt").images
    assert float((ours - theirs).abs().max()) <= 1e-5
