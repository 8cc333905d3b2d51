"""Adapters that authors published, merged into a FLUX-class base before anything else."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from fmg.core.errors import CheckpointError, MissingDependencyError
from fmg.models.flux.model import FluxModel
from fmg.registry import models
from tests.tiny_flux import RESOLUTION, SEQUENCE, build_tiny_teacher

CPU = torch.device("cpu")
RANK, ALPHA = 4, 8.0
MODULES = (
    "transformer_blocks.0.attn.to_q",
    "transformer_blocks.1.attn.to_add_out",
    "single_transformer_blocks.0.attn.to_k",
)
ANYFLOW = {"takes": "target", "gate": 0.25}
SECOND = "timestep_embedder2"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stock FLUX folder: nothing in it knows of a second time."""
    return build_tiny_teacher(tmp_path_factory.mktemp("stacked") / "flux")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FMG_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def base_of(folder: Path) -> dict[str, Tensor]:
    return dict(load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors"))


def lora(folder: Path, seed: int, modules: tuple[str, ...] = MODULES) -> dict[str, Tensor]:
    """LoRA tensors by plain names."""
    generator, base = torch.Generator().manual_seed(seed), base_of(folder)
    tensors = {}
    for module in modules:
        outputs, inputs = base[f"{module}.weight"].shape
        tensors[f"{module}.lora_A.weight"] = torch.randn(RANK, inputs, generator=generator) / 8
        tensors[f"{module}.lora_B.weight"] = torch.randn(outputs, RANK, generator=generator) / 8
    return tensors


def embedder(seed: int) -> dict[str, Tensor]:
    """A second-time embedder by the names below it."""
    generator = torch.Generator().manual_seed(100 + seed)
    shapes = {"linear_1.weight": (64, 256), "linear_1.bias": (64,), "linear_2.weight": (64, 64), "linear_2.bias": (64,)}
    return {name: torch.randn(shape, generator=generator) / 8 for name, shape in shapes.items()}


def load(folder: Path, adapters: object, **options: object) -> FluxModel:
    given: dict[str, object] = {
        "folder": str(folder),
        "time_scale": 1,
        "map": "two-time",
        "second_time": ANYFLOW,
        "guidance": 3.5,
        "resolution": RESOLUTION,
        "max_sequence_length": SEQUENCE,
        "text_cache": False,
        "adapters": adapters,
    }
    return models.build("flux-fewstep", {**given, **options}).load(CPU, torch.float32)  # type: ignore[return-value]


def tensors_of(model: FluxModel) -> dict[str, Tensor]:
    return dict(model.network.state_dict())


def anyflow(file: Path, tensors: Mapping[str, Tensor], second: Mapping[str, Tensor], prefix: str = "") -> Path:
    """A torch file as MeanFlowNFT's trainers save it."""
    named = {f"{prefix}{name.replace('lora_A.', 'lora_A.default.')}": x for name, x in tensors.items()}
    torch.save({**named, **{f"{prefix}time_text_embed.delta_embedder.{n}": x for n, x in second.items()}}, file)
    return file


def simpletuner(file: Path, tensors: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> Path:
    """A safetensors file as SimpleTuner writes it for FLUX: the embedder beside the LoRA, and alpha in the metadata."""
    everything = {**tensors, **{f"delta_timestep_embedder.{name}": x for name, x in second.items()}}
    facts = {"transformer.r": RANK, "transformer.lora_alpha": ALPHA, "transformer.use_dora": False}
    stored = {f"transformer.{name}": x for name, x in everything.items()}
    save_file(stored, file, metadata={"format": "pt", "lora_adapter_metadata": json.dumps(facts)})
    return file


def test_stages_add_up_in_their_order_and_the_last_embedder_wins(folder: Path, tmp_path: Path) -> None:
    stages = [lora(folder, seed) for seed in range(3)]
    first = anyflow(tmp_path / "1.pt", stages[0], embedder(0))
    second = tmp_path / "2.pt"
    torch.save({"state_dict": torch.load(anyflow(tmp_path / "x.pt", stages[1], embedder(1), "module."))}, second)
    third = simpletuner(tmp_path / "3.safetensors", stages[2], embedder(2))
    given = [{"source": str(first), "alpha": ALPHA}, {"source": str(second), "alpha": ALPHA, "scale": 0.5}, str(third)]
    model = load(folder, given)
    merged, base = tensors_of(model), base_of(folder)
    factors = (ALPHA / RANK, 0.5 * ALPHA / RANK, ALPHA / RANK)
    for module in MODULES:
        expected = base[f"{module}.weight"].double()
        for factor, stage in zip(factors, stages, strict=True):
            expected += factor * stage[f"{module}.lora_B.weight"].double() @ stage[f"{module}.lora_A.weight"].double()
        torch.testing.assert_close(merged[f"{module}.weight"].double(), expected, rtol=0, atol=1e-6)
    for name, x in embedder(2).items():
        assert torch.equal(merged[f"{SECOND}.{name}"], x)
    changed = {f"{module}.weight" for module in MODULES}
    assert all(torch.equal(merged[name], x) for name, x in base.items() if name not in changed)
    assert merged.keys() == {*base, *(f"{SECOND}.{name}" for name in embedder(0))}


def test_an_adapter_is_what_peft_makes_of_it(folder: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model

    stock = FluxTransformer2DModel.from_pretrained(folder / "transformer")
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["attn.to_q", "ff.net.2"], init_lora_weights=False)
    torch.manual_seed(0)
    get_peft_model(stock, config).save_pretrained(tmp_path / "peft")
    wrapped = PeftModel.from_pretrained(
        FluxTransformer2DModel.from_pretrained(folder / "transformer"), tmp_path / "peft"
    )
    expected = wrapped.merge_and_unload().state_dict()
    merged = tensors_of(load(folder, [str(tmp_path / "peft")], map="single-time", second_time="none"))
    assert merged.keys() == expected.keys()
    for name, x in expected.items():
        torch.testing.assert_close(merged[name], x, rtol=0, atol=1e-6)


def test_a_lora_on_the_embedder_adds_to_the_one_of_its_stage(folder: Path, tmp_path: Path) -> None:
    extra = {
        f"{SECOND}.linear_2.lora_A.weight": torch.ones(RANK, 64),
        f"{SECOND}.linear_2.lora_B.weight": torch.ones(64, RANK),
    }
    first = anyflow(tmp_path / "1.pt", extra, embedder(0))
    second = anyflow(tmp_path / "2.pt", extra, embedder(1))
    given = [{"source": str(file), "alpha": RANK} for file in (first, second)]
    merged = tensors_of(load(folder, given))
    torch.testing.assert_close(merged[f"{SECOND}.linear_2.weight"], embedder(1)["linear_2.weight"] + RANK)


def test_merged_weights_are_made_once_and_belong_to_their_inputs(folder: Path, tmp_path: Path, cache: Path) -> None:
    file = anyflow(tmp_path / "1.pt", lora(folder, 0), embedder(0))

    def digest(scale: float) -> str:
        model = load(folder, [{"source": str(file), "alpha": ALPHA, "scale": scale}])
        assert model.components.weights.origin == folder / "transformer"
        return model.base_digest()

    full = digest(1.0)
    written = {path: path.stat().st_mtime_ns for path in cache.rglob("*.safetensors")}
    assert digest(1.0) == full
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*.safetensors")} == written
    assert digest(0.5) != full
    assert len(list((cache / "models").iterdir())) == 2


def test_a_checkpoint_of_fmg_is_an_adapter_with_what_was_trained_beside_it(folder: Path, tmp_path: Path) -> None:
    model = load(folder, [{"source": str(anyflow(tmp_path / "1.pt", lora(folder, 0), embedder(0))), "alpha": ALPHA}])
    model.unfreeze("duration")
    model.attach_adapter(2, 4.0, ["attn.to_q"], 0.0, seed=0)
    with torch.no_grad():
        for _, parameter in model.trainable():
            parameter.add_(0.01)
    model.save_adapter(tmp_path / "saved")
    noise, one, zero = torch.randn(1, *model.latent_shape), torch.ones(1), torch.zeros(1)
    cond = model.encode(["left"])
    again = load(folder, [{"source": str(tmp_path / "1.pt"), "alpha": ALPHA}, str(tmp_path / "saved")])
    with torch.no_grad():
        expected = model.flow_map.jump(noise, one, zero, cond)
        torch.testing.assert_close(again.flow_map.jump(noise, one, zero, cond), expected, rtol=0, atol=1e-5)


def _without(key: str) -> Callable[[dict[str, Any]], object]:
    def change(state: dict[str, Any]) -> None:
        for name in [name for name in state if key in name]:
            del state[name]

    return change


def _set(name: str, value: Tensor) -> Callable[[dict[str, Any]], object]:
    return lambda state: state.update({name: value})


Q = MODULES[0]
DELTA = "time_text_embed.delta_embedder"
DAMAGE = {
    "unknown": (
        _set("transformer_blocks.0.attn.to_q.weight", torch.zeros(64, 64)),
        "neither a LoRA nor the second-time",
    ),
    "lone A": (_without(f"{Q}.lora_B"), f"has only lora_A of {Q}"),
    "lone B": (_without(f"{Q}.lora_A"), f"has only lora_B of {Q}"),
    "no LoRA": (dict.clear, "no mapping of names to tensors"),
    "other ranks": (_set(f"{Q}.lora_B.weight", torch.zeros(64, 3)), "has rank 4 in lora_A and 3 in lora_B"),
    "other shape": (_set(f"{Q}.lora_B.weight", torch.zeros(65, 4)), "a matrix 65 x 64 .* which is 64 x 64"),
    "convolution": (_set(f"{Q}.lora_B.weight", torch.zeros(64, 4, 1, 1)), "not for a linear layer"),
    "other module": (_set("blocks.0.q.lora_A.weight", torch.zeros(4, 64)), "does not have: blocks.0.q"),
    "twice": (_set(f"transformer.{Q}.lora_A.weight", torch.zeros(4, 64)), f"has {Q}.lora_A.* twice"),
    "not a number": (_set(f"{Q}.lora_B.weight", torch.full((64, 4), float("nan"))), "not finite"),
    "part of the embedder": (_without(f"{DELTA}.linear_1.bias"), "without timestep_embedder2.linear_1.bias"),
    "another embedder": (
        _set(f"{DELTA}.linear_3.weight", torch.zeros(2)),
        "does not have: timestep_embedder2.linear_3",
    ),
    "wide embedder": (_set(f"{DELTA}.linear_1.bias", torch.zeros(65)), r"with shape \(65,\) instead of \(64,\)"),
    "lone alpha": (_set("norm_out.linear.alpha", torch.tensor(1.0)), "an alpha but no LoRA for norm_out.linear"),
    "other alpha": (_set(f"{Q}.alpha", torch.tensor(4.0)), "states alpha 4, but model.adapters says 8"),
    "no embedder": (_without("delta_embedder"), "the second-time embedder of a two-time map"),
    "rank 0": (
        lambda state: state.update(
            {f"{Q}.lora_A.weight": torch.zeros(0, 64), f"{Q}.lora_B.weight": torch.zeros(64, 0)}
        ),
        "LoRA of rank 0",
    ),
    "two adapters": (_set(f"{Q}.lora_A.other.weight", torch.zeros(4, 64)), f"lora_A of {Q} twice"),
    "whole numbers": (_set(f"{Q}.lora_A.weight", torch.ones(4, 64, dtype=torch.int64)), "as int64 instead of"),
    "sparse": (_set(f"{Q}.lora_A.weight", torch.eye(4, 64).to_sparse()), "as sparse_coo on cpu instead of"),
    "no memory": (_set(f"{Q}.lora_A.weight", torch.empty(4, 64, device="meta")), "as strided on meta instead of"),
    "alphas": (_set(f"{Q}.alpha", torch.ones(2)), r"with shape \(2,\) instead of one number"),
    "negative alpha": (_set(f"{Q}.alpha", torch.tensor(-8.0)), "states alpha -8.0, which is not a positive number"),
    "too large": (_set(f"{Q}.lora_B.weight", torch.full((64, 4), 3e38)), "is not finite with model.adapters added"),
    "code": (_set("x", torch.nn.Linear(1, 1)), "can run code"),
}


@pytest.mark.parametrize("case", DAMAGE, ids=str)
def test_a_file_that_does_not_fit_is_one_line(folder: Path, tmp_path: Path, cache: Path, case: str) -> None:
    damage, message = DAMAGE[case]
    names = {name.replace("lora_A.", "lora_A."): x for name, x in lora(folder, 0).items()}
    state: dict[str, Any] = {**names, **{f"{DELTA}.{name}": x for name, x in embedder(0).items()}}
    damage(state)
    torch.save(state, tmp_path / "1.pt")
    with pytest.raises(CheckpointError, match=message) as caught:
        load(folder, [{"source": str(tmp_path / "1.pt"), "alpha": ALPHA}])
    assert "\n" not in str(caught.value)
    assert not list(cache.rglob("*.safetensors")) or case == "no embedder"


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"lora_alpha": True}, "states alpha True, which is not a positive number"),
        ({"lora_alpha": "8"}, "states alpha '8', which is not a positive number"),
        ({"lora_alpha": 8, "r": 16}, "has a LoRA of rank 4, but its config says 16"),
        ({"lora_alpha": 8, "init_lora_weights": "pissa_niter_4"}, "which also changed its base"),
    ],
)
def test_metadata_that_another_model_would_come_from_is_refused(
    folder: Path, tmp_path: Path, facts: dict[str, object], message: str
) -> None:
    stated = json.dumps({f"transformer.{key}": value for key, value in facts.items()})
    save_file(lora(folder, 0), tmp_path / "1.safetensors", metadata={"lora_adapter_metadata": stated})
    with pytest.raises(CheckpointError, match=message):
        load(folder, [str(tmp_path / "1.safetensors")])


