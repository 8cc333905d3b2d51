from __future__ import annotations

import json
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from fmg.core.errors import CheckpointError, UsageError
from fmg.export.artifact import export_artifact
from fmg.export.int8 import BORDERS
from fmg.export.options import ExportOptions
from fmg.inference.artifact import Artifact, io_spec, open_artifact
from fmg.inference.artifact.manifest import TEXT_ENCODER, TEXT_ENCODER_2, TRANSFORMER, TRANSFORMER_INT8, VAE_DECODER
from fmg.inference.target import load_model, resolve_target
from fmg.models.flux.latents import image_ids
from fmg.models.flux.model import FluxModel
from tests.support.run_files import change_recipe

pytestmark = [pytest.mark.slow, pytest.mark.compile]

ARTIFACTS = {"shapes_run": "shapes_artifact", "student_run": "student_artifact"}
# batch, latent height, latent width, text tokens: none that the tracer saw
SHAPES = [(1, 8, 8, 16), (3, 4, 10, 7), (4, 12, 6, 1), (5, 2, 2, 40)]


@pytest.fixture(scope="module", params=ARTIFACTS)
def pair(request: pytest.FixtureRequest) -> tuple[Artifact, FluxModel]:
    artifact: Artifact = request.getfixturevalue(ARTIFACTS[request.param])
    run: Path = request.getfixturevalue(request.param)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FMG_CACHE", str(run.parent / "cache"))
        model: Any = load_model(resolve_target(run), device="cpu")
    return artifact, model


def session(artifact: Artifact, graph: str) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(str(artifact.onnx(graph)), providers=["CPUExecutionProvider"])


def difference(given: np.ndarray, wanted: Tensor) -> float:
    """Relative L2 distance."""
    reference = wanted.float().numpy()
    return float(np.linalg.norm(given - reference) / np.linalg.norm(reference))


def transformer_feed(model: FluxModel, shape: tuple[int, int, int, int]) -> dict[str, Tensor]:
    batch, height, width, text = shape
    config = model.components.transformer.config
    generator = torch.Generator().manual_seed(sum(shape))
    ids = torch.from_numpy(image_ids(height, width))

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    times = torch.linspace(1, 0.05, batch)
    feed = {
        io_spec.HIDDEN_STATES: normal(batch, len(ids), config.in_channels),
        io_spec.ENCODER_HIDDEN_STATES: normal(batch, text, config.joint_attention_dim),
        io_spec.POOLED_PROJECTIONS: normal(batch, config.pooled_projection_dim),
        io_spec.TIMESTEP: times,
        io_spec.IMG_IDS: ids,
        io_spec.TXT_IDS: torch.zeros(text, 3),
    }
    if config.second_time != "none":
        feed[io_spec.SECOND] = times * torch.linspace(0, 1, batch)
    if config.guidance_embeds:
        feed[io_spec.GUIDANCE] = torch.full((batch,), 3.5)
    return feed


@torch.no_grad()
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_transformer_of_the_artifact_is_the_transformer_with_its_adapter(
    pair: tuple[Artifact, FluxModel], shape: tuple[int, int, int, int]
) -> None:
    artifact, model = pair
    feed = transformer_feed(model, shape)
    wanted = model.components.transformer(**feed)[0]
    given = session(artifact, TRANSFORMER).run(None, {name: x.numpy() for name, x in feed.items()})[0]
    assert difference(given, wanted) <= 1e-5
    with model.adapter_enabled(False):
        assert difference(given, model.components.transformer(**feed)[0]) > 1e-3


@torch.no_grad()
def test_the_second_time_and_the_guidance_are_inputs_that_matter(pair: tuple[Artifact, FluxModel]) -> None:
    artifact, model = pair
    feed = {name: x.numpy() for name, x in transformer_feed(model, SHAPES[1]).items()}
    run = session(artifact, TRANSFORMER)
    name = io_spec.SECOND if io_spec.SECOND in feed else io_spec.GUIDANCE
    changed = {**feed, name: feed[name] * 0.5}
    assert not np.allclose(run.run(None, feed)[0], run.run(None, changed)[0], rtol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 3, 5])
def test_text_encoders_of_the_artifact_are_those_of_the_model(pair: tuple[Artifact, FluxModel], batch: int) -> None:
    artifact, model = pair
    text = model.components.text
    generator = torch.Generator().manual_seed(batch)
    facts = artifact.manifest.tokenizers[TEXT_ENCODER]
    ids = torch.randint(0, 200, (batch, facts.length), generator=generator)
    # the state that CLIP gives is that of the first end-of-text token
    ids[:, 3 + batch :] = text.text_encoder.config.eos_token_id
    given = session(artifact, TEXT_ENCODER).run(None, {io_spec.INPUT_IDS: ids.numpy()})[0]
    assert difference(given, text.text_encoder(ids).pooler_output) <= 1e-5
    for length in (1, 7, 16):
        ids = torch.randint(0, 100, (batch, length), generator=generator)
        given = session(artifact, TEXT_ENCODER_2).run(None, {io_spec.INPUT_IDS: ids.numpy()})[0]
        assert difference(given, text.text_encoder_2(ids)[0]) <= 1e-5


@torch.no_grad()
@pytest.mark.parametrize(("batch", "height", "width"), [(1, 8, 8), (3, 4, 10), (2, 2, 6), (1, 12, 12)])
def test_decoder_of_the_artifact_equals_that_of_the_model(
    pair: tuple[Artifact, FluxModel], batch: int, height: int, width: int
) -> None:
    artifact, model = pair
    channels = model.latent_shape[0]
    latents = torch.randn(batch, channels, height, width, generator=torch.Generator().manual_seed(batch))
    given = session(artifact, VAE_DECODER).run(None, {io_spec.LATENTS: latents.numpy()})[0]
    assert np.abs(given - model.decode(latents).numpy()).max() <= 1e-4
    scale = artifact.manifest.sampling.latent_scale
    assert given.shape == (batch, 3, height * scale, width * scale)


