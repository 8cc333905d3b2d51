from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL

from benchmarks.memory_meter import MemoryMeter
from fmg.core.events import ignore
from fmg.core.specs import ModelGeometry
from fmg.data.run_folder import RunFolder
from fmg.models.common.adapter import attach
from fmg.models.conventions import FlowMapConventions, SecondTime, read_conventions
from fmg.models.flux.size import FLUX_LITE, flux_geometry, transformer_parameters
from fmg.models.flux.transformer import FlowMapFluxTransformer2DModel
from fmg.recipe import Recipe
from fmg.training.compose import compose
from fmg.training.launch import choose_sizes
from fmg.training.plan_memory import decode_bytes, plan_memory
from fmg.training.plan_work import trained_by
from fmg.training.trainer import Trainer

CPU = torch.device("cpu")
FACTOR = 1.25
"""A planned peak lies within this factor of the measured one."""

PUBLISHED = {
    "rollout.groups": 48,
    "rollout.group_size": 24,
    "rollout.steps": 5,
    "rollout.batch_size": 16,
    "train.dtype": "bf16",
}
# many siblings, so that they are most of what is held
BRANCHED = {"rollout.kind": "branch", "rollout.group_size": 48, "rollout.batch_size": 12, "eval.every": 1}
FLUX = FlowMapConventions(
    schema=1,
    map="two-time",
    path="linear",
    time_scale=1.0,
    second_time="duration",
    resolution=512,
    max_sequence_length=256,
    default_steps=5,
    default_grid="paper",
    guidance=3.5,
)


def _geometry(recipe: Recipe) -> ModelGeometry:
    geometry = recipe.model.config.geometry()
    assert geometry is not None
    return geometry


@pytest.mark.parametrize("second_time", ["duration", "none"])
def test_flux_lite_is_counted_as_its_modules_on_the_meta_device(second_time: str) -> None:
    with torch.device("meta"):
        module = FlowMapFluxTransformer2DModel(time_scale=1.0, second_time=second_time, **_arguments())
        attach(module, 32, 64.0, ["attention-mlp"], 0.0, seed=0)
    conventions = FLUX.model_copy(
        update={
            "second_time": SecondTime(takes=second_time),
            "map": "two-time" if second_time == "duration" else "single-time",
        }
    )
    geometry = flux_geometry(None, conventions)
    counts = {True: 0, False: 0}
    for name, parameter in module.named_parameters():
        counts["lora" in name] += parameter.numel()
    assert geometry.parameters == counts[False]
    assert geometry.parameters == transformer_parameters(FLUX_LITE, second_time=second_time == "duration")
    recipe = Recipe.default().with_({"lora.targets": "attention-mlp", "lora.rank": 32})
    assert trained_by(recipe, geometry).parameters == counts[True]
    assert trained_by(recipe.with_({"train.trainable": "full"}), geometry).parameters == counts[False]
    assert (geometry.image_tokens, geometry.latent) == (1024, 16 * 64 * 64)
    assert geometry.origin == "the published config"


def _arguments() -> dict[str, object]:
    return {**FLUX_LITE}


@pytest.mark.parametrize("trainable", ["lora", "lora+duration", "full"])
def test_a_folder_is_counted_as_its_loaded_components(trainable: str) -> None:
    recipe = Recipe.default().with_({"train.trainable": trainable})
    geometry = _geometry(recipe)
    composed = compose(recipe, CPU, torch.float32)
    parts = composed.model.components  # type: ignore[attr-defined]
    planned = trained_by(recipe, geometry)
    named = list(composed.model.trainable())
    assert planned.parameters == sum(p.numel() for _, p in named)
    assert planned.base_parameters == sum(p.numel() for name, p in named if "lora" not in name)
    assert len(planned.layers) == sum(name.endswith("lora_A.weight") for name, _ in named)
    assert composed.trained.startswith(planned.words)

    def count(*modules: torch.nn.Module) -> int:
        return sum(p.numel() for module in modules for p in module.parameters())

    adapter = planned.parameters - planned.base_parameters
    assert geometry.parameters == count(parts.transformer) - adapter
    assert geometry.decoder_parameters == count(parts.vae)
    # the files hold no position ids and no tied copies
    assert geometry.encoder_parameters == pytest.approx(
        count(parts.text.text_encoder, parts.text.text_encoder_2), rel=0.01
    )
    _, height, width = composed.model.latent_shape
    assert geometry.latent == 4 * height * width
    assert geometry.resolution == 32


