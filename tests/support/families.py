"""What is checked of every family of models (tests/unit/models/test_families.py), on tiny folders of real classes."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fmg.flow import make_grid
from fmg.flow.sampling import native_sample
from fmg.models.common.model import AdaptedModel
from fmg.registry import models

CPU = torch.device("cpu")
PROMPTS = ("A red circle", "a blue square on the left, much longer")
WEIGHTS = "diffusion_pytorch_model.safetensors"


@dataclass(frozen=True)
class FamilyCase:
    """A family and how its own pipeline is run.

    Attributes:
        model: registered name.
        build: writes a tiny folder and returns the options of the model that read it.
        latents: what the stock pipeline samples in a number of steps for some prompts from given noise.
        embeddings: the prompt embeddings of the pipeline, by the names that the model gives them.
        images: what it decodes from latents of that form, in [0, 1].
        draw: the image of the pipeline with a saved adapter after one step, for a prompt from given noise.
        adapted: linear layers that the preset `attention` adapts in the tiny folder.
        attention_mlp: the same for `attention-mlp`.
        dropped: beginning of the name of a tensor of the transformer.
        mismatch: a component, a change of its config that no longer fits the transformer, and what the error says.
    """

    model: str
    build: Callable[[Path], dict[str, object]]
    latents: Callable[[Path, AdaptedModel[Any], list[str], Tensor, int], Tensor]
    embeddings: Callable[[Path, AdaptedModel[Any], list[str]], Mapping[str, Tensor]]
    images: Callable[[Path, AdaptedModel[Any], Tensor], Tensor]
    draw: Callable[[Path, Path, str, Tensor], Tensor]
    adapted: int
    attention_mlp: int
    dropped: str
    mismatch: tuple[str, Mapping[str, object], str]


def load(
    case: FamilyCase, options: Mapping[str, object], dtype: torch.dtype = torch.float32, **changes: object
) -> AdaptedModel[Any]:
    """The model of a tiny folder."""
    return models.build(case.model, {**options, **changes}).load(CPU, dtype)  # type: ignore[return-value]


def noise(model: AdaptedModel[Any], rows: int = 2) -> Tensor:
    return torch.randn(rows, *model.latent_shape, generator=torch.Generator().manual_seed(0))


def attach(model: AdaptedModel[Any], targets: str = "attention") -> int:
    """A trained adapter, as far as its values tell; returns how many layers it adapts."""
    adapted = model.attach_adapter(2, 6.0, [targets], 0.0, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, parameter in model.trainable():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return adapted


@torch.no_grad()
def jump(model: AdaptedModel[Any]) -> Tensor:
    """Two samples at two times, both to 0."""
    times = torch.tensor([1.0, 0.6])
    return model.flow_map.jump(noise(model), times, torch.zeros(2), model.encode(list(PROMPTS)))


@torch.no_grad()
def sampled(model: AdaptedModel[Any], prompts: list[str], start: Tensor, steps: int) -> Tensor:
    """Latents of the native sampler on the model's own grid."""
    tokens = start.shape[-1] * start.shape[-2] // 4
    grid = make_grid(model.spec.default_grid, steps, image_tokens=tokens)

    def renoise(_: int) -> Tensor:
        raise AssertionError("the map is deterministic")

    return native_sample(model.flow_map, model.encode(prompts), start, grid, renoise)


def edit_config(folder: Path, component: str, **changes: object) -> None:
    """Changes values of a component's `config.json`."""
    file = folder / component / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text(encoding="utf-8")), **changes}), encoding="utf-8")


def edit_weights(file: Path, *, drop: str = "", add: Mapping[str, Tensor] | None = None) -> None:
    """Drops the tensors of a safetensors file whose names begin with `drop`, and adds others."""
    kept = {name: x for name, x in load_file(file).items() if not drop or not name.startswith(drop)}
    save_file({**kept, **(add or {})}, file)