@torch.no_grad()
def test_weights_with_eight_bits_stay_near(shapes_artifact: Artifact, shapes_run: Path) -> None:
    model: Any = load_model(resolve_target(shapes_run), device="cpu")
    cond = model.encode(["a red circle left", "a blue square right", "a green triangle top"])
    feed = transformer_feed(model, (3, 8, 8, 16))
    feed |= {io_spec.ENCODER_HIDDEN_STATES: cond.tensors["tokens"], io_spec.POOLED_PROJECTIONS: cond.tensors["pooled"]}
    given = session(shapes_artifact, TRANSFORMER_INT8).run(None, {name: x.numpy() for name, x in feed.items()})[0]
    assert 0 < difference(given, model.components.transformer(**feed)[0]) <= 3e-2
    weights = load_file(shapes_artifact.path(shapes_artifact.graph(TRANSFORMER_INT8).weights))
    matrices = {name: x.dtype for name, x in weights.items() if x.dim() == 2 and x.numel() > 4096}
    assert matrices
    assert all(dtype == torch.int8 for name, dtype in matrices.items() if not name.startswith(BORDERS))


def test_every_graph_has_the_stated_inputs_and_outputs_and_points_into_its_weights(
    pair: tuple[Artifact, FluxModel],
) -> None:
    artifact, model = pair
    names = model.components.transformer.state_dict()
    for name, graph in artifact.manifest.graphs.items():
        stored = onnx.load(str(artifact.onnx(name)), load_external_data=False)
        for values, specs in ((stored.graph.input, graph.inputs), (stored.graph.output, graph.outputs)):
            stated = [
                (value.name, tuple(dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim))
                for value in values
            ]
            assert stated == [(spec.name, spec.shape) for spec in specs]
        outside = [x for x in stored.graph.initializer if x.external_data]
        assert {entry.value for x in outside for entry in x.external_data if entry.key == "location"} == {graph.weights}
        assert {entry.version for entry in stored.opset_import if entry.domain == ""} == {artifact.manifest.opset}
        if name == TRANSFORMER:
            plain = {n.replace(".base_layer.", ".") for n in names if ".lora_" not in n}
            assert {x.name for x in outside} == plain
            assert set(load_file(artifact.path(graph.weights))) == plain
        if name != TRANSFORMER_INT8:
            inside = [x for x in stored.graph.initializer if not x.external_data]
            # the largest constant is CLIP's causal mask
            assert all(np.prod(x.dims) <= 77 * 77 for x in inside), "a weight was copied into the graph"


def test_manifest_says_what_was_exported(
    shapes_artifact: Artifact, shapes_run: Path, student_artifact: Artifact
) -> None:
    manifest = open_artifact(shapes_artifact.folder).manifest
    assert manifest == shapes_artifact.manifest
    assert manifest.model.name == "meanflow-shapes"
    assert manifest.adapter is not None
    assert (manifest.adapter.rank, manifest.adapter.alpha, manifest.adapter.scale) == (4, 8.0, 2.0)
    assert manifest.adapter.run == str(shapes_run)
    assert manifest.base.dtypes == ("float16",)
    assert manifest.sampling.resolutions == (32, 48)
    image = manifest.axes["image"]
    assert (image.minimum, image.optimum, image.maximum) == (16, 16, 36)
    assert manifest.rewards[0]["name"] == "shapes"
    text = shapes_artifact.path("transformer.onnx").read_bytes()
    assert b"site-packages" not in text
    assert student_artifact.manifest.sampling.map == "single-time"
    assert student_artifact.manifest.sampling.guidance == 3.5
    assert student_artifact.manifest.sampling.time_scale == 1.0
    assert student_artifact.manifest.tokenizers[TEXT_ENCODER].length == 77


def test_wrong_options_and_a_full_disk_leave_nothing(
    shapes_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "exports" / "artifact"
    with pytest.raises(UsageError, match="resolution 30 is not a multiple of 8"):
        export_artifact(shapes_run, out, ExportOptions(resolutions=(30,)))
    with pytest.raises(UsageError, match="8-bit weights are for a CPU"):
        export_artifact(shapes_run, out, ExportOptions(precision="bf16", int8=True))
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("fmg.core.files.shutil.disk_usage", lambda folder: usage(1, 1, 10**6))
    with pytest.raises(UsageError, match=r"The export takes about 0\.1 GB"):
        export_artifact(shapes_run, out)
    assert list(tmp_path.iterdir()) == []


def test_an_export_that_fails_on_the_way_leaves_nothing(
    shapes_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fmg.export.artifact.trace", fail)
    with pytest.raises(OSError, match="No space left"):
        export_artifact(shapes_run, tmp_path / "exports" / "artifact")
    assert list((tmp_path / "exports").iterdir()) == []


def test_a_base_that_moved_is_refused(student_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.tiny_flux import publish_student

    monkeypatch.setenv("FMG_CACHE", str(tmp_path / "cache"))
    recipe = resolve_target(student_run).recipe
    other = publish_student(tmp_path / "other.pt", "none", seed=9)
    changed = recipe.with_({"model.student": str(other)})
    copy = tmp_path / "run"
    import shutil

    shutil.copytree(student_run, copy)
    change_recipe(copy, changed)
    with pytest.raises(CheckpointError, match="trained on different weights of 'scm-flux'"):
        export_artifact(copy, tmp_path / "artifact")
    assert json.loads((copy / "run.json").read_text())["state"] == "finished"
