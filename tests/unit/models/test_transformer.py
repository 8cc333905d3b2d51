from __future__ import annotations

import copy
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from diffusers.models.embeddings import TimestepEmbedding
from peft import LoraConfig
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fmg.core.errors import UsageError
from fmg.models.common.two_times import time_scale_doubt
from fmg.models.conventions import Takes
from fmg.models.flux.size import FLUX_LITE, transformer_parameters
from fmg.models.flux.transformer import FlowMapFluxTransformer2DModel

SIZES: dict[str, Any] = {
    "patch_size": 1,
    "in_channels": 8,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": 12,
    "pooled_projection_dim": 10,
    "axes_dims_rope": (4, 2, 2),
}
BATCH, TOKENS, TEXT = 3, 4, 5


def _model(second_time: Takes, guidance: bool = False, time_scale: float = 1000.0, seed: int = 0):
    torch.manual_seed(seed)
    model = FlowMapFluxTransformer2DModel(
        **SIZES, guidance_embeds=guidance, time_scale=time_scale, second_time=second_time
    )
    return model.eval()


def _inputs(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.stack(torch.meshgrid(torch.arange(2.0), torch.arange(2.0), indexing="ij"), -1).reshape(4, 2)
    return {
        "hidden_states": torch.randn(BATCH, TOKENS, 8, generator=generator).to(dtype),
        "encoder_hidden_states": torch.randn(BATCH, TEXT, 12, generator=generator).to(dtype),
        "pooled_projections": torch.randn(BATCH, 10, generator=generator).to(dtype),
        "img_ids": torch.cat([torch.zeros(4, 1), ids], -1),
        "txt_ids": torch.zeros(TEXT, 3),
    }


@pytest.mark.parametrize("guidance", [False, True])
def test_without_a_second_time_it_is_the_stock_model_bit_for_bit(guidance: bool) -> None:
    torch.manual_seed(0)
    stock = FluxTransformer2DModel(**SIZES, guidance_embeds=guidance).eval()
    ours = _model("none", guidance, seed=7)
    assert list(ours.state_dict()) == list(stock.state_dict())
    ours.load_state_dict(stock.state_dict())
    scale = torch.full((BATCH,), 3.5) if guidance else None
    t = torch.tensor([0.1, 0.5, 1.0])
    expected = stock(**_inputs(), timestep=t, guidance=scale, return_dict=False)[0]
    torch.testing.assert_close(ours(**_inputs(), timestep=t, guidance=scale)[0], expected, rtol=0, atol=0)


@pytest.mark.parametrize("second_time", ["duration", "target"])
def test_the_second_embedder_has_the_published_names_and_shapes(second_time: Takes) -> None:
    extra = {k: tuple(v.shape) for k, v in _model(second_time).state_dict().items() if "embedder2" in k}
    assert extra == {
        "timestep_embedder2.linear_1.weight": (16, 256),
        "timestep_embedder2.linear_1.bias": (16,),
        "timestep_embedder2.linear_2.weight": (16, 16),
        "timestep_embedder2.linear_2.bias": (16,),
    }


@pytest.mark.parametrize("guidance", [False, True])
@pytest.mark.parametrize("second_time", ["duration", "target"])
def test_the_embedding_is_the_sum_of_its_parts(second_time: Takes, guidance: bool) -> None:
    model = _model(second_time, guidance, time_scale=1.0)
    seen: list[Tensor] = []
    model.time_text_embed.register_forward_hook(lambda module, args, output: seen.append(output))
    t, s = torch.tensor([0.3, 0.6, 1.0]), torch.tensor([0.0, 0.25, 0.4])
    scale = torch.full((BATCH,), 3.5)
    inputs = _inputs()
    model(**inputs, timestep=t, second=s, guidance=scale if guidance else None)
    frequencies = torch.exp(-torch.log(torch.tensor(10000.0)) * torch.arange(128) / 128)

    def sinusoid(value: Tensor) -> Tensor:
        angles = value[:, None] * frequencies
        return torch.cat([angles.cos(), angles.sin()], -1)

    embed = model.time_text_embed
    expected = embed.timestep_embedder(sinusoid(t)) + embed.text_embedder(inputs["pooled_projections"])
    expected = expected + model.timestep_embedder2(sinusoid(t - s if second_time == "duration" else s))
    if guidance:
        expected = expected + embed.guidance_embedder(sinusoid(scale))
    torch.testing.assert_close(seen[0], expected)


def test_times_stay_fp32_in_a_bf16_model() -> None:
    model = _model("duration").to(torch.bfloat16)
    assert torch.tensor(0.999).bfloat16() == 1.0
    inputs = _inputs(torch.bfloat16)
    one, below = torch.ones(BATCH), torch.full((BATCH,), 0.999)
    late = model(**inputs, timestep=one, second=one)[0]
    assert late.dtype == torch.bfloat16
    assert not torch.equal(late, model(**inputs, timestep=below, second=below)[0])
    assert not torch.equal(late, model(**inputs, timestep=one, second=below)[0])


def test_duration_depends_on_the_difference_of_times_only() -> None:
    model = _model("duration")
    with torch.no_grad():
        model.time_text_embed.timestep_embedder.linear_2.weight.zero_()
    t, s = torch.tensor([0.9, 0.7, 0.5]), torch.tensor([0.5, 0.3, 0.1])
    first = model(**_inputs(), timestep=t, second=s)[0]
    torch.testing.assert_close(model(**_inputs(), timestep=t - 0.1, second=s - 0.1)[0], first, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("second_time", "guidance", "arguments", "says"),
    [
        ("duration", False, {}, "needs the target time"),
        ("none", False, {"second": torch.zeros(BATCH)}, "takes no second time"),
        ("none", True, {}, "needs a guidance scale"),
        ("none", False, {"guidance": torch.ones(BATCH)}, "takes no guidance scale"),
    ],
)
def test_missing_and_superfluous_inputs_are_refused(
    second_time: Takes, guidance: bool, arguments: dict[str, Tensor], says: str
) -> None:
    with pytest.raises(UsageError, match=says):
        _model(second_time, guidance)(**_inputs(), timestep=torch.ones(BATCH), **arguments)


@pytest.mark.parametrize("wrong", [{"time_scale": 0.0}, {"second_time": "both"}])
def test_wrong_configuration_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        FlowMapFluxTransformer2DModel(**SIZES, **{"time_scale": 1.0, "second_time": "none", **wrong})


def test_the_extra_configuration_survives_a_round_trip(tmp_path: Path) -> None:
    model = _model("target", time_scale=1.0)
    model.save_pretrained(tmp_path)
    loaded = FlowMapFluxTransformer2DModel.from_pretrained(tmp_path).eval()
    assert (loaded.config.time_scale, loaded.config.second_time) == (1.0, "target")
    times = {"timestep": torch.ones(BATCH), "second": torch.zeros(BATCH)}
    assert torch.equal(loaded(**_inputs(), **times)[0], model(**_inputs(), **times)[0])


def test_lora_and_gradient_checkpointing_give_the_same_gradients() -> None:
    model = _model("duration")
    model.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=["to_q", "to_out.0", "linear_2"]))
    plain, checked = copy.deepcopy(model).train(), model.train()
    checked.enable_gradient_checkpointing()
    times = {"timestep": torch.ones(BATCH), "second": torch.zeros(BATCH)}
    for candidate in (plain, checked):
        candidate(**_inputs(), **times)[0].square().mean().backward()
    gradients = [{n: p.grad for n, p in m.named_parameters() if p.requires_grad} for m in (plain, checked)]
    assert any("timestep_embedder2" in name for name in gradients[0])
    for name, gradient in gradients[0].items():
        assert gradient is not None
        torch.testing.assert_close(gradients[1][name], gradient)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # raised inside torch.func
