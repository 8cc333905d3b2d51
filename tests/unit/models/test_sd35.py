"""What SD3.5-Medium as a flow map has of its own; tests/unit/models/test_families.py has what every family owes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from fmg.core.errors import CheckpointError
from fmg.models.sd3.configs import SD35MeanFlowConfig
from fmg.models.sd3.model import FlowMapSD3Transformer2DModel
from fmg.models.sd3.size import SD35_MEDIUM, SD3Size
from fmg.recipe import Recipe
from fmg.registry import models
from tests.support.cli import Invocation, fmg
from tests.support.families import PROMPTS, edit_config, jump, load, noise
from tests.tiny_sd35 import SD35_CASE, published_pipeline, sampled, sd35_options


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FMG_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    return {**sd35_options(tmp_path_factory.mktemp("sd35") / "folder"), "text_cache": False}


def test_sizes_at_full_size_are_those_of_the_class() -> None:
    second = {"takes": "target", "gate": 0.25}
    with torch.device("meta"):
        transformer = FlowMapSD3Transformer2DModel(**SD35_MEDIUM, time_scale=1000.0, second_time=second)
    size = SD3Size(SD35_MEDIUM)
    assert size.parameters == sum(p.numel() for p in transformer.parameters())
    assert size.tables == sum(x.numel() for x in transformer.buffers())
    linears = {n: m for n, m in transformer.named_modules() if isinstance(m, torch.nn.Linear)}
    assert {layer.name: (layer.inputs, layer.outputs) for layer in size.linears()} == {
        name: (module.in_features, module.out_features) for name, module in linears.items()
    }
    # 24 blocks of eight matrices, the last without an output for text
    targets = Recipe.default("sd35-meanflow").lora.target_names()
    assert sum(name.endswith(tuple(f".{end}" for end in targets)) for name in linears) == 191


def test_a_base_without_the_embedder_is_refused_before_a_weight_is_read(options: dict[str, object]) -> None:
    source = models.build("sd35-meanflow", {**options, "adapters": []})
    with pytest.raises(CheckpointError, match=r"has no second-time embedder.*model.adapters=") as caught:
        source.check()  # type: ignore[attr-defined]
    assert "\n" not in str(caught.value)


def test_the_merged_transformer_is_a_folder_of_its_own(options: dict[str, object], tmp_path: Path) -> None:
    """With the embedder inside, as a full fine-tune is saved, it needs no adapters."""
    model = load(SD35_CASE, options)
    folder = Path(shutil.copytree(str(options["folder"]), tmp_path / "merged"))
    shutil.rmtree(folder / "transformer")
    model.network.save_pretrained(folder / "transformer")  # type: ignore[operator]
    merged = {**options, "folder": str(folder), "adapters": []}
    source = models.build("sd35-meanflow", merged)
    source.check()  # type: ignore[attr-defined]
    assert torch.equal(jump(load(SD35_CASE, merged)), jump(model))
    edit_config(folder, "transformer", second_time={"takes": "target", "gate": 0.5})
    with pytest.raises(CheckpointError, match=r"says second_time .*0.5.* but .* says .*0.25"):
        load(SD35_CASE, merged)


def test_the_embedder_is_trained_and_saved_beside_the_lora(options: dict[str, object], tmp_path: Path) -> None:
    model = load(SD35_CASE, options)
    before = jump(model)
    assert model.unfreeze("duration") == 4
    model.attach_adapter(2, 4.0, ["attn.to_q"], 0.0, seed=0)
    with torch.no_grad():
        for _, parameter in model.trainable():
            parameter.add_(0.05)
    after = jump(model)
    model.save_adapter(tmp_path / "saved")
    fresh = load(SD35_CASE, options)
    fresh.load_adapter(tmp_path / "saved")
    assert torch.equal(jump(fresh), after)
    with fresh.adapter_enabled(False):
        assert torch.equal(jump(fresh), before)


def test_a_full_fine_tune_is_saved_as_a_component(options: dict[str, object], tmp_path: Path) -> None:
    model = load(SD35_CASE, options)
    model.unfreeze("full")
    with torch.no_grad():
        for name, parameter in model.trainable():
            if "attn2" in name:
                parameter.add_(0.05)
    after = jump(model)
    model.save_adapter(tmp_path / "saved")
    fresh = load(SD35_CASE, options)
    fresh.load_adapter(tmp_path / "saved")
    assert torch.equal(jump(fresh), after)


def test_an_adapter_belongs_to_the_merged_base(options: dict[str, object], tmp_path: Path) -> None:
    model = load(SD35_CASE, options)
    model.attach_adapter(2, 4.0, ["attention"], 0.0, seed=0)
    model.save_adapter(tmp_path / "saved")
    adapters = options["adapters"]
    assert isinstance(adapters, list)
    fewer = load(SD35_CASE, options, adapters=[adapters[0], adapters[2]])
    with pytest.raises(CheckpointError, match="was trained on different weights of 'sd35-meanflow'"):
        fewer.load_adapter(tmp_path / "saved")


def test_two_stages_are_the_published_prefix(tmp_path: Path) -> None:
    """The stages of a prefix add up, and its last embedder counts; text is as long as stated."""
    given = sd35_options(tmp_path / "folder")
    adapters = given["adapters"]
    assert isinstance(adapters, list)
    model = load(SD35_CASE, given, adapters=adapters[:2], text_cache=False)
    pipeline = published_pipeline(tmp_path / "folder", stages=2)
    theirs = sampled(pipeline, list(PROMPTS), noise(model), 1, "latent")
    ours = model.flow_map.jump(noise(model), torch.ones(2), torch.zeros(2), model.encode(list(PROMPTS)))
    assert float((ours - theirs).abs().max()) <= 1e-5


def test_an_image_has_no_more_tokens_than_positions(options: dict[str, object]) -> None:
    with pytest.raises(CheckpointError, match="positions for 16 tokens along a side, but 272 px are 17"):
        load(SD35_CASE, options, resolution=272)


def test_adapters_are_stated_on_the_command_line(options: dict[str, object]) -> None:
    folder = options["folder"]

    def planned(first: str) -> Invocation:
        stated = f"model.adapters=[{{source: {first}, alpha: 64}}, {{source: owner/name@main:b.pt, scale: 0.5}}]"
        sets = ("--set", stated, "--set", f"model.folder={folder}")
        return fmg("train", "--model", "sd35-meanflow", *sets, "--reward", "jpeg-incompressibility", "--dry-run")

    shown = planned(f"{folder}/stage1.pt")
    assert shown.code == 0
    assert "needs its adapter 2, but 'owner/name@main:b.pt' (b.pt) has not been fetched" in " ".join(
        shown.stderr.split()
    )
    assert "sd35-meanflow, two-time map, linear path, 512 px" in shown.stdout
    absent = planned(f"{folder}/stage4.pt")
    assert absent.code == 1
    assert f"there is no file or folder '{folder}/stage4.pt'" in " ".join(absent.stderr.split())


def test_the_plan_of_the_published_model_needs_no_weights() -> None:
    shown = fmg("train", "--model", "sd35-meanflow", "--reward", "jpeg-incompressibility", "--dry-run")
    assert shown.code == 0
    assert "Fetch it with `fmg fetch sd35-meanflow`" in " ".join(shown.stderr.split())
    assert "2.25 B transformer, 5.58 B text encoders" in shown.stdout
    lines = [" ".join(line.split()) for line in shown.stdout.splitlines() if line.startswith("RTX 4090")]
    assert len(lines) == 2
    assert all(line.endswith("GB yes") for line in lines)


def test_the_base_is_fetched_without_variants(options: dict[str, object]) -> None:
    config = SD35MeanFlowConfig.model_validate(options)
    first, *rest = config.assets()
    assert (first.what, [asset.what for asset in rest]) == ("pipeline", ["adapter 1", "adapter 2", "adapter 3"])
    assert not any("fp16" in pattern for pattern in first.patterns)
    assert "text_encoder_3/model-*.safetensors" in first.patterns
