"""`fmg export` on the command line, from a run to folders that other software reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from safetensors.torch import load_file

from fmg import FlowMapPipeline
from fmg.inference import load
from fmg.inference.artifact import open_artifact
from fmg.inference.loading import load_target
from fmg.inference.target import Target, load_model, resolve_target
from fmg.recipe import Recipe
from tests.support.artifact import traced_once
from tests.support.cli import fmg
from tests.tiny_flux import RESOLUTION, SEQUENCE

pytestmark = [pytest.mark.slow, pytest.mark.compile]

PROMPTS = ["a red circle left", "a blue square right"]


def test_export_and_swap_on_the_command_line(
    shapes_run: Path, other_shapes_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with traced_once():
        done = fmg("export", str(shapes_run), "--out", "artifact", "--json")
    assert done.code == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["folder"] == "artifact"
    assert facts["adapter"] == str(shapes_run)
    assert set(facts["graphs"]) == {"text_encoder", "text_encoder_2", "transformer", "vae_decoder"}
    before = open_artifact("artifact").manifest.weights_digest()
    done = fmg("export", str(other_shapes_run), "--swap-weights", "artifact")
    assert done.code == 0, done.stderr
    assert f"adapter of {other_shapes_run}" in done.stdout
    assert open_artifact("artifact").manifest.weights_digest() != before
    assert fmg("export", "base", "--swap-weights", "artifact").code == 0
    assert fmg("export", str(shapes_run), "--swap-weights", "artifact").code == 0
    assert open_artifact("artifact").manifest.weights_digest() == before


def test_a_students_folder_is_sampled_by_fmg_and_read_by_diffusers(
    student_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FMG_CACHE", str(student_run.parent / "cache"))
    done = fmg("export", "--diffusers", str(student_run), "folder")
    assert done.code == 0, done.stderr
    assert "22 of" in done.stdout
    recipe = Recipe.default(
        "flux-fewstep",
        **{
            "model.folder": str(tmp_path / "folder"),
            "model.map": "single-time",
            "model.second_time": "none",
            "model.time_scale": 1.0,
            "model.guidance": 3.5,
            "model.resolution": RESOLUTION,
            "model.max_sequence_length": SEQUENCE,
            "model.text_cache": False,
            "rewards": ["jpeg-incompressibility"],
        },
    )
    folder = load_target(Target("folder", recipe, None), device="cpu")
    run, base = load(student_run, device="cpu"), load(student_run, device="cpu", adapter=False)
    drawn = [generator.generate(PROMPTS, [1, 2], steps=2, grid="scm").images for generator in (folder, run, base)]
    assert torch.allclose(drawn[0], drawn[1], atol=1e-5, rtol=0)
    assert not torch.allclose(drawn[0], drawn[2], atol=1e-3, rtol=0)

    # times of scale 1 are not what the stock class makes of them, so the folder does not claim to be one
    config = json.loads((tmp_path / "folder" / "transformer" / "config.json").read_text())
    assert config["_class_name"] == "FlowMapFluxTransformer2DModel"
    assert (config["time_scale"], config["second_time"]) == (1.0, "none")
    with pytest.raises(ValueError, match=r"custom code in pipeline\.py"):
        FluxPipeline.from_pretrained(str(tmp_path / "folder"))
    pipe = FlowMapPipeline.from_pretrained(tmp_path / "folder")
    pipe.set_progress_bar_config(disable=True)
    piped = pipe(PROMPTS, seeds=[1, 2], num_inference_steps=2, grid="scm", output_type="pt").images
    assert torch.allclose(piped, drawn[1], atol=1e-5, rtol=0)
    stated = {key: value for key, value in config.items() if key not in ("time_scale", "second_time", "_class_name")}
    stock = FluxTransformer2DModel.from_config(stated)
    tensors: dict[str, Any] = {}
    for file in (tmp_path / "folder" / "transformer").glob("*.safetensors"):
        tensors |= load_file(file)
    stock.load_state_dict(tensors)
    recipe_here = resolve_target(student_run).recipe
    assert recipe_here.model.name == "scm-flux"


def test_a_student_without_a_run_becomes_a_folder(
    student_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fmg.export.diffusers import export_diffusers

    monkeypatch.setenv("FMG_CACHE", str(student_run.parent / "cache"))
    recipe = resolve_target(student_run).recipe
    with patch("fmg.export.diffusers.resolve_target", return_value=Target("scm-flux", recipe, None)):
        merged = export_diffusers("scm-flux", tmp_path / "folder", "bf16")
    assert merged.changed == 0
    stored: Any = load_model(Target("base", recipe, None), device="cpu")
    wanted = stored.components.transformer.state_dict()
    for file in (tmp_path / "folder" / "transformer").glob("*.safetensors"):
        assert all(torch.equal(x, wanted[name].bfloat16()) for name, x in load_file(file).items())
