"""`fmg export` of families whose transformer takes latents: verified, sampled without torch, swapped, in 8 bits."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fmg.core.errors import CheckpointError, UsageError
from fmg.core.json_io import sealed
from fmg.export.options import ExportOptions, ExportPrecision
from fmg.export.swap import BASE, swap_weights
from fmg.export.verify import verify
from fmg.inference.artifact import open_artifact
from fmg.inference.artifact.layout import write_manifest
from fmg.inference.artifact.manifest import MANIFEST
from fmg.inference.artifact.manifest_io import from_json, to_json
from fmg.inference.loading import load, load_target, made_from
from fmg.inference.onnxruntime import load as load_artifact
from fmg.inference.target import resolve_target
from fmg.inference.triton import TritonPythonModel
from fmg.recipe import Recipe
from tests.support import tensorrt
from tests.support.artifact import copied, exported, make_run, traced_once
from tests.support.bare_environment import ARTIFACT, BareEnvironment
from tests.support.cli import fmg
from tests.support.triton import triton_python_backend_utils as utils
from tests.support.triton.repository import read_configs
from tests.tiny_flux2 import FLUX2_CASE
from tests.tiny_sana import RESOLUTION, SEQUENCE, build_tiny_sana
from tests.tiny_sd35 import SD35_CASE
from tests.tiny_zimage import Z_IMAGE_CASE

pytestmark = [pytest.mark.slow, pytest.mark.compile]

PROMPTS = ["a red circle", "A Blue Square, left"]
FAMILIES: dict[str, Callable[[Path], dict[str, object]]] = {
    "sana-sprint": lambda folder: {
        "folder": str(build_tiny_sana(folder)),
        "resolution": RESOLUTION,
        "max_sequence_length": SEQUENCE,
    },
    SD35_CASE.model: SD35_CASE.build,
    FLUX2_CASE.model: FLUX2_CASE.build,
}

DRAW = """
import json, sys
import numpy as np
sys.modules["torch"] = None
from fmg.inference.onnxruntime import load
with load(sys.argv[1], threads=1) as generator:
    np.save("drawn.npy", generator.generate(json.loads(sys.argv[2]), seeds=[3, 4]).image_array)
"""


def recipe_of(name: str, options: dict[str, object]) -> Recipe:
    given = {f"model.{key}": value for key, value in options.items()}
    return Recipe.default(
        name,
        **{**given, "model.text_cache": False, "rewards": ["jpeg-incompressibility"], "train.dtype": "fp32"},
        **{"lora.rank": 2, "lora.alpha": 4.0, "train.device": "cpu"},
    )


@pytest.fixture(scope="module", params=FAMILIES)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp(request.param)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FMG_CACHE", str(place / "cache"))
        recipe = recipe_of(request.param, FAMILIES[request.param](place / "folder"))
        guidance = {"model.guidance": 3.0} if request.param == "sana-sprint" else {}
        make_run(place / "other", recipe.with_({"lora.rank": 3, "rollout.steps": 3, **guidance}), seed=2)
        return make_run(place / "run", recipe, seed=1)


@pytest.fixture
def cache(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache of `run`."""
    monkeypatch.setenv("FMG_CACHE", str(run.parent / "cache"))


@pytest.fixture(scope="module")
def verified(run: Path) -> dict[str, Any]:
    """What a verified export of the run prints."""
    with pytest.MonkeyPatch.context() as patch, traced_once():
        patch.setenv("FMG_CACHE", str(run.parent / "cache"))
        done = fmg("export", str(run), "--fused", "--int8", "--verify", "quick", "--json")
    assert done.code == 0, done.stderr + done.stdout
    facts: dict[str, Any] = json.loads(done.stdout)
    return facts


def test_an_export_passes_every_check(run: Path, verified: dict[str, Any]) -> None:
    parts = {"text_encoders", "transformer", "vae_decoder"}
    assert set(verified["graphs"]) == {*parts, "sampler", "transformer_int8"}
    checks = {check["name"]: check for check in verified["verify"]["checks"]}
    assert all(check["passed"] for check in checks.values())
    graphs = [
        f"{kind}/{graph}" for kind in ("weights", "precision", "tensors") for graph in (*parts, "transformer_int8")
    ]
    counted = checks["precision/transformer_int8"]["values"]
    assert counted["weights_int8"] > counted["weights_fp32"]
    assert checks.keys() >= {
        "files",
        "facts",
        "drawing",
        "images",
        "images/fused",
        "images/int8",
        "weights/sampler",
        *graphs,
    }
    assert checks["images/fused"]["values"]["max_abs"] <= 1e-5
    manifest = open_artifact(run / "artifact").manifest
    assert (manifest.schema, manifest.adapter is not None) == (2, True)
    # the adapter reached the weights
    assert checks["tensors/transformer"]["values"]["relative_l2"] <= 1e-5


