"""Base weights that are trained: saved, verified, read back, and never dropped silently."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fmg.core.errors import CheckpointError, CompositionError, UsageError
from fmg.core.protocols import FlowMap
from fmg.models.common import roundtrip_check, saved_weights
from fmg.models.common.adapter import adapter_shapes
from fmg.models.common.saved_weights import EXTRA_FILE, BaseReference, read_adapter_manifest, read_adapter_tensors
from fmg.models.common.weights import INDEX_FILE, WeightFiles, folder_weights
from fmg.models.flux.model import FluxModel
from fmg.models.flux.transformer import FlowMapFluxTransformer2DModel

CPU = torch.device("cpu")
What = Literal["duration", "full"]
EMBEDDER = {f"timestep_embedder2.linear_{i}.{part}" for i in (1, 2) for part in ("weight", "bias")}


def _load(folder: Path, dtype: torch.dtype = torch.float32) -> FluxModel:
    return FluxModel.from_folder(folder, CPU, dtype, name="tiny")


def _trained(folder: Path, what: What, dtype: torch.dtype = torch.float32, **kept: bool) -> FluxModel:
    """Large changes, so that any loss shows in an image."""
    model = _load(folder, dtype)
    if what == "duration":
        model.attach_adapter(2, 4.0, ["attention"], 0.0, seed=0)
    model.unfreeze(what, **kept)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, parameter in model.trainable():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture(scope="module")
def saved(two_time_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved adapter with its embedder, `duration`, and a saved network, `full`. Do not change them: copy them."""
    place = tmp_path_factory.mktemp("saved")
    _trained(two_time_folder, "duration").save_adapter(place / "duration")
    _trained(two_time_folder, "full", old=False, reference=False).save_adapter(place / "full")
    return place


@torch.no_grad()
def _jump(model: FluxModel, flow_map: FlowMap | None = None) -> Tensor:
    x = torch.randn(2, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    t, s = torch.tensor([1.0, 0.75]), torch.tensor([0.5, 0.0])
    return (flow_map or model.flow_map).jump(x, t, s, model.encode(["a red circle", "a blue square"]))


@pytest.mark.parametrize("what", ["duration", "full"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_trained_is_fp32_and_comes_back(
    what: What, dtype: torch.dtype, two_time_folder: Path, tmp_path: Path
) -> None:
    model = _trained(two_time_folder, what, dtype)
    assert all(parameter.dtype == torch.float32 for _, parameter in model.trainable())
    model.save_adapter(tmp_path / "saved")
    again = _load(two_time_folder, dtype)
    base = _jump(again)
    again.load_adapter(tmp_path / "saved")
    drawn = _jump(again)
    assert not torch.equal(drawn, base)
    if what == "duration" or dtype == torch.float32:
        assert torch.equal(drawn, _jump(model))
    else:
        # the network of a full fine-tune is stored in the dtype that it computes in
        assert float((drawn - _jump(model)).abs().mean()) < 2e-2 * float(drawn.abs().mean())


def test_the_embedder_is_a_file_of_its_own_that_the_manifest_names(saved: Path) -> None:
    manifest = read_adapter_manifest(saved / "duration")
    assert set(manifest.extra) == EMBEDDER
    assert (manifest.map.map, manifest.map.second_time.takes) == ("two-time", "duration")
    assert manifest.base.name == "tiny"
    stored = load_file(saved / "duration" / EXTRA_FILE)
    assert {name.removeprefix("transformer.") for name in stored} == EMBEDDER


def test_a_reader_that_expects_only_a_lora_is_refused(two_time_folder: Path, saved: Path) -> None:
    shapes = adapter_shapes(_load(two_time_folder).components.transformer, ["attention"], 2)
    with pytest.raises(CheckpointError, match=r"timestep_embedder2\.linear_1\.bias is unknown"):
        read_adapter_tensors(saved / "duration", shapes)


def _drop_extra(folder: Path) -> None:
    (folder / EXTRA_FILE).unlink()


def _drop_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / EXTRA_FILE)
    tensors.pop(min(tensors))
    save_file(tensors, folder / EXTRA_FILE)


def _forget_in_manifest(folder: Path) -> None:
    file = folder / "fmg_adapter.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "extra": []}))


def _name_another(folder: Path) -> None:
    file = folder / "fmg_adapter.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "extra": ["proj_out.weight"]}))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (_drop_extra, f"lacks {EXTRA_FILE}"),
        (_drop_a_tensor, "is missing"),
        (_forget_in_manifest, "is unknown"),
        (_name_another, "which the model does not have"),
    ],
)
def test_a_lost_embedder_is_an_error_and_changes_nothing(
    damage: Any, says: str, two_time_folder: Path, saved: Path, tmp_path: Path
) -> None:
    shutil.copytree(saved / "duration", tmp_path / "saved")
    damage(tmp_path / "saved")
    model = _load(two_time_folder)
    before = _jump(model)
    with pytest.raises(CheckpointError, match=says):
        model.load_adapter(tmp_path / "saved")
    assert torch.equal(_jump(model), before)