def test_forward_derivative_in_time_matches_a_central_difference() -> None:
    model = _model("duration", time_scale=1.0).double()
    inputs = {k: v.double() for k, v in _inputs().items()}
    t, s = torch.tensor([0.9, 0.7, 0.5]).double(), torch.tensor([0.5, 0.3, 0.1]).double()

    def predict(t: Tensor) -> Tensor:
        output: Tensor = model(**inputs, timestep=t, second=s)[0]
        return output

    with sdpa_kernel(SDPBackend.MATH):
        _, derivative = torch.func.jvp(predict, (t,), (torch.ones_like(t),))
    step = 1e-3
    difference = (predict(t + step) - predict(t - step)) / (2 * step)
    torch.testing.assert_close(derivative, difference, rtol=1e-2, atol=1e-3)


@pytest.mark.slow
@pytest.mark.compile
def test_export_keeps_both_times_as_inputs() -> None:
    model = _model("duration")
    times = {"timestep": torch.ones(BATCH), "second": torch.zeros(BATCH)}
    program = torch.export.export(model, (), {**_inputs(), **times}).module()
    other = {"timestep": torch.full((BATCH,), 0.7), "second": torch.full((BATCH,), 0.2)}
    torch.testing.assert_close(program(**_inputs(), **other)[0], model(**_inputs(), **other)[0])


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
