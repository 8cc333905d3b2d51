"""What every family with published weights owes: the stock pipeline's numbers, verified saves, plain errors."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fmg
from fmg.core.errors import CheckpointError, UsageError
from fmg.inference.torch_backend import device_for
from fmg.recipe import Recipe
from tests.support import families
from tests.support.families import PROMPTS, WEIGHTS, FamilyCase, attach, edit_config, edit_weights, jump, load, noise
from tests.tiny_flux2 import FLUX2_CASE
from tests.tiny_flux3 import FLUX3_CASE
from tests.tiny_sd35 import SD35_CASE
from tests.tiny_zimage import Z_IMAGE_CASE

CASES = (FLUX2_CASE, FLUX3_CASE, SD35_CASE, Z_IMAGE_CASE)
TOLERANCE = 1e-5


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FMG_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.model)
def case(request: pytest.FixtureRequest) -> FamilyCase:
    chosen: FamilyCase = request.param
    return chosen


@pytest.fixture(scope="module")
def folder(case: FamilyCase, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp(case.model) / "folder"


@pytest.fixture(scope="module")
def options(case: FamilyCase, folder: Path) -> dict[str, object]:
    return {**case.build(folder), "text_cache": False}


@pytest.fixture(scope="module")
def model(case: FamilyCase, options: dict[str, object]) -> Any:
    """A model that tests do not change."""
    return load(case, options)


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_latents_are_those_of_the_pipeline(case: FamilyCase, folder: Path, model: Any, steps: int) -> None:
    start = noise(model)
    ours = families.sampled(model, list(PROMPTS), start, steps)
    theirs = case.latents(folder, model, list(PROMPTS), start.clone(), steps)
    assert float(theirs.abs().max()) > 0.1
    assert float((ours - theirs).abs().max()) <= TOLERANCE


def test_prompts_are_encoded_as_the_pipeline_does(case: FamilyCase, folder: Path, model: Any) -> None:
    prompts = [*PROMPTS, "a " * 300]
    theirs = case.embeddings(folder, model, prompts)
    ours = model.components.text.embed(prompts, model.components.conventions.max_sequence_length)
    assert ours.keys() == theirs.keys()
    for name, x in theirs.items():
        assert torch.allclose(ours[name].to(x.dtype), x, atol=1e-6), name


def test_images_are_those_of_the_pipeline(case: FamilyCase, folder: Path, model: Any) -> None:
    latents = noise(model)
    with torch.no_grad():
        ours, theirs = model.decode(latents), case.images(folder, model, latents)
    assert ours.shape == (2, 3, model.spec.resolution, model.spec.resolution)
    assert float((ours - theirs).abs().max()) <= TOLERANCE


def test_a_batch_does_not_change_a_sample(model: Any) -> None:
    x, times = noise(model), torch.tensor([1.0, 0.6])
    cond = model.encode(list(PROMPTS))
    with torch.no_grad():
        together = model.flow_map.jump(x, times, torch.zeros(2), cond)
        alone = model.flow_map.jump(x[1:], times[1:], torch.zeros(1), cond.select(torch.tensor([1])))
    assert torch.allclose(together[1:], alone, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_save_is_verified_and_read_back(
    case: FamilyCase, options: dict[str, object], dtype: torch.dtype, tmp_path: Path
) -> None:
    trained = load(case, options, dtype)
    before, digest = jump(trained), trained.base_digest()
    assert before.dtype == torch.float32
    assert attach(trained) == case.adapted
    after = jump(trained)
    assert not torch.allclose(after, before)
    trained.save_adapter(tmp_path / "adapter")
    fresh = load(case, options, dtype)
    fresh.load_adapter(tmp_path / "adapter")
    assert torch.equal(jump(fresh), after)
    with fresh.adapter_enabled(False):
        assert torch.equal(jump(fresh), before)
    assert fresh.base_digest() == digest


def test_the_presets_adapt_what_they_say(case: FamilyCase, options: dict[str, object]) -> None:
    assert attach(load(case, options), "attention-mlp") == case.attention_mlp


@pytest.mark.slow
def test_a_save_that_generates_another_image_is_not_kept(
    case: FamilyCase, options: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = load(case, options)
    attach(trained)
    pipeline = type(trained).pipeline
    original = pipeline.load_lora_weights

    def halved(self: Any, *args: object, **named: object) -> None:
        original(self, *args, **named)
        self.transformer.set_adapters(["default"], [0.5])

    monkeypatch.setattr(pipeline, "load_lora_weights", halved)
    with pytest.raises(CheckpointError, match="generate a different image after diffusers loads them"):
        trained.save_adapter(tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


@pytest.mark.slow
def test_gradient_checkpointing_changes_no_gradient(case: FamilyCase, options: dict[str, object]) -> None:
    def gradients(*, checkpointing: bool) -> list[Tensor]:
        trained = load(case, options, gradient_checkpointing=checkpointing)
        attach(trained)
        jumped = trained.flow_map.jump(noise(trained, 1), torch.tensor([0.6]), torch.zeros(1), trained.encode(["left"]))
        jumped.square().sum().backward()
        return [parameter.grad for _, parameter in trained.trainable() if parameter.grad is not None]

    plain, recomputed = gradients(checkpointing=False), gradients(checkpointing=True)
    assert len(plain) == len(recomputed) > 0
    assert all(torch.allclose(x, y, rtol=1e-4, atol=1e-5) for x, y in zip(plain, recomputed, strict=True))


def _damages(case: FamilyCase) -> dict[str, tuple[Callable[[Path], None], str]]:
    component, changes, says = case.mismatch
    weights = Path("transformer") / WEIGHTS
    return {
        "left over": (
            lambda folder: edit_weights(folder / weights, add={"extra.weight": torch.zeros(2)}),
            "have unexpected keys: extra.weight",
        ),
        "missing": (lambda folder: edit_weights(folder / weights, drop=case.dropped), f"missing keys: {case.dropped}"),
        "truncated": (
            lambda folder: (folder / "vae" / WEIGHTS).write_bytes((folder / "vae" / WEIGHTS).read_bytes()[:1000]),  # type: ignore[dict-item,return-value]
            "cannot be loaded",
        ),
        "another class": (
            lambda folder: edit_config(folder, "transformer", _class_name="UNet2DConditionModel"),
            "names the class 'UNet2DConditionModel', which is not a",
        ),
        "another size": (lambda folder: edit_config(folder, component, **changes), says),
        "no decoder": (lambda folder: shutil.rmtree(folder / "vae"), "lacks vae/config.json"),
    }


@pytest.mark.parametrize("damage", ["left over", "missing", "truncated", "another class", "another size", "no decoder"])
def test_a_folder_that_does_not_fit_is_one_line(
    case: FamilyCase, options: dict[str, object], folder: Path, tmp_path: Path, damage: str
) -> None:
    scratch = Path(shutil.copytree(folder, tmp_path / "folder"))
    change, message = _damages(case)[damage]
    change(scratch)
    moved = {key: str(scratch) if value == str(folder) else value for key, value in options.items()}
    with pytest.raises(CheckpointError, match=message) as caught:
        load(case, moved)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["chain", "branch"])
def test_it_is_evaluated_trained_saved_and_sampled_by_its_pipeline(
    case: FamilyCase,
    options: dict[str, object],
    folder: Path,
    kind: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = Recipe.default(
        case.model,
        **{
            **{f"model.{key}": value for key, value in options.items()},
            "rewards": ["jpeg-incompressibility"],
            "optimizer.lr": 1e-3,
            "rollout.kind": kind,
            "rollout.groups": 2,
            "rollout.group_size": 4,
            "rollout.steps": 4,
            "train.iterations": 3,
            "train.dtype": "fp32",
            "lora.rank": 4,
            "lora.alpha": 8,
            "eval.num": 4,
        },
    )
    result = fmg.train(recipe, tmp_path / "run")
    assert result.iterations == 3
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert any("eval/score" in line for line in lines)
    updates = [line for line in lines if "grad_norm" in line]
    assert len(updates) == 3
    assert all(line["grad_norm"] > 0 for line in updates)

    adapter = tmp_path / "run" / "checkpoints" / "checkpoint-3"
    trained = load(case, options)
    base = trained.decode(families.sampled(trained, [PROMPTS[0]], noise(trained, 1), 1))
    trained.load_adapter(adapter)
    ours = trained.decode(families.sampled(trained, [PROMPTS[0]], noise(trained, 1), 1))
    assert not torch.equal(ours, base)
    theirs = case.draw(folder, adapter, PROMPTS[0], noise(trained, 1))
    assert float((ours - theirs).abs().max()) <= TOLERANCE


def test_a_machine_without_a_gpu_is_refused_before_anything_is_looked_for(case: FamilyCase) -> None:
    spec = Recipe.default(case.model).model.config.spec()
    assert spec.gpu_memory_gb > 0
    with pytest.raises(UsageError, match="needs a GPU"):
        device_for("auto", case.model, spec)


def test_a_plan_counts_the_folder_as_it_is_loaded(case: FamilyCase, options: dict[str, object], model: Any) -> None:
    recipe = Recipe.default(case.model, **{f"model.{key}": value for key, value in options.items()})
    geometry = recipe.model.config.geometry()
    assert geometry is not None
    parts = model.components
    assert geometry.parameters == sum(p.numel() for p in parts.transformer.parameters())
    linears = {n: m for n, m in parts.transformer.named_modules() if isinstance(m, torch.nn.Linear)}
    assert {layer.name: (layer.inputs, layer.outputs) for layer in geometry.linears} == {
        name: (module.in_features, module.out_features) for name, module in linears.items()
    }
    # a normalisation of latents has its numbers in buffers
    stored = parts.vae.state_dict().values()
    assert geometry.decoder_parameters == sum(x.numel() for x in stored if x.is_floating_point())
    assert geometry.latent == noise(model, 1).numel()