def test_an_adapter_of_8_bits_is_read(folder: Path, tmp_path: Path) -> None:
    small = {name: x.to(torch.float8_e4m3fn) for name, x in lora(folder, 0).items()}
    wide = {name: x.float() for name, x in small.items()}
    one, two = (
        tensors_of(load(folder, [{"source": str(anyflow(tmp_path / f"{i}.pt", state, embedder(0))), "alpha": ALPHA}]))
        for i, state in enumerate((small, wide))
    )
    assert all(torch.equal(one[name], two[name]) for name in two)


def test_merged_weights_do_not_depend_on_the_order_of_the_sum(folder: Path, tmp_path: Path) -> None:
    plain, order = lora(folder, 0), [2, 0, 3, 1]
    permuted = {name: x[order] if "lora_A" in name else x[:, order] for name, x in plain.items()}
    one, two = (
        tensors_of(load(folder, [{"source": str(anyflow(tmp_path / f"{i}.pt", state, embedder(0))), "alpha": ALPHA}]))
        for i, state in enumerate((plain, permuted))
    )
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_an_alpha_that_no_file_states_has_to_be_given(folder: Path, tmp_path: Path) -> None:
    file = anyflow(tmp_path / "1.pt", lora(folder, 0), embedder(0))
    with pytest.raises(CheckpointError, match=r"does not state the alpha of its LoRA, of rank 4.*alpha: ALPHA"):
        load(folder, [str(file)])


