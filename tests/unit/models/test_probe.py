"""The probe on trained and on untrained embedders, and the size of a transformer from its config."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.embeddings import TimestepEmbedding
from safetensors.torch import load_file

from fmg.models.flux.probe import time_scale_doubt
from fmg.models.flux.size import FLUX_LITE, transformer_parameters
from fmg.models.flux.transformer import FlowMapFluxTransformer2DModel

PREFIX = "time_text_embed.timestep_embedder."
TRANSFORMER = Path(str(files("fmg"))) / "assets" / "meanflow-shapes" / "transformer"


def trained() -> TimestepEmbedding:
    """The embedder of the embedded two-time model, trained on times multiplied by 1000."""
    weights = load_file(TRANSFORMER / "diffusion_pytorch_model.safetensors")
    own = {name.removeprefix(PREFIX): x.float() for name, x in weights.items() if name.startswith(PREFIX)}
    embedder = TimestepEmbedding(256, own["linear_1.weight"].shape[0])
    embedder.load_state_dict(own)
    return embedder


def test_weights_of_scaled_times_fit_1000_and_not_1() -> None:
    assert time_scale_doubt(trained(), 1000.0) is None
    doubt = time_scale_doubt(trained(), 1.0)
    assert doubt is not None
    assert doubt.endswith("set model.time_scale to 1000")


@pytest.mark.parametrize("width", [64, 3072])
def test_weights_that_never_saw_scaled_times_fit_1_and_not_1000(width: int) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        embedder = TimestepEmbedding(256, width)
    assert time_scale_doubt(embedder, 1.0) is None
    doubt = time_scale_doubt(embedder.to(torch.bfloat16), 1000.0)
    assert doubt is not None
    assert doubt.endswith("set model.time_scale to 1")


@pytest.mark.parametrize("second_time", ["none", "duration"])
@pytest.mark.parametrize("changes", [{}, {"guidance_embeds": False, "num_layers": 2, "out_channels": 32}])
def test_parameters_are_counted_from_the_config_alone(second_time: str, changes: dict[str, Any]) -> None:
    config: dict[str, Any] = {**FLUX_LITE, **changes}
    with torch.device("meta"):
        transformer = FlowMapFluxTransformer2DModel(**config, time_scale=1.0, second_time=second_time)
    counted = sum(parameter.numel() for parameter in transformer.parameters())
    assert transformer_parameters(config, second_time=second_time != "none") == counted
