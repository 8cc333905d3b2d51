from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fmg.models.flux.model import FluxModel
from fmg.registry import models

CPU = torch.device("cpu")


def _load(folder: Path, **options: object) -> FluxModel:
    stated = {"folder": str(folder), "map": "two-time", "second_time": "duration", "time_scale": 1000.0}
    config = {**stated, "guidance": None, "resolution": 256, "max_sequence_length": 12, "text_cache": False, **options}
    loaded = models.build("flux-fewstep", config).load(CPU, torch.float32)
    assert isinstance(loaded, FluxModel)
    return loaded


def _decode(model: FluxModel, monkeypatch: pytest.MonkeyPatch) -> tuple[Tensor, list[tuple[int, ...]]]:
    """Two images, and the shapes of the latents that the decoder was called with."""
    decoder, seen = model.components.vae.decoder, []
    forward = decoder.forward

    def record(sample: Tensor, *args: Any) -> Any:
        seen.append(tuple(sample.shape))
        return forward(sample, *args)

    monkeypatch.setattr(decoder, "forward", record)
    latents = torch.randn(2, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model.decode(latents), seen


@pytest.mark.filterwarnings("ignore:.*the weights respond to times")
def test_tiles_bound_what_the_decoder_sees_and_slices_take_one_image(
    two_time_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, seen = _decode(_load(two_time_folder), monkeypatch)
    assert seen == [(2, 16, 32, 32)]
    sliced, seen = _decode(_load(two_time_folder, vae_slicing=True), monkeypatch)
    assert seen == [(1, 16, 32, 32)] * 2
    assert torch.allclose(sliced, whole, atol=1e-5)
    tiled, seen = _decode(_load(two_time_folder, vae_tile=128), monkeypatch)
    assert len(seen) > 1
    assert max(max(shape[2:]) for shape in seen) == 16
    assert tiled.shape == whole.shape
    # tiles do not see beyond their edges, which shows in group norms of noise, and little elsewhere
    assert float((tiled - whole).abs().mean()) < 0.1