@pytest.mark.usefixtures("cache")
def test_an_export_in_half_precision_passes_every_check(run: Path, tmp_path: Path) -> None:
    """FLUX.2 has stored tables of positions, SD3.5 positions of patches, SANA attention without a softmax, all fp32."""
    precision: ExportPrecision = "bf16" if "sana" in run.parent.name else "fp16"
    artifact = exported(run, tmp_path / "artifact", ExportOptions(precision=precision))
    report = verify(artifact, run, device="cpu", num=2)
    assert report.passed, [check for check in report.checks if not check.passed]
    kinds = {name: graph.precision for name, graph in artifact.manifest.graphs.items()}
    assert kinds == {"text_encoders": "fp32", "transformer": precision, "vae_decoder": "fp32"}


@pytest.mark.filterwarnings("ignore:.*the model reads the first:fmg.core.errors.FmgWarning")
@pytest.mark.usefixtures("cache")
def test_an_export_in_fp8_is_calibrated_and_passes_every_check(run: Path, tmp_path: Path) -> None:
    artifact = exported(run, tmp_path / "artifact", ExportOptions(precision="fp8"))
    report = verify(artifact, run, device="cpu", num=2)
    assert report.passed, [check for check in report.checks if not check.passed]
    checks = {check.name: check for check in report.checks}
    assert checks["calibration/transformer"].values["images"] == 32
    assert checks["precision/transformer"].values["products_fp8"] >= 16
    assert "fp8 was simulated" in checks["images"].note
    # torch computes what the simulation does only up to rounding
    assert checks["tensors/transformer"].values["relative_l2"] > 1e-4
    for words, says in (
        (("generate", "a red circle", "--from"), "is fp8, which ONNX Runtime does not compute"),
        (("export", "--triton", str(tmp_path / "models")), "fp8 runs only in TensorRT engines"),
        (("export", str(run), "--swap-weights"), "is in fp8, which is calibrated for its present weights"),
    ):
        done = fmg(*words, str(artifact.folder))
        assert done.code != 0
        assert says in " ".join(done.stderr.split()), done.stderr


@pytest.mark.usefixtures("cache", "verified")
def test_another_run_swaps_in_as_a_fresh_export_of_it(run: Path, tmp_path: Path) -> None:
    other, sana = run.parent / "other", "sana" in run.parent.name
    folder = copied(open_artifact(run / "artifact"), tmp_path / "artifact")
    first = {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}
    fresh = exported(other, tmp_path / "fresh", ExportOptions(int8=True, fused=True))
    swapped = swap_weights(folder, other)
    assert swapped.manifest == fresh.manifest
    assert all((folder / name).read_bytes() == fresh.path(name).read_bytes() for name in fresh.manifest.files)
    assert fresh.path("transformer.safetensors").read_bytes() != first["transformer.safetensors"]
    base = swap_weights(folder, BASE).manifest
    assert (base.adapter, base.base.weights) == (None, None)
    found, stated = resolve_target(run), made_from(open_artifact(folder))
    assert (stated.adapter, stated.recipe.model.config.assets()) == (None, found.recipe.model.config.assets())
    assert verify(folder, device="cpu", num=2).passed
    swap_weights(folder, run)
    assert {path.name: path.read_bytes() for path in folder.glob("*.safetensors")} == first

    found = resolve_target(other)
    longer = replace(found, recipe=found.recipe.with_({"model.max_sequence_length": 100}))
    with pytest.raises(UsageError, match="sampled with max_sequence_length 100"):
        swap_weights(folder, longer)
    # as earlier versions wrote it
    stored = open_artifact(folder).manifest
    write_manifest(folder, replace(stored, model=replace(stored.model, options=None)))
    with pytest.raises(UsageError, match="exported by an earlier version of fmg"):
        swap_weights(folder, other)
    options = {**(stored.model.options or {}), **({"guidance": 4.5} if sana else {})}
    write_manifest(folder, replace(stored, model=replace(stored.model, options=options)))
    assert swap_weights(folder, other).manifest.sampling == fresh.manifest.sampling
    assert verify(folder, other, device="cpu", num=2).passed


