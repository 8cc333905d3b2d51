from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline
from peft import PeftModel, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from fmg.core.errors import CheckpointError, UsageError
from fmg.models.common.saved_weights import ADAPTER_MANIFEST, DIFFUSERS_FILE
from fmg.models.common.weights import folder_weights, stored_digest
from fmg.models.flux.loading import load_folder
from fmg.models.flux.model import FluxModel
from tests.tiny_flux import build_tiny_flux, store_in

CPU = torch.device("cpu")


def _load(folder: Path) -> FluxModel:
    return FluxModel.from_folder(folder, CPU, torch.float32, name="tiny")


@torch.no_grad()
def _velocity(model: FluxModel) -> Tensor:
    x = torch.randn(2, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([1.0, 0.7])
    return model.flow_map.jump(x, t, torch.zeros(2), model.encode(["a red circle", "a blue square"]))


def _trained(folder: Path, rank: int = 2) -> FluxModel:
    """A model with an adapter whose alpha is not its rank and whose B is not zero."""
    model = _load(folder)
    model.attach_adapter(rank, 6.0, ["attention"], 0.0, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, parameter in model.trainable():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture(scope="module", params=["two_time_folder", "single_time_folder"])
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, FluxModel]:
    """(model folder, adapter folder, model that was saved)."""
    folder: Path = request.getfixturevalue(request.param)
    model = _trained(folder)
    adapter = tmp_path_factory.mktemp("saved") / "adapter"
    model.save_adapter(adapter)
    return folder, adapter, model


@pytest.fixture(scope="module")
def saved_adapter(two_time_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    adapter = tmp_path_factory.mktemp("kept") / "adapter"
    _trained(two_time_folder).save_adapter(adapter)
    return adapter


@pytest.fixture
def adapter(saved_adapter: Path, tmp_path: Path) -> Path:
    """A saved adapter that a test may damage."""
    return Path(shutil.copytree(saved_adapter, tmp_path / "adapter"))


def test_a_loaded_adapter_is_the_saved_one_bit_for_bit(saved: tuple[Path, Path, FluxModel]) -> None:
    folder, adapter, model = saved
    fresh = _load(folder)
    fresh.load_adapter(adapter)
    expected = dict(model.trainable())
    assert all(torch.equal(parameter, expected[name]) for name, parameter in fresh.trainable())
    assert torch.equal(_velocity(fresh), _velocity(model))
    assert not torch.allclose(_velocity(fresh), _velocity(_load(folder)), atol=1e-3)


def test_stock_flux_pipeline_loads_it_and_generates_the_same(saved: tuple[Path, Path, FluxModel]) -> None:
    folder, adapter, model = saved
    parts = load_folder(folder, CPU, torch.float32)
    pipeline = FluxPipeline(
        scheduler=None,
        vae=parts.vae,
        text_encoder=parts.text.text_encoder,
        tokenizer=parts.text.tokenizer,
        text_encoder_2=parts.text.text_encoder_2,
        tokenizer_2=parts.text.tokenizer_2,
        transformer=parts.transformer,
    )
    pipeline.load_lora_weights(str(adapter))
    assert pipeline.get_active_adapters() == ["default_0"]
    assert torch.allclose(_velocity(FluxModel(parts, "tiny")), _velocity(model), atol=1e-6, rtol=0)


def test_peft_loads_its_folder_and_generates_the_same(saved: tuple[Path, Path, FluxModel]) -> None:
    folder, adapter, model = saved
    parts = load_folder(folder, CPU, torch.float32)
    PeftModel.from_pretrained(parts.transformer, str(adapter / "peft"))
    assert torch.allclose(_velocity(FluxModel(parts, "tiny")), _velocity(model), atol=1e-6, rtol=0)


def test_names_are_those_that_peft_gives(saved: tuple[Path, Path, FluxModel]) -> None:
    _, adapter, model = saved
    expected = {f"transformer.{name}" for name in get_peft_model_state_dict(model.components.transformer)}
    alphas = {name.replace(".lora_A.weight", ".alpha") for name in expected if ".lora_A." in name}
    stored = load_file(adapter / DIFFUSERS_FILE)
    assert set(stored) == expected | alphas
    assert {float(stored[name]) for name in alphas} == {6.0}
    assert {f"transformer.{name}" for name, _ in model.trainable()} == expected


def test_the_same_adapter_is_the_same_files(saved: tuple[Path, Path, FluxModel], tmp_path: Path) -> None:
    _, adapter, model = saved
    model.save_adapter(tmp_path / "again")
    files = {str(file.relative_to(adapter)) for file in adapter.rglob("*") if file.is_file()}
    assert files == {DIFFUSERS_FILE, ADAPTER_MANIFEST, "peft/adapter_config.json", "peft/adapter_model.safetensors"}
    # the order of the two metadata entries of the diffusers file is not fixed by safetensors
    assert _contents(adapter / DIFFUSERS_FILE) == _contents(tmp_path / "again" / DIFFUSERS_FILE)
    assert all(
        (adapter / file).read_bytes() == (tmp_path / "again" / file).read_bytes() for file in files - {DIFFUSERS_FILE}
    )


def _contents(file: Path) -> tuple[dict[str, str], dict[str, list[object]]]:
    with safe_open(str(file), framework="pt") as opened:
        return opened.metadata(), {name: opened.get_tensor(name).tolist() for name in opened.keys()}  # noqa: SIM118


def test_an_existing_folder_is_never_overwritten(two_time_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(UsageError, match="taken exists already"):
        _trained(two_time_folder).save_adapter(tmp_path / "taken")
    assert list((tmp_path / "taken").iterdir()) == []


def test_a_failing_save_leaves_nothing(two_time_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("fmg.models.common.saved_weights.save_file", fail)
    with pytest.raises(OSError, match="No space left"):
        _trained(two_time_folder).save_adapter(tmp_path / "runs" / "adapter")
    assert list((tmp_path / "runs").iterdir()) == []


def test_saving_without_an_adapter_is_refused(model: FluxModel, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no adapter to save"):
        model.save_adapter(tmp_path / "adapter")


def _edit_tensors(adapter: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(adapter / DIFFUSERS_FILE)
    change(tensors)
    save_file(tensors, adapter / DIFFUSERS_FILE)


def _edit_manifest(adapter: Path, **changes: object) -> None:
    content = json.loads((adapter / ADAPTER_MANIFEST).read_text())
    (adapter / ADAPTER_MANIFEST).write_text(json.dumps({**content, **changes}))


FIRST = "transformer.transformer_blocks.0.attn.to_q.lora_A.weight"
DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (shutil.rmtree, "is not an adapter"),
    "no tensors": (lambda a: (a / DIFFUSERS_FILE).unlink(), f"{DIFFUSERS_FILE} cannot be read"),
    "truncated": (lambda a: (a / DIFFUSERS_FILE).write_bytes(b"\0" * 64), f"{DIFFUSERS_FILE} cannot be read"),
    "missing key": (lambda a: _edit_tensors(a, lambda t: t.pop(FIRST)), "to_q.lora_A.weight is missing"),
    "extra key": (lambda a: _edit_tensors(a, lambda t: t.update(other=torch.zeros(1))), "other is unknown"),
    "wrong shape": (
        lambda a: _edit_tensors(a, lambda t: t.update({FIRST: torch.zeros(3, 64)})),
        r"has shape \(3, 64\) instead of \(2, 64\)",
    ),
    "not a number": (lambda a: _edit_tensors(a, lambda t: t[FIRST].fill_(torch.nan)), "is not finite"),
    "manifest": (lambda a: (a / ADAPTER_MANIFEST).write_text("{"), f"{ADAPTER_MANIFEST} cannot be used"),
    "schema": (lambda a: _edit_manifest(a, schema=2), "schema"),
    "targets": (lambda a: _edit_manifest(a, targets=["to_qq"]), "to_qq"),
    "rank": (lambda a: _edit_manifest(a, rank=3), "instead of"),
    "base": (
        lambda a: _edit_manifest(a, base={"name": "other", "digest": "0" * 64}),
        "trained on different weights of 'other'",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_adapter_is_one_clear_error_and_changes_nothing(model: FluxModel, adapter: Path, damage: str) -> None:
    apply, expected = DAMAGES[damage]
    apply(adapter)
    with pytest.raises(CheckpointError, match=expected) as caught:
        model.load_adapter(adapter)
    assert len(str(caught.value).splitlines()) == 1
    assert list(model.trainable()) == []


def test_the_base_is_identified_by_its_weights_not_by_its_name(adapter: Path, tmp_path: Path) -> None:
    other = _load(build_tiny_flux(tmp_path / "other", seed=1))
    with pytest.raises(CheckpointError, match="trained on different weights of 'tiny'"):
        other.load_adapter(adapter)


def test_an_attached_adapter_of_another_geometry_is_kept(two_time_folder: Path, adapter: Path) -> None:
    model = _trained(two_time_folder, rank=4)
    before = {name: parameter.detach().clone() for name, parameter in model.trainable()}
    with pytest.raises(CheckpointError, match=r"has rank 2, alpha 6 .* has rank 4, alpha 6"):
        model.load_adapter(adapter)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.trainable())


def test_loading_into_an_attached_adapter_keeps_the_optimizers_parameters(two_time_folder: Path, adapter: Path) -> None:
    model = _load(two_time_folder)
    model.attach_adapter(2, 6.0, ["attention"], 0.0, seed=5)
    before = [id(parameter) for _, parameter in model.trainable()]
    model.load_adapter(adapter)
    assert [id(parameter) for _, parameter in model.trainable()] == before
    stored = load_file(adapter / DIFFUSERS_FILE)
    assert all(torch.equal(parameter, stored[f"transformer.{name}"]) for name, parameter in model.trainable())


def test_an_adapter_fits_its_base_in_any_dtype_and_sharding(scratch_folder: Path, tmp_path: Path) -> None:
    store_in(scratch_folder, torch.float16)
    digest = stored_digest(folder_weights(scratch_folder / "transformer"))
    assert FluxModel.from_folder(scratch_folder, CPU, torch.float16, name="tiny").base_digest() == digest
    model = _trained(scratch_folder)
    assert model.base_digest() != digest
    model.save_adapter(tmp_path / "adapter")
    transformer = load_folder(scratch_folder, CPU, torch.float16).transformer
    shutil.rmtree(scratch_folder / "transformer")
    transformer.save_pretrained(str(scratch_folder / "transformer"), max_shard_size="60KB")
    assert stored_digest(folder_weights(scratch_folder / "transformer")) == digest
    other = FluxModel.from_folder(scratch_folder, CPU, torch.bfloat16, name="tiny")
    other.load_adapter(tmp_path / "adapter")
    expected = dict(model.trainable())
    assert all(torch.equal(parameter, expected[name]) for name, parameter in other.trainable())