def test_a_file_is_not_added_twice(folder: Path, tmp_path: Path) -> None:
    file = anyflow(tmp_path / "1.pt", lora(folder, 0), embedder(0))
    with pytest.raises(CheckpointError, match="added twice"):
        load(folder, [{"source": str(file), "alpha": ALPHA}] * 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dora": True}, "use_dora, which cannot be merged"),
        ({"alpha_pattern": {"to_q": 2}}, "alpha_pattern"),
        ({"target_modules": ["attn.to_q", "attn.to_v"]}, "lacks the LoRA of .*attn.to_v"),
    ],
)
def test_the_config_of_a_peft_folder_is_obeyed(
    folder: Path, tmp_path: Path, change: dict[str, object], message: str
) -> None:
    place = tmp_path / "peft"
    place.mkdir()
    tensors = lora(folder, 0, tuple(f"transformer_blocks.{i}.attn.to_q" for i in range(2)))
    save_file({f"base_model.model.{name}": x for name, x in tensors.items()}, place / "adapter_model.safetensors")
    config = {"r": RANK, "lora_alpha": ALPHA, "target_modules": ["transformer_blocks.0.attn.to_q"]}
    (place / "adapter_config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(CheckpointError, match=message):
        load(folder, [str(place)], map="single-time", second_time="none")


def test_files_of_the_hub_are_fetched_with_the_model(folder: Path) -> None:
    command = r"fmg fetch flux-fewstep --set 'model\.adapters=\[\"owner/name@main:stage\.pt\"\]' --set model\.folder="
    with pytest.raises(MissingDependencyError, match=f"needs its adapter 1, but .*Fetch it with `{command}"):
        load(folder, ["owner/name@main:stage.pt"])