@pytest.mark.filterwarnings("ignore:.*the model reads the first:fmg.core.errors.FmgWarning")
@pytest.mark.usefixtures("verified")
def test_engines_generate_the_same_images(run: Path, tmp_path: Path) -> None:
    folder = copied(open_artifact(run / "artifact"), tmp_path / "artifact")
    with tensorrt.stand_in(cache=tmp_path / "cache"):
        built, _ = tensorrt.build(folder)
        with load(open_artifact(folder), backend="tensorrt") as generator:
            images = generator.generate(PROMPTS, seeds=[3, 4]).image_array
        with pytest.raises(UsageError, match="have one size"):
            tensorrt.build(folder, resolutions=(512,))
    assert [engine.record.graph for engine in built] == ["text_encoders", "transformer", "vae_decoder"]
    with load_artifact(folder, threads=1) as generator:
        assert float(np.abs(generator.generate(PROMPTS, seeds=[3, 4]).image_array - images).max()) <= 1e-5


def test_the_images_without_torch_are_those_of_the_run(run: Path, verified: dict[str, Any], tmp_path: Path) -> None:
    bare = BareEnvironment.make(tmp_path / "venv", ARTIFACT)
    done = bare.run("-c", DRAW, str(run / "artifact"), json.dumps(PROMPTS), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    with load_target(resolve_target(run), device="cpu") as torchs:
        images = torchs.generate(PROMPTS, seeds=[3, 4]).image_array
    assert float(np.abs(np.load(tmp_path / "drawn.npy") - images).max()) <= 1e-4


@pytest.mark.filterwarnings("ignore:.*the model reads the first:fmg.core.errors.FmgWarning")
def test_a_repository_for_triton_generates_the_same_images(
    run: Path, verified: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "models"
    done = fmg("export", str(run / "artifact"), "--triton", str(out), "--triton-name", "served")
    assert done.code == 0, done.stderr
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", utils)
    server = utils.Server(out, read_configs(out))
    server.warm_up()
    asked = [[{"prompt": prompt, "seed": 3 + n}] for n, prompt in enumerate(PROMPTS)]
    answers = server.started(TritonPythonModel(), "served").execute([utils.asked(rows) for rows in asked])
    made = np.concatenate([answer.output_tensors()[0].as_numpy() for answer in answers])
    with load_artifact(run / "artifact", threads=1) as generator:
        images = generator.generate(PROMPTS, seeds=[3, 4]).image_array
    assert float(np.abs(made.transpose(0, 3, 1, 2) / 255 - images).max()) <= 1 / 255


def test_a_changed_manifest_is_refused(run: Path, verified: dict[str, Any]) -> None:
    file = run / "artifact" / MANIFEST
    text = file.read_text()
    assert to_json(from_json(text, file)) == text
    changes: list[tuple[Callable[[dict[str, Any]], object], str]] = [
        (lambda raw: raw["graphs"].pop("text_encoders"), "graphs.text_encoders is missing"),
        (lambda raw: raw["tokenizers"].clear(), "tokenizers is empty"),
        (lambda raw: raw["tokenizers"]["tokenizer"].pop("prefix"), "tokenizers.tokenizer."),
        (lambda raw: raw["graphs"]["text_encoders"]["outputs"].pop(), "which the sampling does not use"),
        (lambda raw: raw["graphs"]["transformer"]["inputs"].pop(0), "graphs.transformer.inputs lacks 'latents'"),
        (
            lambda raw: raw["graphs"]["vae_decoder"]["inputs"][0]["shape"].pop(),
            "graphs.vae_decoder.inputs has 'latents'",
        ),
        (lambda raw: raw.update(schema=1), "graphs.text_encoder is missing"),
    ]
    for change, says in changes:
        raw = {key: value for key, value in json.loads(text).items() if key != "sha256"}
        change(raw)
        with pytest.raises(CheckpointError) as caught:
            from_json(json.dumps(sealed(raw)), file)
        assert says in str(caught.value), (says, str(caught.value))


def test_what_is_not_written_is_refused_in_one_line(run: Path, verified: dict[str, Any], tmp_path: Path) -> None:
    new = str(tmp_path / "new")
    for words, says in (
        (("export", str(run), new, "--resolutions", "512"), "have one size"),
        (("export", str(run), new, "--diffusers"), "the FLUX.1 family"),
    ):
        done = fmg(*words)
        assert done.code != 0
        assert says in " ".join(done.stderr.split()), done.stderr
        assert "Traceback" not in done.stderr
    assert not (tmp_path / "new").exists()


def test_a_network_that_cannot_be_traced_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FMG_CACHE", str(tmp_path / "cache"))
    options = Z_IMAGE_CASE.build(tmp_path / "folder")
    made = make_run(tmp_path / "run", recipe_of(Z_IMAGE_CASE.model, options), seed=1)
    done = fmg("export", str(made), str(tmp_path / "artifact"))
    assert done.code != 0
    assert "The network of 'z-image-turbo' cannot be traced as a graph" in " ".join(done.stderr.split())
