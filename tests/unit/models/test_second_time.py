"""How a second time joins the first, against the formula written out, in every class that has one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import SD3Transformer2DModel
from pydantic import ValidationError
from torch import Tensor

from fmg.core.errors import UsageError
from fmg.models.conventions import SecondTime
from fmg.models.flux.transformer import FlowMapFluxTransformer2DModel
from fmg.models.sd3.model import FlowMapSD3Transformer2DModel

BATCH, WIDTH, TEXT, POOLED = 3, 16, 12, 10
COMMON = {
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": TEXT,
    "pooled_projection_dim": POOLED,
}
SD3: dict[str, Any] = {
    **COMMON,
    "sample_size": 4,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "caption_projection_dim": WIDTH,
    "pos_embed_max_size": 4,
    "dual_attention_layers": (0,),
    "qk_norm": "rms_norm",
}
FLUX: dict[str, Any] = {
    **COMMON,
    "in_channels": 8,
    "num_layers": 1,
    "num_single_layers": 1,
    "axes_dims_rope": (4, 2, 2),
}
CLASSES = {"flux": (FlowMapFluxTransformer2DModel, FLUX), "sd3": (FlowMapSD3Transformer2DModel, SD3)}


def network(family: str, second: object, time_scale: float = 1000.0) -> Any:
    cls, sizes = CLASSES[family]
    torch.manual_seed(0)
    return cls(**sizes, time_scale=time_scale, second_time=second).eval()


def inputs(family: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    own = {"hidden_states": draw(BATCH, 4, 4, 4)} if family == "sd3" else {"hidden_states": draw(BATCH, 4, 8)}
    ids = {} if family == "sd3" else {"img_ids": torch.zeros(4, 3), "txt_ids": torch.zeros(5, 3)}
    return {**own, "encoder_hidden_states": draw(BATCH, 5, TEXT), "pooled_projections": draw(BATCH, POOLED), **ids}


def embedding(model: Any, given: dict[str, Tensor], t: Tensor, s: Tensor) -> Tensor:
    """What the blocks are modulated by."""
    seen: list[Tensor] = []
    hook = model.time_text_embed.register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.no_grad():
        model(**given, timestep=t, second=s)
    hook.remove()
    return seen[0]


def sinusoid(value: Tensor) -> Tensor:
    angles = value[:, None] * torch.exp(-torch.log(torch.tensor(10000.0)) * torch.arange(128) / 128)
    return torch.cat([angles.cos(), angles.sin()], -1)


@pytest.mark.parametrize("scale", [None, 10.0])
@pytest.mark.parametrize("gate", [None, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("takes", ["target", "duration"])
@pytest.mark.parametrize("family", CLASSES)
def test_the_embedding_is_the_formula(family: str, takes: str, gate: float | None, scale: float | None) -> None:
    model = network(family, {"takes": takes, "gate": gate, "scale": scale}, time_scale=5.0)
    t, s = torch.tensor([0.3, 0.6, 1.0]), torch.tensor([0.0, 0.25, 0.4])
    given = inputs(family)
    seen = embedding(model, given, t, s)
    parts, second = model.time_text_embed, model.get_submodule(model.second_embedder)
    with torch.no_grad():
        first = parts.timestep_embedder(sinusoid(5.0 * t))
        other = second(sinusoid((5.0 if scale is None else scale) * (s if takes == "target" else t - s)))
        joined = first + other if gate is None else (1 - gate) * first + gate * other
        expected = joined + parts.text_embedder(given["pooled_projections"])
    torch.testing.assert_close(seen, expected)


@pytest.mark.parametrize("family", CLASSES)
def test_a_gate_of_a_half_is_the_mean(family: str) -> None:
    model = network(family, {"takes": "target", "gate": 0.5})
    model.get_submodule(model.second_embedder).load_state_dict(model.time_text_embed.timestep_embedder.state_dict())
    t, s = torch.tensor([0.3, 0.6, 1.0]), torch.tensor([0.0, 0.25, 0.4])
    given = inputs(family)
    mean = (embedding(model, given, t, t) + embedding(model, given, s, s)) / 2
    torch.testing.assert_close(embedding(model, given, t, s), mean)


def test_without_a_second_time_sd3_is_the_stock_model_bit_for_bit() -> None:
    torch.manual_seed(3)
    stock, ours = SD3Transformer2DModel(**SD3).eval(), network("sd3", "none")
    assert list(ours.state_dict()) == list(stock.state_dict())
    ours.load_state_dict(stock.state_dict())
    t = torch.tensor([0.1, 0.5, 1.0])
    with torch.no_grad():
        assert torch.equal(ours(**inputs("sd3"), timestep=t)[0], stock(**inputs("sd3"), timestep=1000 * t)[0])


@pytest.mark.parametrize("family", CLASSES)
def test_times_stay_fp32_in_a_bf16_model(family: str) -> None:
    model = network(family, {"takes": "target", "gate": 0.25}).to(torch.bfloat16)
    given, one, below = inputs(family, torch.bfloat16), torch.ones(BATCH), torch.full((BATCH,), 0.999)
    with torch.no_grad():
        late = model(**given, timestep=one, second=one)[0]
        assert late.dtype == torch.bfloat16
        assert not torch.equal(late, model(**given, timestep=below, second=one)[0])
        assert not torch.equal(late, model(**given, timestep=one, second=below)[0])


@pytest.mark.parametrize("family", CLASSES)
def test_the_convention_survives_a_round_trip(family: str, tmp_path: Path) -> None:
    stated = {"takes": "duration", "gate": 0.25}
    model = network(family, stated, time_scale=1.0)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert (loaded.config.time_scale, loaded.config.second_time) == (1.0, stated)
    times = {"timestep": torch.ones(BATCH), "second": torch.zeros(BATCH)}
    with torch.no_grad():
        assert torch.equal(loaded(**inputs(family), **times)[0], model(**inputs(family), **times)[0])


@pytest.mark.parametrize("family", CLASSES)
def test_a_second_time_is_given_exactly_when_there_is_one(family: str) -> None:
    with pytest.raises(UsageError, match="needs the target time"):
        network(family, "target")(**inputs(family), timestep=torch.ones(BATCH))
    with pytest.raises(UsageError, match="takes no second time"):
        network(family, "none")(**inputs(family), timestep=torch.ones(BATCH), second=torch.zeros(BATCH))


@pytest.mark.parametrize(
    "wrong", [{"takes": "none", "gate": 0.5}, {"takes": "target", "gate": 0}, {"gate": 0.5}, "both"]
)
def test_conventions_that_mean_nothing_are_refused(wrong: object) -> None:
    with pytest.raises(ValidationError):
        SecondTime.model_validate(wrong)


@pytest.mark.parametrize(
    "plain", ["none", "duration", {"takes": "target", "gate": 0.25}, {"takes": "target", "scale": 1.0}]
)
def test_a_convention_is_written_as_short_as_it_can_be(plain: object) -> None:
    assert SecondTime.model_validate(plain).plain() == plain
    assert SecondTime.model_validate_json(SecondTime.model_validate(plain).model_dump_json()).plain() == plain


@pytest.mark.parametrize("cls", [FlowMapFluxTransformer2DModel, FlowMapSD3Transformer2DModel])
def test_a_class_that_fsdp2_makes_of_a_transformer_has_its_constructor(cls: type[Any]) -> None:
    class Mixed:
        """As `FSDPModule`, which comes first."""

    made = type(f"FSDP{cls.__name__}", (Mixed, cls), {})
    assert made.__init__ is cls.__init__