def test_flops_of_a_call_are_those_counted_by_torch() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    recipe = Recipe.default()
    composed = compose(recipe, CPU, torch.float32)
    noise = torch.zeros(2, *composed.model.latent_shape)
    cond = composed.model.encode(["a red circle", "a blue square"])
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        composed.model.policies.reference.jump(noise, torch.ones(2), torch.zeros(2), cond)
    assert 2 * _geometry(recipe).call_flops == pytest.approx(counter.get_total_flops(), rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "changes"),
    [
        ("meanflow-shapes", {"train.micro_batch": 5}),
        ("meanflow-shapes", {"lora.targets": "attention-mlp", "train.dtype": "bf16", "optimizer": "sgd"}),
        ("scm-shapes", {"rollout.steps": 3, "train.updates_per_iteration": 1}),
        ("meanflow-shapes", {"rollout.kind": "chain", "objective": "rwfm", "optimizer": "adafactor"}),
        ("meanflow-shapes", {"train.trainable": "lora+duration", "train.ema_decay": 0.9}),
        ("meanflow-shapes", {"train.trainable": "full", "train.ema_decay": 0.9, "train.micro_batch": 5}),
        # several micro-batches per update, whose gradients coexist with the activations, as in the plan
        (
            "meanflow-shapes",
            {"rollout.kind": "chain", "train.trainable": "full", "train.dtype": "bf16", "objective.kl_beta": 0.1},
        ),
        # one pass per update, whose gradients take the place of activations
        ("meanflow-shapes", {"train.trainable": "full", "train.dtype": "bf16", "objective.kl_beta": 0.1}),
        ("meanflow-shapes", {**BRANCHED, "train.micro_batch": 1}),
        ("scm-shapes", {**BRANCHED, "rollout.branch.completion": "grid"}),
    ],
    ids=str,
)
def test_the_planned_peak_is_the_measured_one_within_the_stated_factor(
    model: str, changes: dict[str, object], tmp_path: Path
) -> None:
    small = {"rollout.groups": 4, "rollout.group_size": 4, "lora.rank": 4}
    recipe = Recipe.default(model).with_({**small, **changes})
    sizes = choose_sizes(recipe, "cpu")
    composed = compose(recipe, CPU, {"fp32": torch.float32, "bf16": torch.bfloat16}[recipe.train.dtype])
    parts = composed.model.components  # type: ignore[attr-defined]
    loaded = (parts.transformer, parts.vae, parts.text.text_encoder, parts.text.text_encoder_2)
    before = sum(p.nbytes for module in loaded for p in module.parameters())
    with MemoryMeter() as meter:
        trainer = Trainer(composed, RunFolder(tmp_path), sizes, ignore)
        trainer.iterate(0)
    measured = before + meter.peak
    planned = plan_memory(recipe, _geometry(recipe), sizes).peak
    assert measured / FACTOR < planned < measured * FACTOR


def test_a_full_size_plan_shares_the_samples_among_devices() -> None:
    recipe = Recipe.default().with_(PUBLISHED)
    geometry = flux_geometry(None, FLUX, checkpointing=True, encoders_resident=False)
    sizes = choose_sizes(recipe, "cuda")
    one, eight = plan_memory(recipe, geometry, sizes), plan_memory(recipe, geometry, sizes, devices=8)
    assert one.parts["transformer"] == 2 * geometry.parameters == pytest.approx(16.35e9, rel=0.01)
    assert one.parts["text encoders"] == 0
    # every device holds the whole rollout, and the images of its own shard
    assert one.parts["rollout store"] - eight.parts["rollout store"] == 1152 * 7 // 8 * 3 * 512**2 * 4
    # an update of eight devices is a single pass, whose gradients take the place of activations
    gradients = 4 * trained_by(recipe, geometry).parameters
    assert one.parts["activations"] - eight.parts["activations"] == gradients
    differing = {"rollout store", "activations"}
    assert {k: v for k, v in one.parts.items() if k not in differing} == {
        k: v for k, v in eight.parts.items() if k not in differing
    }


def test_samples_of_a_prompt_share_its_conditioning() -> None:
    geometry = flux_geometry(None, FLUX, checkpointing=True, encoders_resident=False)
    recipe = Recipe.default().with_(PUBLISHED)
    wider = flux_geometry(None, FLUX.model_copy(update={"max_sequence_length": 512}), checkpointing=True)
    sizes = choose_sizes(recipe, "cuda")
    one, other = (plan_memory(recipe, g, sizes).parts["rollout store"] for g in (geometry, wider))
    # 256 T5 states more for each of 48 prompts, not of 1152 images
    assert other - one == 48 * 256 * 4096 * 2


