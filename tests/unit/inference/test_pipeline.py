"""`FlowMapPipeline`: the images of `fmg generate`, the interface of diffusers, and a refusal of the stock class."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from diffusers import AutoPipelineForText2Image, DiffusionPipeline, FluxPipeline
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

import fmg
from fmg import FlowMapPipeline
from fmg.core.errors import CheckpointError, FmgError, UsageError
from fmg.data.checkpoints import chosen_checkpoint
from fmg.data.pictures import to_pil
from fmg.export.diffusers import export_diffusers
from fmg.inference import load
from fmg.inference.target import Target
from fmg.models.conventions import CONVENTIONS_FILE
from fmg.models.flux.latents import pack
from fmg.models.flux.transformer import FlowMapFluxTransformer2DModel
from fmg.recipe import Recipe
from tests.support.artifact import make_run
from tests.tiny_flux import build_tiny_flux

ASSETS = Path(fmg.__file__).parent / "assets"
PROMPTS = ["a red circle", "a blue square"]
SEEDS = [3, 8]
# diffusers asks for it by this name; a literal assignment is what the rules of the tree look for
TRUSTED: Mapping[str, Any] = {"trust_remote_code": True}

pytestmark = pytest.mark.filterwarnings("ignore:.*:RuntimeWarning:peft.*")


def _recipe(folder: Path, **overrides: object) -> Recipe:
    model = "meanflow-shapes" if "two" in folder.name else "scm-shapes"
    return Recipe.default(model, **{"model.folder": str(folder), "lora.rank": 2, "lora.alpha": 4.0, **overrides})


@pytest.fixture(scope="module", params=["two-time", "single-time"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline folder as tools for the stock classes write it, and as fmg wrote it before this class existed."""
    second: Literal["none", "duration"] = "duration" if request.param == "two-time" else "none"
    return build_tiny_flux(tmp_path_factory.mktemp("base") / request.param, second_time=second)


