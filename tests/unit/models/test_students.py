"""Students in the form in which they are published, beside a stock teacher's folder."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, cast

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fmg.core.errors import CheckpointError, FmgWarning, MissingDependencyError, StorageError, UsageError
from fmg.inference.torch_backend import device_for
from fmg.models.conventions import Takes
from fmg.models.flux.model import FluxModel
from fmg.models.published import PublishedSource
from fmg.recipe import Recipe
from fmg.registry import models
from tests.tiny_flux import RESOLUTION, SEQUENCE, build_tiny_flux, build_tiny_teacher, publish_student, student_tensors

CPU = torch.device("cpu")
NAMES: dict[str, Literal["none", "duration"]] = {"meanflow-flux": "duration", "scm-flux": "none"}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FMG_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_teacher(tmp_path_factory.mktemp("teacher") / "flux")


def source(name: str, student: Path, teacher: Path, **options: object) -> PublishedSource:
    given = {"student": str(student), "teacher": str(teacher), "time_scale": 1.0, "resolution": RESOLUTION}
    return cast(PublishedSource, models.build(name, {**given, "max_sequence_length": SEQUENCE, **options}))


def load(name: str, student: Path, teacher: Path, **options: object) -> FluxModel:
    return source(name, student, teacher, **options).load(CPU, torch.float32)


@torch.no_grad()
def jump(model: FluxModel) -> Tensor:
    x = torch.randn(2, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([1.0, 0.7])
    return model.flow_map.jump(x, t, torch.zeros(2), model.encode(["a red circle", "left"]))


@pytest.mark.parametrize("name", NAMES)
def test_a_published_student_has_its_weights_and_its_teachers_parts(name: str, teacher: Path, tmp_path: Path) -> None:
    file = publish_student(tmp_path / "student.pt", NAMES[name])
    model = load(name, file, teacher)
    transformer = model.components.transformer
    tensors = student_tensors(NAMES[name])
    assert transformer.state_dict().keys() == tensors.keys()
    assert all(torch.equal(x, tensors[key]) for key, x in transformer.state_dict().items())
    assert transformer.config.time_scale == 1.0
    assert model.spec.anchors == ("any" if name == "meanflow-flux" else "endpoint")
    vae = load_file(teacher / "vae" / "diffusion_pytorch_model.safetensors")
    assert torch.equal(model.components.vae.decoder.conv_in.weight, vae["decoder.conv_in.weight"])
    assert bool(jump(model).isfinite().all())


def test_a_torch_file_is_converted_once_under_the_hash_of_its_content(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = publish_student(tmp_path / "student.pt", "none")
    first = load("scm-flux", file, teacher)
    (folder,) = (tmp_path / "cache" / "models").iterdir()
    assert not any("logvar" in key for shard in folder.glob("*.safetensors") for key in load_file(shard))
    copied = tmp_path / "elsewhere.pt"
    copied.write_bytes(file.read_bytes())

    def read(*_: object, **__: object) -> None:
        pytest.fail("a torch file was read again")

    monkeypatch.setattr("torch.load", read)
    assert torch.equal(jump(load("scm-flux", copied, teacher)), jump(first))


@pytest.mark.parametrize("form", ["safetensors", "folder", "sharded folder"])
def test_other_forms_of_the_same_student_are_the_same_model(form: str, teacher: Path, tmp_path: Path) -> None:
    expected = load("meanflow-flux", publish_student(tmp_path / "student.pt", "duration"), teacher)
    if form == "safetensors":
        student = tmp_path / "student.safetensors"
        save_file(student_tensors("duration"), student)
    else:
        student = tmp_path / "student"
        size = "60KB" if form == "sharded folder" else "10GB"
        expected.components.transformer.save_pretrained(str(student), max_shard_size=size)
        assert (len(list(student.glob("*.safetensors"))) > 1) == (form == "sharded folder")
    model = load("meanflow-flux", student, teacher)
    assert torch.equal(jump(model), jump(expected))
    for each in (model, expected):
        each.attach_adapter(2, 4.0, ["attention"], 0.0, seed=0)
    expected.save_adapter(tmp_path / "adapter")
    model.load_adapter(tmp_path / "adapter")


def test_weights_are_shards_of_bounded_size(teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fmg.models.common.converted._SHARD_BYTES", 200_000)
    monkeypatch.setattr("fmg.models.common.weights.WINDOW_BYTES", 50_000)
    model = load("scm-flux", publish_student(tmp_path / "student.pt", "none"), teacher)
    shards = list((tmp_path / "cache" / "models").glob("*/*.safetensors"))
    assert len(shards) > 2
    tensors = student_tensors("none")
    assert all(torch.equal(x, tensors[key]) for key, x in model.components.transformer.state_dict().items())


class Bomb:
    """Unpickling it would create a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return open, (str(self.target), "w")