def test_tiles_bound_the_decoder() -> None:
    large = FLUX.model_copy(update={"resolution": 2048})
    whole, tiled = (decode_bytes(flux_geometry(None, large, decoder_tile=tile), 2, rows=1) for tile in (None, 512))
    assert whole == 16 * tiled


@pytest.mark.parametrize(("optimizer", "bytes_each"), [("adamw", 8), ("adamw8bit", 2.1), ("sgd", 4), ("muon", 4)])
def test_moments_of_a_full_fine_tune(optimizer: str, bytes_each: float) -> None:
    recipe = Recipe.default().with_({"train.trainable": "full", "optimizer": optimizer, "rollout.batch_size": 16})
    geometry = flux_geometry(None, FLUX)
    planned = plan_memory(recipe, geometry, choose_sizes(recipe, "cuda")).parts
    assert planned["optimizer"] == pytest.approx(bytes_each * geometry.parameters, rel=0.05)


def test_checkpointing_keeps_one_number_per_token_and_block() -> None:
    recipe = Recipe.default().with_({"train.dtype": "bf16", "train.micro_batch": 1, "rollout.batch_size": 1})
    sizes = choose_sizes(recipe, "cuda")
    whole, saved = (
        plan_memory(recipe, flux_geometry(None, FLUX, checkpointing=flag), sizes).parts["activations"]
        for flag in (False, True)
    )
    assert whole > 10 * saved


def test_a_folder_that_is_there_is_read() -> None:
    folder = Recipe.default().model.config.directory()  # type: ignore[attr-defined]
    assert flux_geometry(folder, read_conventions(folder)).origin == "its files"


def test_an_evaluation_that_generates_more_at_once_than_a_rollout_is_planned_for() -> None:
    geometry = flux_geometry(None, FLUX, checkpointing=True, encoders_resident=False)
    recipe = Recipe.default().with_({"rollout.batch_size": 4, "train.micro_batch": 1, "train.dtype": "bf16"})
    sizes = choose_sizes(recipe, "cuda")
    asked, more, most = (
        plan_memory(recipe.with_({"eval.batch_size": size, "eval.num": 256}), geometry, sizes).parts["activations"]
        for size in (4, 256, 100_000)
    )
    assert asked < more == most


def test_backward_passes_of_decoder_and_reward_are_counted() -> None:
    geometry = flux_geometry(None, FLUX, checkpointing=True)

    def activations(**changes: object) -> int:
        recipe = Recipe.default().with_({**BF16, "rewards": ["pickscore"], "rollout.kind": "chain", **changes})
        return plan_memory(recipe, geometry, choose_sizes(recipe, "cuda")).parts["activations"]

    alone = activations()
    checkpointed, whole = (
        activations(objective={"name": "reward-gradient", "jumps": 4, "checkpointing": flag}) for flag in (True, False)
    )
    beside = activations(**{"objective.last_step": {"weight": 1.0, "checkpointing": True}})
    # one image of 512 px through the decoder, measured below
    assert alone < checkpointed < beside < whole
    kept = _kept_by_the_decoder()
    assert kept <= checkpointed - 3 * 512**2 * 4 <= FACTOR * kept


BF16 = {"train.dtype": "bf16", "train.micro_batch": 1, "rollout.batch_size": 1}


def _kept_by_the_decoder() -> int:
    """Bytes that FLUX's decoder keeps of an image of 512 px, without its weights, counted on the meta device."""
    with torch.device("meta"):
        vae = AutoencoderKL(
            up_block_types=("UpDecoderBlock2D",) * 4,
            down_block_types=("DownEncoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            latent_channels=16,
            use_quant_conv=False,
            use_post_quant_conv=False,
        )
    vae = vae.requires_grad_(False).to(torch.bfloat16)
    weights = {p.untyped_storage()._cdata for p in vae.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        if (place := x.untyped_storage()._cdata) not in weights:
            kept[place] = x
        return x

    latent = torch.empty(1, 16, 64, 64, device="meta", dtype=torch.bfloat16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        decoded = vae.decode(latent, return_dict=False)[0]
    assert decoded.requires_grad
    return sum(x.untyped_storage().nbytes() for x in kept.values())