@pytest.mark.parametrize("what", ["duration", "full"])
def test_reference_is_the_base_and_old_the_last_snapshot(what: What, two_time_folder: Path) -> None:
    untouched = _load(two_time_folder)
    base, digest = _jump(untouched), untouched.base_digest()
    model = _load(two_time_folder)
    if what == "duration":
        model.attach_adapter(2, 4.0, ["attention"], 0.0, seed=0)
    model.unfreeze(what)
    with torch.no_grad():
        for _, parameter in model.trainable():
            parameter.add_(0.1)
    model.snapshot()
    first = _jump(model)
    with torch.no_grad():
        for _, parameter in model.trainable():
            parameter.add_(0.1)
    trained = _jump(model)
    assert not torch.equal(trained, first)
    assert torch.equal(_jump(model, model.policies.old), first)
    assert torch.equal(_jump(model, model.policies.reference), base)
    assert torch.equal(_jump(model), trained)
    assert model.base_digest() == digest
    with model.adapter_enabled(False):
        assert torch.equal(_jump(model), base)


def test_copies_that_were_not_requested_are_not_kept(two_time_folder: Path, tmp_path: Path) -> None:
    model = _trained(two_time_folder, "full", old=False, reference=False)
    with pytest.raises(CompositionError, match="old policy"):
        _jump(model, model.policies.old)
    with pytest.raises(CompositionError, match="no longer in memory"):
        _jump(model, model.policies.reference)
    model.save_adapter(tmp_path / "saved")
    tuned = _load(two_time_folder)
    tuned.load_adapter(tmp_path / "saved")
    with pytest.raises(CompositionError, match="not in memory"):
        _jump(tuned, tuned.policies.reference)


def test_a_full_fine_tune_is_a_component_folder_of_diffusers(two_time_folder: Path, tmp_path: Path) -> None:
    model = _trained(two_time_folder, "full", torch.bfloat16, old=False, reference=False)
    model.save_adapter(tmp_path / "saved")
    stock = FlowMapFluxTransformer2DModel.from_pretrained(
        str(tmp_path / "saved" / "transformer"), torch_dtype=torch.bfloat16
    )
    assert {x.dtype for x in stock.state_dict().values()} == {torch.bfloat16}
    for name, parameter in model.trainable():
        assert torch.equal(stock.state_dict()[name], parameter.detach().bfloat16())
    assert saved_weights.read_transformer_manifest(tmp_path / "saved").map.second_time.takes == "duration"


def test_a_full_fine_tune_is_written_in_shards(
    two_time_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saved_weights, "_SHARD", "200KB")
    model = _trained(two_time_folder, "full", old=False, reference=False)
    model.save_adapter(tmp_path / "saved")
    shards = sorted((tmp_path / "saved" / "transformer").glob("*.safetensors"))
    assert len(shards) > 1
    index = json.loads((tmp_path / "saved" / "transformer" / INDEX_FILE).read_text())
    assert index["metadata"]["total_size"] == sum(x.nbytes for shard in shards for x in load_file(shard).values())
    again = _load(two_time_folder)
    again.load_adapter(tmp_path / "saved")
    assert torch.equal(_jump(again), _jump(model))