def _truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def _edit(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def apply(file: Path) -> None:
        tensors = torch.load(file, weights_only=True)["module"]
        change(tensors)
        torch.save({"module": tensors}, file)

    return apply


def _without_second(tensors: dict[str, Tensor]) -> None:
    for name in [name for name in tensors if name.startswith("timestep_embedder2.")]:
        del tensors[name]


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no file": (Path.unlink, "there is no file or folder"),
    "wrong file": (lambda f: f.write_text("hello"), "is not a torch file"),
    "a pickle of its own": (
        lambda f: f.write_bytes(pickle.dumps({"a": print}, 4)),
        "is not a checkpoint of plain tensors",
    ),
    "empty": (lambda f: f.write_bytes(b""), "is truncated"),
    "truncated": (_truncate, "is truncated"),
    "no module": (lambda f: torch.save({"module": 3}, f), "no mapping of names to tensors under 'module'"),
    "a list": (lambda f: torch.save([torch.zeros(1)], f), "no mapping of names to tensors"),
    "code": (lambda f: torch.save({"module": Bomb(f.parent / "ran")}, f), "can run code"),
    "missing embedder": (_edit(_without_second), "missing keys: timestep_embedder2.*'scm-flux'"),
    "missing key": (_edit(lambda t: t.pop("proj_out.bias")), "missing keys: proj_out.bias"),
    "extra key": (_edit(lambda t: t.update(extra=torch.zeros(1))), "unexpected keys: extra"),
    "training head in part": (_edit(lambda t: t.update(logvar=torch.zeros(1))), "unexpected keys: logvar"),
    "wrong shape": (_edit(lambda t: t.update({"proj_out.bias": torch.zeros(3)})), r"proj_out.bias has shape \(3,\)"),
    "teacher of another size": (
        _edit(lambda t: t.update({n: x[:, :4] for n, x in t.items() if n == "context_embedder.weight"})),
        "context_embedder.weight has shape",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_student_is_one_clear_error(damage: str, teacher: Path, tmp_path: Path) -> None:
    file = publish_student(tmp_path / "student.pt", "duration")
    apply, expected = DAMAGES[damage]
    apply(file)
    with pytest.raises(CheckpointError, match=expected) as caught:
        load("meanflow-flux", file, teacher)
    assert len(str(caught.value).splitlines()) == 1
    assert not (tmp_path / "ran").exists(), "code of the checkpoint ran"
    assert not list((tmp_path / "cache").glob("models/*")), "a bad file was kept"


def test_a_two_time_student_is_not_a_single_time_one(teacher: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"unexpected keys: timestep_embedder2.*'meanflow-flux'"):
        load("scm-flux", publish_student(tmp_path / "student.pt", "duration"), teacher)


def test_a_teacher_without_its_parts_is_named(teacher: Path, tmp_path: Path) -> None:
    student = publish_student(tmp_path / "student.pt", "none")
    (tmp_path / "half" / "vae").mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"teacher, but .* lacks vae/config.json"):
        load("scm-flux", student, tmp_path / "half")


def test_the_time_scale_has_no_default() -> None:
    with pytest.raises(UsageError, match="needs the option 'time_scale'"):
        models.config("meanflow-flux", {"student": "a.pt", "teacher": "b"})


def test_a_wrong_time_scale_is_doubted(teacher: Path, tmp_path: Path) -> None:
    student = publish_student(tmp_path / "student.pt", "none")
    with pytest.warns(FmgWarning, match="set model.time_scale to 1$"):
        load("scm-flux", student, teacher, time_scale=1000.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load("scm-flux", student, teacher)


def test_what_has_not_been_fetched_is_one_line_with_the_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    config = Recipe.default("scm-flux").model.config
    with pytest.raises(MissingDependencyError, match=r"has not been fetched\. Fetch it with `fmg fetch scm-flux`"):
        models.build_config("scm-flux", config).load(CPU, torch.float32)


def test_a_full_size_model_asks_for_a_gpu_and_a_tiny_one_does_not(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    large = Recipe.default("meanflow-flux").model.config.spec()
    with pytest.raises(UsageError, match=r"needs a GPU with about 23 GB.*fmg fetch meanflow-flux"):
        device_for("auto", "meanflow-flux", large)
    assert device_for("cpu", "meanflow-flux", large) == CPU
    tiny = source("meanflow-flux", tmp_path / "student.pt", teacher).spec
    assert device_for("auto", "meanflow-flux", tiny) == CPU


def test_options_reach_the_network(teacher: Path, tmp_path: Path) -> None:
    file = publish_student(tmp_path / "student.pt", "duration")
    plain = load("meanflow-flux", file, teacher, gradient_checkpointing=False, guidance=4.5)
    checked = load("meanflow-flux", file, teacher, text_device="model")
    assert not plain.components.transformer.gradient_checkpointing
    assert checked.components.transformer.gradient_checkpointing
    assert not torch.allclose(jump(plain), jump(checked))
    with pytest.raises(MissingDependencyError, match="The attention backend 'sage' cannot be used"):
        load("meanflow-flux", file, teacher, attention="sage")


def test_offloaded_encoders_go_back_to_where_they_were(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load("meanflow-flux", publish_student(tmp_path / "student.pt", "duration"), teacher)
    moves: list[object] = []
    encoder: Any = model.components.text.text_encoder_2
    monkeypatch.setattr(type(encoder), "to", lambda self, device: moves.append(device))
    model.encode(["a", "b"])
    assert moves == [CPU, CPU]
    model.encode(["b"])
    assert len(moves) == 2, "an encoder moved although every embedding was there"


@pytest.mark.parametrize("second_time", ["none", "duration", "target"])
def test_a_users_folder_is_read_by_the_stated_conventions(second_time: Takes, tmp_path: Path) -> None:
    folder = build_tiny_flux(tmp_path / "flux", second_time=second_time, time_scale=1.0)
    options = {
        "folder": str(folder),
        "map": "single-time" if second_time == "none" else "two-time",
        "second_time": second_time,
        "time_scale": 1.0,
        "guidance": None,
        "resolution": RESOLUTION,
        "max_sequence_length": SEQUENCE,
    }
    model = cast(FluxModel, models.build("flux-fewstep", options).load(CPU, torch.float32))
    assert torch.equal(jump(model), jump(FluxModel.from_folder(folder, CPU, torch.float32, name="tiny")))
    with pytest.raises(CheckpointError, match=r"says time_scale 1\.0"):
        models.build("flux-fewstep", {**options, "time_scale": 1000.0}).load(CPU, torch.float32)
    with pytest.raises(UsageError, match="cannot have second_time"):
        models.build("flux-fewstep", {**options, "second_time": "none" if second_time != "none" else "target"})


@pytest.mark.parametrize("name", NAMES)
def test_a_tensor_has_one_name_in_checkpoint_network_and_adapter(name: str, teacher: Path, tmp_path: Path) -> None:
    model = load(name, publish_student(tmp_path / "student.pt", NAMES[name]), teacher)
    published = student_tensors(NAMES[name])
    model.attach_adapter(2, 4.0, ["attention-mlp"], 0.0, seed=0)
    adapted = {key.rpartition(".lora_")[0] for key, _ in model.trainable()}
    assert "transformer_blocks.0.attn.to_q" in adapted
    assert "single_transformer_blocks.1.proj_mlp" in adapted
    assert all(f"{module}.weight" in published for module in adapted)
    model.save_adapter(tmp_path / "adapter")
    stored = load_file(tmp_path / "adapter" / "pytorch_lora_weights.safetensors")
    alphas = {f"transformer.{module}.alpha" for module in adapted}
    assert set(stored) == alphas | {f"transformer.{key}" for key, _ in model.trainable()}
    peft = load_file(tmp_path / "adapter" / "peft" / "adapter_model.safetensors")
    assert set(peft) == {f"base_model.model.{key}" for key, _ in model.trainable()}
    # the base under the adapter keeps its published names, by which a saved adapter recognises it
    base = {key.replace(".base_layer.", ".") for key in model.components.transformer.state_dict() if "lora_" not in key}
    assert base == set(published)


def test_a_cache_that_cannot_be_written_is_named(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = publish_student(tmp_path / "student.pt", "duration")
    # a file where the folder should be: permissions do not stop root
    (tmp_path / "none").touch()
    monkeypatch.setenv("FMG_CACHE", str(tmp_path / "none"))
    with pytest.raises(StorageError, match=r"The cache .*/none cannot be written \(.*set FMG_CACHE"):
        load("meanflow-flux", file, teacher)