@pytest.fixture(scope="module")
def run(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose steps and grid are not those of its base."""
    recipe = _recipe(folder, **{"rollout.steps": 3, "rollout.grid": [1.0, 0.6, 0.2, 0.0]})
    return make_run(tmp_path_factory.mktemp("run") / "run", recipe, seed=4)


@pytest.fixture(scope="module")
def exported(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_diffusers(run, tmp_path_factory.mktemp("exported") / "folder").folder


def _generated(target: Any, **options: Any) -> Tensor:
    return load(target, device="cpu").generate(PROMPTS, SEEDS, **options).images


def _drawn(pipe: Any, **options: Any) -> Tensor:
    pipe.set_progress_bar_config(disable=True)
    images: Tensor = pipe(PROMPTS, seeds=SEEDS, output_type="pt", **options).images
    return images


def _same(drawn: Tensor, expected: Tensor) -> bool:
    return torch.allclose(drawn, expected, atol=1e-5, rtol=0)


def test_an_exported_folder_alone_generates_the_images_of_generate(run: Path, folder: Path, exported: Path) -> None:
    expected = _generated(run)
    assert not torch.allclose(expected, _generated(Target("base", _recipe(folder), None)), atol=1e-3)
    assert _same(_drawn(FlowMapPipeline.from_pretrained(exported)), expected)
    stock: Any = DiffusionPipeline.from_pretrained(str(exported), **TRUSTED)
    assert isinstance(stock, FlowMapPipeline)
    assert _same(_drawn(stock), expected)
    named: Any = DiffusionPipeline.from_pretrained(str(exported), custom_pipeline=str(exported), **TRUSTED)
    assert _same(_drawn(named), expected)


def test_base_and_lora_generate_the_images_of_generate(run: Path, folder: Path) -> None:
    checkpoint = chosen_checkpoint(run)
    assert checkpoint is not None
    pipe = FlowMapPipeline.from_pretrained(folder)
    steps = {"num_inference_steps": 3, "grid": [1.0, 0.6, 0.2, 0.0]}
    pipe.load_lora_weights(checkpoint)
    expected = _generated(run)
    assert _same(_drawn(pipe, **steps), expected)
    pipe.disable_lora()
    base = _drawn(pipe)
    assert _same(base, _generated(Target("base", _recipe(folder), None)))
    pipe.enable_lora()
    pipe.set_adapters("default_0", 0.5)
    assert not torch.allclose(_drawn(pipe, **steps), expected, atol=1e-4)
    pipe.unload_lora_weights()
    assert _same(_drawn(pipe), base)


@pytest.mark.slow
def test_weights_trained_beside_a_lora_come_and_go_with_it(tmp_path: Path) -> None:
    folder = build_tiny_flux(tmp_path / "two-time")
    recipe = _recipe(folder)
    run = make_run(tmp_path / "run", recipe, seed=4, trained="duration")
    checkpoint = chosen_checkpoint(run)
    assert checkpoint is not None
    pipe = FlowMapPipeline.from_pretrained(folder)
    base, expected = _drawn(pipe), _generated(run)
    pipe.load_lora_weights(checkpoint, adapter_name="tuned")
    assert _same(_drawn(pipe), expected)
    for off, on in (("disable_lora", "enable_lora"), ("delete_adapters", None)):
        getattr(pipe, off)(*(() if on else ("tuned",)))
        assert _same(_drawn(pipe), base), off
        if on:
            getattr(pipe, on)()
            assert _same(_drawn(pipe), expected), on
    pipe.load_lora_weights(checkpoint)
    with pytest.raises(UsageError, match="both have weights"):
        pipe.load_lora_weights(checkpoint)
    with pytest.raises(UsageError, match="has an adapter"):
        pipe.save_pretrained(tmp_path / "saved")
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    assert _same(_drawn(pipe), expected)
    pipe.save_pretrained(tmp_path / "saved")
    assert _same(_drawn(FlowMapPipeline.from_pretrained(tmp_path / "saved")), expected)


@pytest.mark.slow
def test_an_adapter_that_lost_a_file_or_belongs_to_another_map_is_refused(tmp_path: Path) -> None:
    folder, other = build_tiny_flux(tmp_path / "two-time"), build_tiny_flux(tmp_path / "one", second_time="none")
    checkpoint = chosen_checkpoint(make_run(tmp_path / "run", _recipe(folder), seed=4, trained="duration"))
    assert checkpoint is not None
    with pytest.raises(CheckpointError, match="map is 'two-time', but here it is 'single-time'"):
        FlowMapPipeline.from_pretrained(other).load_lora_weights(checkpoint)
    (checkpoint / "fmg_extra.safetensors").unlink()
    pipe = FlowMapPipeline.from_pretrained(folder)
    with pytest.raises(CheckpointError, match=r"fmg_extra\.safetensors' is missing"):
        pipe.load_lora_weights(checkpoint)
    assert not pipe.get_list_adapters()
    again = chosen_checkpoint(make_run(tmp_path / "again", _recipe(folder), seed=4))
    assert again is not None
    shutil.rmtree(again / "peft")
    pipe.load_lora_weights(again)
    pipe.unload_lora_weights()
    weights = again / "pytorch_lora_weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    with pytest.raises(CheckpointError, match="is damaged: its digest"):
        pipe.load_lora_weights(again)
    whole = chosen_checkpoint(make_run(tmp_path / "full", _recipe(folder), seed=4, trained="full"))
    with pytest.raises(UsageError, match="whole transformer"):
        pipe.load_lora_weights(whole)
    assert whole is not None
    pipe.transformer = FlowMapFluxTransformer2DModel.from_pretrained(whole, subfolder="transformer")
    assert _same(_drawn(pipe), _generated(tmp_path / "full"))


def test_the_stock_classes_cannot_take_the_folder(exported: Path) -> None:
    loaders: list[Any] = [DiffusionPipeline, FluxPipeline, AutoPipelineForText2Image]
    for loader in loaders:
        with pytest.raises((ValueError, AttributeError, TypeError)):
            loader.from_pretrained(str(exported))
    with pytest.raises(ValueError, match=r"custom code in pipeline\.py"):
        FluxPipeline.from_pretrained(str(exported))
    assert isinstance(FluxPipeline.from_pretrained(str(exported), **TRUSTED), FlowMapPipeline)


def test_without_fmg_the_folder_says_what_it_needs(exported: Path) -> None:
    code = "import sys; sys.modules['fmg'] = None; exec(compile(open(sys.argv[1]).read(), 'pipeline.py', 'exec'))"
    done = subprocess.run([sys.executable, "-c", code, exported / "pipeline.py"], capture_output=True, text=True)
    assert done.returncode == 1
    assert "in the Python package flow-map-grpo" in done.stderr
    # diffusers advises to install what such a file imports by name
    assert "import fmg" not in (exported / "pipeline.py").read_text()


@pytest.mark.parametrize("name", ["meanflow-shapes", "scm-shapes", "meanflow-text"])
def test_the_shipped_folders_are_of_this_class(name: str) -> None:
    prompts = ['say "A"', 'say "B"'] if name == "meanflow-text" else PROMPTS
    expected = load(name, device="cpu").generate(prompts, SEEDS).images
    # they are stored in fp16, which diffusers keeps for the text encoders by default
    stock: Any = DiffusionPipeline.from_pretrained(str(ASSETS / name), dtype=torch.float32, **TRUSTED)
    for pipe in (FlowMapPipeline.from_pretrained(ASSETS / name), FlowMapPipeline.from_model(name), stock):
        pipe.set_progress_bar_config(disable=True)
        assert _same(pipe(prompts, seeds=SEEDS, output_type="pt").images, expected)


def test_a_saved_pipeline_loads_again(folder: Path, tmp_path: Path) -> None:
    pipe = FlowMapPipeline.from_pretrained(folder)
    pipe.save_pretrained(tmp_path / "saved")
    again = FlowMapPipeline.from_pretrained(tmp_path / "saved")
    assert torch.equal(_drawn(again), _drawn(pipe))
    assert again.config.conventions == pipe.config.conventions
    assert not (tmp_path / "saved" / "scheduler").exists()


def test_images_depend_on_nothing_but_prompt_and_seed(folder: Path) -> None:
    pipe = FlowMapPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    drawn = pipe(PROMPTS, seeds=5, num_images_per_prompt=2, output_type="pt").images
    assert drawn.shape == (4, 3, 64, 64)
    assert _same(pipe(PROMPTS[1], seeds=np.int64(6), output_type="pt").images[0], drawn[3])
    pictures = pipe(PROMPTS, seeds=5, num_images_per_prompt=2).images
    assert np.array_equal(np.asarray(pictures[3]), np.asarray(to_pil(drawn[3])))
    (arrays,) = pipe(PROMPTS[1], seeds=6, output_type="np", return_dict=False)
    assert np.allclose(arrays[0], drawn[3].permute(1, 2, 0), atol=1e-5)


def test_a_generator_gives_the_noise_of_diffusers(folder: Path) -> None:
    pipe = FlowMapPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    seeded: Callable[[], torch.Generator] = lambda: torch.Generator().manual_seed(0)  # noqa: E731
    noise = randn_tensor((2, 16, 8, 8), generator=seeded())
    first, again = (pipe(PROMPTS, generator=seeded(), output_type="pt").images for _ in range(2))
    assert torch.equal(first, again)
    one = {"num_inference_steps": 1, "output_type": "latent"}
    expected = pipe(PROMPTS, generator=seeded(), **one).images
    assert torch.equal(pipe(PROMPTS, latents=noise, **one).images, expected)
    assert torch.equal(pipe(PROMPTS, latents=pack(noise), **one).images, expected)


def test_prompt_embeddings_sizes_and_callbacks(folder: Path) -> None:
    pipe = FlowMapPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    tokens, pooled = pipe.encode_prompt(PROMPTS)
    given = pipe(prompt_embeds=tokens, pooled_prompt_embeds=pooled, seeds=SEEDS, output_type="pt").images
    assert torch.equal(given, _drawn(pipe))
    assert pipe(PROMPTS[0], seeds=0, height=32, width=48).images[0].size == (48, 32)

    seen: list[tuple[int, float]] = []

    def stop(self: Any, step: int, time: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append((step, float(time)))
        assert set(tensors) == {"latents", "prompt_embeds"}
        self._interrupt = step == 1
        return {"latents": torch.zeros_like(tensors["latents"])}

    inputs = ["latents", "prompt_embeds"]
    left = pipe(
        PROMPTS,
        seeds=SEEDS,
        output_type="latent",
        callback_on_step_end=stop,
        callback_on_step_end_tensor_inputs=inputs,
    ).images
    assert seen == [(0, 1000.0), (1, 750.0)]
    assert not left.any()
    assert pipe.num_timesteps == 4


def test_guidance_is_taken_where_the_weights_embed_one(tmp_path: Path) -> None:
    pipe = FlowMapPipeline.from_pretrained(build_tiny_flux(tmp_path / "two-time", guidance_embeds=True))
    own, stated, other = _drawn(pipe), _drawn(pipe, guidance_scale=3.5), _drawn(pipe, guidance_scale=1.0)
    assert torch.equal(own, stated)
    assert not torch.allclose(own, other, atol=1e-5)
    assert pipe.guidance_scale == 1.0


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> FlowMapPipeline:
    return FlowMapPipeline.from_pretrained(build_tiny_flux(tmp_path_factory.mktemp("loaded") / "two-time"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": None}, "no prompt, or more than one form"),
        ({"prompt": []}, "no prompt"),
        ({"generator": torch.Generator()}, "noise is given twice"),
        ({"seeds": [1, 2, 3]}, "1 images came with 3 seeds"),
        ({"seeds": "7"}, "'seeds' is of type str"),
        ({"seeds": ["7"]}, "'seeds' is of type str"),
        ({"num_images_per_prompt": 0}, "number of images per prompt is 0"),
        ({"output_type": "jpeg"}, "no output_type 'jpeg'"),
        ({"num_inference_steps": "4"}, "'steps' is of type str"),
        ({"height": 30}, "multiples of 16"),
        ({"seeds": None, "latents": torch.zeros(1, 16, 4, 4)}, r"1 images need \(1, 16, 8, 8\)"),
        ({"num_inference_steps": 0}, "at least one step"),
        ({"grid": "no-such-grid"}, "no grid named"),
        ({"callback_on_step_end_tensor_inputs": ["nope"]}, "cannot receive 'nope'"),
    ],
)
def test_a_wrong_call_says_what_is_wrong(loaded: FlowMapPipeline, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        loaded(**{"prompt": PROMPTS[0], "seeds": [1], **arguments})


@pytest.mark.parametrize("kind", ["two-time", "single-time"])
def test_an_older_folder_is_read_correctly_or_refused(kind: str, tmp_path: Path) -> None:
    folder = build_tiny_flux(tmp_path / kind, second_time="duration" if kind == "two-time" else "none")
    index = json.loads((folder / "model_index.json").read_text())
    # as in earlier exports, which name the stock classes
    index["transformer"] = ["diffusers", "FluxTransformer2DModel"]
    (folder / "model_index.json").write_text(json.dumps(index))
    assert index["_class_name"] == "FluxPipeline"
    assert _same(_drawn(FlowMapPipeline.from_pretrained(folder)), _generated(Target("base", _recipe(folder), None)))
    # diffusers loads the stock transformer of such a folder, which this class does not take
    parts = FluxPipeline.from_pretrained(str(folder)).components
    with pytest.raises(UsageError, match="does not take the times of a flow map"):
        FlowMapPipeline(
            **{name: parts[name] for name in ("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")},
            transformer=parts["transformer"],
            conventions=json.loads((folder / CONVENTIONS_FILE).read_text()),
        )
    (folder / CONVENTIONS_FILE).unlink()
    with pytest.raises(CheckpointError, match="not a flow-map model folder"):
        FlowMapPipeline.from_pretrained(folder)


def test_what_contradicts_itself_is_refused(exported: Path, tmp_path: Path) -> None:
    changed = Path(shutil.copytree(exported, tmp_path / "changed"))
    stated = json.loads((changed / CONVENTIONS_FILE).read_text())
    (changed / CONVENTIONS_FILE).write_text(json.dumps({**stated, "default_steps": 7, "default_grid": "uniform"}))
    with pytest.raises(CheckpointError, match="differ on how the map is sampled"):
        FlowMapPipeline.from_pretrained(changed)
    index = json.loads((changed / "model_index.json").read_text())
    index["conventions"] |= {"time_scale": 1.0}
    (changed / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"time_scale 1000\.0, but the conventions say 1\.0"):
        DiffusionPipeline.from_pretrained(str(changed), **TRUSTED)
    del index["conventions"]
    (changed / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(UsageError, match="The conventions of this map are not given"):
        DiffusionPipeline.from_pretrained(str(changed), **TRUSTED)


def test_a_transformer_that_lacks_weights_is_an_error(tmp_path: Path) -> None:
    plain, two = build_tiny_flux(tmp_path / "one", second_time="none"), build_tiny_flux(tmp_path / "two-time")
    weights = "transformer/diffusion_pytorch_model.safetensors"
    shutil.copyfile(plain / weights, two / weights)
    for load_it in (lambda: FlowMapPipeline.from_pretrained(two), lambda: _component(two)):
        with pytest.raises(CheckpointError, match=r"missing keys: timestep_embedder2"):
            load_it()


def _component(folder: Path) -> Any:
    return FlowMapFluxTransformer2DModel.from_pretrained(str(folder), subfolder="transformer")


def test_other_sources_are_refused_in_a_line(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no folder"):
        FlowMapPipeline.from_pretrained(tmp_path / "nothing")
    with pytest.raises(UsageError, match="no option 'device_map'"):
        FlowMapPipeline.from_pretrained(ASSETS / "scm-shapes", device_map="cuda")
    with pytest.raises(FmgError):
        FlowMapPipeline.from_model("no-such-model")