def test_a_network_that_comes_back_changed_is_not_kept(
    two_time_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = roundtrip_check.component

    def damaged(*args: Any) -> Any:
        stock = read(*args)
        with torch.no_grad():
            stock.proj_out.bias[0] += 1e-6
        return stock

    monkeypatch.setattr(roundtrip_check, "component", damaged)
    with pytest.raises(CheckpointError, match=r"are different.*proj_out\.bias"):
        _trained(two_time_folder, "full").save_adapter(tmp_path / "runs" / "saved")
    assert list((tmp_path / "runs").iterdir()) == []


def _nan(folder: Path) -> None:
    file = next(folder.glob("transformer/*.safetensors"))
    tensors = load_file(file)
    tensors["proj_out.bias"][0] = torch.nan
    save_file(tensors, file)


def _without_a_tensor(folder: Path) -> None:
    file = next(folder.glob("transformer/*.safetensors"))
    tensors = load_file(file)
    tensors.pop("proj_out.bias")
    save_file(tensors, file)


def _truncated(folder: Path) -> None:
    file = next(folder.glob("transformer/*.safetensors"))
    file.write_bytes(file.read_bytes()[:-8])


def _other_schema(folder: Path) -> None:
    file = folder / saved_weights.TRANSFORMER_MANIFEST
    file.write_text(json.dumps({**json.loads(file.read_text()), "schema": 2}))


@pytest.mark.parametrize("damage", [_nan, _without_a_tensor, _truncated, _other_schema])
def test_a_damaged_network_is_one_clear_error_and_changes_nothing(
    damage: Any, two_time_folder: Path, saved: Path, tmp_path: Path
) -> None:
    shutil.copytree(saved / "full", tmp_path / "saved")
    damage(tmp_path / "saved")
    model = _load(two_time_folder)
    before = _jump(model)
    with pytest.raises(CheckpointError):
        model.load_adapter(tmp_path / "saved")
    assert torch.equal(_jump(model), before)


def test_what_does_not_go_together_is_refused(
    two_time_folder: Path, single_time_folder: Path, saved: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="no second-time embedder"):
        _load(single_time_folder).unfreeze("duration")
    adapted = _load(two_time_folder)
    adapted.attach_adapter(2, 4.0, ["timestep_embedder2.linear_1"], 0.0, seed=0)
    for what in ("duration", "full"):
        with pytest.raises(UsageError, match="The LoRA would adapt weights"):
            adapted.unfreeze(what)  # type: ignore[arg-type]
    model = _trained(two_time_folder, "duration")
    with pytest.raises(UsageError, match="already unfrozen"):
        model.unfreeze("duration")
    with pytest.raises(CheckpointError, match="has an adapter"):
        model.load_adapter(saved / "full")
    plain = _load(two_time_folder)
    plain.attach_adapter(2, 4.0, ["attention"], 0.0, seed=0)
    plain.save_adapter(tmp_path / "lora")
    with pytest.raises(CheckpointError, match="lacks the second-time embedder"):
        model.load_adapter(tmp_path / "lora")


def test_a_base_from_the_hub_is_identified_by_its_commit(two_time_folder: Path, tmp_path: Path) -> None:
    place = tmp_path / "models--owner--a-model" / "snapshots" / ("c" * 40)
    place.mkdir(parents=True)
    (place / "transformer").symlink_to(two_time_folder / "transformer")
    base = BaseReference.of("tiny", folder_weights(place / "transformer"))
    assert (base.repository, base.commit) == ("owner/a-model", "c" * 40)
    local = BaseReference.of("tiny", WeightFiles(two_time_folder, folder_weights(place / "transformer").files))
    assert (local.repository, local.commit) == (None, None)
    assert local.digest == base.digest
