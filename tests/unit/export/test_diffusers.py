from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fmg import FlowMapPipeline
from fmg.core.errors import CheckpointError, UsageError
from fmg.data.pictures import to_pil
from fmg.export.diffusers import export_diffusers
from fmg.inference import load
from fmg.inference.target import Target, load_model, resolve_target
from fmg.models.common.saved_weights import DIFFUSERS_FILE
from fmg.models.common.weights import INDEX_FILE
from fmg.models.flux.loading import load_folder
from fmg.models.flux.model import FluxModel
from fmg.recipe import Recipe
from tests.support.artifact import make_run
from tests.support.merge_folder import merge_folder
from tests.tiny_flux import build_tiny_flux

CPU = torch.device("cpu")
PROMPTS = ["a red circle", "a blue square"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_flux(tmp_path_factory.mktemp("base") / "flux")


@pytest.fixture(scope="module")
def tuned(base: Path) -> FluxModel:
    model = FluxModel.from_folder(base, CPU, torch.float32, name="tiny")
    model.attach_adapter(2, 6.0, ["attention"], 0.0, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, parameter in model.trainable():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture(scope="module")
def saved(tuned: FluxModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "adapter"
    tuned.save_adapter(folder)
    return folder


@torch.no_grad()
def _images(model: FluxModel) -> Tensor:
    noise = torch.randn(2, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    cond = model.encode(PROMPTS)
    return model.decode(model.flow_map.jump(noise, torch.ones(2), torch.zeros(2), cond))


def test_the_pipeline_of_the_folder_equals_base_and_adapter(
    base: Path, tuned: FluxModel, saved: Path, tmp_path: Path
) -> None:
    merged = merge_folder(base, saved, tmp_path / "merged")
    # 2 double-stream blocks with 8 projections, 2 single-stream blocks with 3
    assert merged.changed == 22
    pipeline = FlowMapPipeline.from_pretrained(tmp_path / "merged")
    parts = load_folder(tmp_path / "merged", CPU, torch.float32)
    assert pipeline.transformer.state_dict().keys() == parts.transformer.state_dict().keys()
    read, ours = pipeline.transformer.state_dict(), parts.transformer.state_dict()
    assert all(torch.equal(read[name], x) for name, x in ours.items())
    drawn, expected = _images(FluxModel(parts, "tiny")), _images(tuned)
    assert torch.allclose(drawn, expected, atol=1e-5, rtol=0)
    with tuned.adapter_enabled(False):
        assert not torch.allclose(_images(tuned), expected, atol=1e-3)


def test_shards_stay_shards_and_say_their_size(base: Path, tuned: FluxModel, saved: Path, tmp_path: Path) -> None:
    sharded = Path(shutil.copytree(base, tmp_path / "sharded"))
    transformer = load_folder(sharded, CPU, torch.float32).transformer
    shutil.rmtree(sharded / "transformer")
    transformer.save_pretrained(str(sharded / "transformer"), max_shard_size="200KB")
    merge_folder(sharded, saved, tmp_path / "merged", dtype=torch.bfloat16)
    shards = sorted((tmp_path / "merged" / "transformer").glob("*.safetensors"))
    assert len(shards) > 2
    assert {x.dtype for shard in shards for x in load_file(shard).values()} == {torch.bfloat16}
    index = json.loads((tmp_path / "merged" / "transformer" / INDEX_FILE).read_text())
    assert index["metadata"]["total_size"] == sum(p.numel() * 2 for p in transformer.parameters())
    drawn = _images(FluxModel(load_folder(tmp_path / "merged", CPU, torch.float32), "tiny"))
    assert torch.allclose(drawn, _images(tuned), atol=0.05, rtol=0)


def test_a_folder_has_a_card_of_its_own(base: Path, tmp_path: Path) -> None:
    recipe = Recipe.default("meanflow-shapes", **{"model.folder": str(base), "lora.rank": 2, "rollout.steps": 3})
    run = make_run(tmp_path / "run", recipe, seed=4)
    card = "---\ntags:\n- lora\n---\n# A\n\nA LoRA.\n\n## Scores\n\n| score | .5 |\n\n## Use\n\nload_lora_weights\n"
    (run / "checkpoints" / "checkpoint-1" / "README.md").write_text(card)
    text = (export_diffusers(run, tmp_path / "merged").folder / "README.md").read_text()
    assert "A complete pipeline folder" in text
    assert "3 steps, grid 'uniform'" in text
    assert "| score | .5 |" in text
    assert "lora" not in text.casefold()
    code = text.partition("```python\n")[2].partition("```")[0]
    scope: dict[str, Any] = {}
    exec(code.replace("FOLDER", str(tmp_path / "merged")).replace("PROMPT", PROMPTS[0]), scope)
    drawn = load(run, device="cpu").generate([PROMPTS[0]], [0]).images[0]
    assert np.abs(np.asarray(scope["images"][0], float) - np.asarray(to_pil(drawn), float)).max() <= 1


def test_another_base_unknown_keys_and_taken_folders_are_refused_and_leave_nothing(
    base: Path, saved: Path, tmp_path: Path
) -> None:
    other = build_tiny_flux(tmp_path / "other", seed=1)
    out = tmp_path / "exports" / "merged"
    with pytest.raises(CheckpointError, match="trained on different weights of 'tiny'"):
        merge_folder(other, saved, out)
    strange = Path(shutil.copytree(saved, tmp_path / "strange"))
    tensors = load_file(strange / DIFFUSERS_FILE)
    save_file({**tensors, "transformer.nowhere.lora_A.weight": torch.zeros(2, 4)}, strange / DIFFUSERS_FILE)
    with pytest.raises(CheckpointError, match=r"nowhere\.lora_A\.weight is unknown"):
        merge_folder(base, strange, out)
    assert not out.parent.exists()
    out.mkdir(parents=True)
    with pytest.raises(UsageError, match="merged exists already"):
        merge_folder(base, saved, out)


def test_an_export_that_fails_on_the_way_leaves_nothing(
    base: Path, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("fmg.export.diffusers.write_weights", fail)
    with pytest.raises(OSError, match="No space left"):
        merge_folder(base, saved, tmp_path / "exports" / "merged")
    assert list((tmp_path / "exports").iterdir()) == []


@pytest.mark.parametrize(("trained", "changed"), [("duration", 22 + 4), ("full", 0)])
def test_what_was_trained_beside_a_lora_or_whole_is_in_the_folder(
    base: Path, tmp_path: Path, trained: Literal["duration", "full"], changed: int
) -> None:
    recipe = Recipe.default("meanflow-shapes", **{"model.folder": str(base), "lora.rank": 2, "lora.alpha": 4.0})
    run = make_run(tmp_path / "run", recipe, seed=4, trained=trained)
    merged = export_diffusers(run, tmp_path / "merged")
    assert merged.changed == changed
    tuned: Any = load_model(resolve_target(run), device="cpu")
    plain: Any = load_model(Target("base", recipe, None), device="cpu")
    drawn, expected = _images(FluxModel(load_folder(tmp_path / "merged", CPU, torch.float32), "tiny")), _images(tuned)
    assert torch.allclose(drawn, expected, atol=1e-5, rtol=0)
    assert not torch.allclose(_images(plain), expected, atol=1e-4)
    second = "timestep_embedder2.linear_1.weight"
    state = load_folder(tmp_path / "merged", CPU, torch.float32).transformer.state_dict()
    assert not torch.equal(state[second], plain.components.transformer.state_dict()[second])
