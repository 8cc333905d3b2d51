from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fmg.core.errors import CompositionError
from fmg.core.specs import DECODE_PIXELS
from fmg.models.flux.model import FluxModel
from fmg.registry import models
from tests.tiny_flux import build_tiny_flux

CPU = torch.device("cpu")


def _inputs(model: FluxModel, rows: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(rows, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    return x, torch.full((rows,), 0.9), torch.full((rows,), 0.4)


def test_times_and_guidance_reach_the_transformer_in_fp32(tmp_path: Path) -> None:
    folder = build_tiny_flux(tmp_path / "flux", guidance_embeds=True)
    model = FluxModel.from_folder(folder, CPU, torch.bfloat16, name="tiny")
    seen: list[dict[str, Tensor]] = []
    model.components.transformer.register_forward_pre_hook(lambda _, __, kw: seen.append(kw), with_kwargs=True)
    x, t, s = _inputs(model)
    out = model.flow_map.jump(x, t, s, model.encode(["a", "b"]))
    assert out.dtype == torch.float32
    assert seen[0]["hidden_states"].dtype == torch.bfloat16
    for name, value in (("timestep", 0.9), ("second", 0.4), ("guidance", 3.5)):
        assert torch.equal(seen[0][name], torch.full((2,), value))


def test_one_jump_is_one_call_and_rows_do_not_mix(model: FluxModel) -> None:
    calls: list[int] = []
    model.components.transformer.register_forward_hook(lambda *_: calls.append(1))
    x, t, s = _inputs(model, rows=3)
    cond = model.encode(["a red circle", "a blue square", "left"])
    together = model.flow_map.jump(x, t, s, cond)
    assert len(calls) == 1
    alone = model.flow_map.jump(x[1:2], t[1:2], s[1:2], cond.select(torch.tensor([1])))
    assert torch.allclose(together[1:2], alone, atol=1e-5)


def test_a_single_time_model_refuses_an_interior_target(single_time_folder: Path) -> None:
    model = FluxModel.from_folder(single_time_folder, CPU, torch.float32, name="tiny")
    x, t, s = _inputs(model)
    cond = model.encode(["a", "b"])
    with pytest.raises(CompositionError):
        model.flow_map.jump(x, t, s, cond)
    assert model.flow_map.jump(x, t, torch.zeros(2), cond).shape == x.shape


def test_decoding_in_chunks_changes_nothing(model: FluxModel, monkeypatch: pytest.MonkeyPatch) -> None:
    latents = torch.randn(5, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    whole = model.decode(latents)
    sizes: list[int] = []
    model.components.vae.decoder.register_forward_hook(lambda _, args, __: sizes.append(len(args[0])))
    monkeypatch.setattr("fmg.models.common.model.DECODE_PIXELS", 2 * 64 * 64)
    # convolutions round differently by batch size and processor: 2e-6 observed; the design promises 1e-5 per image
    assert (model.decode(latents) - whole).abs().max() <= 1e-5
    assert sizes == [2, 2, 1]
    assert DECODE_PIXELS > 2 * 64 * 64


def test_bf16_model_trains_an_fp32_adapter(two_time_folder: Path) -> None:
    model = FluxModel.from_folder(two_time_folder, CPU, torch.bfloat16, name="tiny")
    model.attach_adapter(2, 4.0, ["attention"], 0.0, seed=0)
    parameters = dict(model.trainable())
    assert {p.dtype for p in parameters.values()} == {torch.float32}
    x, t, s = _inputs(model)
    cond = model.encode(["a red circle", "a blue square"])
    model.flow_map.jump(x, t, s, cond).square().mean().backward()
    gradients = [p.grad for name, p in parameters.items() if "lora_B" in name]
    assert all(g is not None and g.dtype == torch.float32 and bool(g.isfinite().all()) for g in gradients)
    assert all(bool(g.any()) for g in gradients if g is not None)
    images = model.decode(model.policies.reference.jump(x, t, s, cond))
    assert images.dtype == torch.float32
    assert bool(images.isfinite().all())


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
    # tiles lack what is beyond their edges, which affects group norms of noise, and little else
    assert float((tiled - whole).abs().mean()) < 0.1
