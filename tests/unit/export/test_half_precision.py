"""Exports in fp16 and bf16 pass verification, and anything else in fp32 than what the list allows is named."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import NodeProto, TensorProto, helper
from safetensors.torch import load_file

from fmg.core.errors import CheckpointError, UsageError
from fmg.core.events import ignore
from fmg.data.prompt_sets import load_prompts
from fmg.export.calibration import CALIBRATION, IMAGES, Calibration, calibration_prompts, other_calibration
from fmg.export.fp8 import other_rounding, stored_scales
from fmg.export.options import ExportOptions, ExportPrecision
from fmg.export.precision_report import STAYS_FP32, module_of, precision_of, precision_of_file
from fmg.export.source import find_source
from fmg.export.swap import swap_weights
from fmg.export.verify import IN_FP32, IN_SIMULATED_FP8, verify
from fmg.inference.artifact import Artifact
from fmg.inference.onnxruntime import OnnxRuntime, PrecisionError
from fmg.inference.target import Target, load_model
from fmg.recipe import Recipe
from tests.support.artifact import copied, exported
from tests.tiny_flux import RESOLUTION, SEQUENCE, build_tiny_flux
from tests.tiny_sana import build_tiny_sana

pytestmark = [pytest.mark.slow, pytest.mark.compile]

EMBEDDED = ("meanflow-shapes", "scm-shapes", "meanflow-text")


def recipe_of(model: str, folder: Path) -> Recipe:
    """The recipe of an embedded model, or of a tiny FLUX folder, made in `folder`."""
    if model in EMBEDDED:
        return Recipe.default(model=model)
    prompts = folder / "prompts.txt"
    prompts.write_text("a red circle\na blue square\n", encoding="utf-8")
    options = {
        "eval.prompts": str(prompts),
        "model.folder": str(build_tiny_flux(folder / "flux", guidance_embeds=True, time_scale=1.0)),
        "model.time_scale": 1.0,
        "model.map": "two-time",
        "model.second_time": "duration",
        "model.guidance": 3.5,
        "model.resolution": RESOLUTION,
        "model.max_sequence_length": SEQUENCE,
        "model.text_cache": False,
        "rewards": ["jpeg-incompressibility"],
    }
    return Recipe.default("flux-fewstep", **options)


@pytest.mark.parametrize(
    ("model", "precision"),
    [*((model, precision) for model in (*EMBEDDED, "flux") for precision in ("fp16", "bf16")), ("flux", "fp8")],
)
def test_half_precision_verifies(model: str, precision: ExportPrecision, tmp_path: Path) -> None:
    target = Target(model, recipe_of(model, tmp_path), None)
    artifact = exported(target, tmp_path / "artifact", ExportOptions(precision=precision))
    report = verify(artifact, target, device="cpu", num=2)
    assert report.passed, [check for check in report.checks if not check.passed]
    checks = {check.name: check for check in report.checks}
    counted = checks["precision/transformer"].values
    assert counted.keys() >= {f"weights_{precision}", f"products_{precision}", "others_fp32"}
    assert not counted.keys() & {"weights_fp32", "products_fp32"}
    told = {"bf16": IN_FP32, "fp8": IN_SIMULATED_FP8}.get(precision, "nothing")
    ran = {name for name, check in checks.items() if check.note == told}
    wanted = {name for name in checks if re.match("drawing|tensors|images", name)}
    assert ran == (set() if precision == "fp16" else wanted)


@pytest.fixture(scope="module")
def fp8(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """An fp8 artifact, whose graphs the tests above have traced in bf16. Do not change it: copy it."""
    folder = tmp_path_factory.mktemp("fp8")
    return exported("meanflow-shapes", folder / "artifact", ExportOptions(precision="fp8"))


def test_fp8_verifies(fp8: Artifact) -> None:
    report = verify(fp8, device="cpu", num=2)
    assert report.passed, [check for check in report.checks if not check.passed]
    checks = {check.name: check for check in report.checks}
    assert checks["images"].note == checks["tensors/transformer"].note == IN_SIMULATED_FP8
    counted = checks["precision/transformer"].values
    # one block with two streams has 12 linear layers, four with one stream have 5 each
    assert (counted["products_fp8"], counted.keys() & {"weights_fp32", "products_fp32"}) == (32, set())
    # 16 tokens of an image and 16 of its prompt pass 5 blocks of 12 square matrices of 128 channels
    operations = precision_of(fp8, "transformer").operations
    assert operations["fp8"] == 32 * 5 * 12 * 128**2
    assert counted["operations_fp8"] == operations["fp8"] / sum(operations.values()) > 0.9
    stored = load_file(fp8.path("transformer.safetensors"))
    assert {x.dtype for x in stored.values()} == {torch.bfloat16, torch.float8_e4m3fn}
    kept = {name for name, x in stored.items() if x.ndim == 2 and x.dtype == torch.bfloat16}
    assert kept == {name for name in kept if "norm" in name or "embed" in name or name == "proj_out.weight"}
    # no prompt of the calibration is one that images and rewards are compared on
    recipe = Recipe.default(model="meanflow-shapes")
    assert not set(calibration_prompts(recipe)) & {prompt.text for prompt in load_prompts(recipe.eval.prompts)}


def test_fp8_that_is_not_of_the_model_is_named(fp8: Artifact, tmp_path: Path) -> None:
    """A weight, a scale and a record of the calibration that were changed, with a manifest that matches them."""
    module = "single_transformer_blocks.1.attn.to_q"
    folder = copied(fp8, tmp_path / "artifact")
    weights = load_file(folder / "transformer.safetensors")
    exact = Recipe.default(model="meanflow-shapes")
    name = f"{module}.weight.transposed"
    scales = stored_scales(folder / "transformer.onnx")
    model: Any = load_model(Target("base", exact, None), device="cpu")
    weight = model.network.get_submodule(module).weight.detach()
    assert not other_rounding(name, weights[name], weight, scales, summed=False)
    neighbour = weights[name].view(torch.uint8).clone()
    neighbour[3, 5] += 1
    for summed in (False, True):
        # a neighbouring number is only allowed where a sum may have been rounded differently
        assert other_rounding(name, neighbour.view(torch.float8_e4m3fn), weight, scales, summed=summed) != summed
    neighbour[3, 5] += 1
    assert other_rounding(name, neighbour.view(torch.float8_e4m3fn), weight, scales, summed=True)
    assert other_rounding(name, weights[name], weight, {**scales, f"{module}.weight_scale": 1.0}, summed=True)

    record = Calibration.read(folder / CALIBRATION)
    assert (record.images, module in record.inputs) == (IMAGES, True)
    assert record.other(record) == ""
    assert "steps is 4 in the record, but 2" in record.other(replace(record, steps=2))
    # the first of the four layers that read this input
    first = "single_transformer_blocks.1.proj_mlp"
    replace(record, inputs={**record.inputs, first: 2 * record.inputs[first]}).write(folder / CALIBRATION)
    found = other_calibration(Artifact(folder, fp8.manifest), model, exact, ignore)
    assert re.match(rf"the graph's scale for the input of {first} is .*, not the one of the record", found)
    (folder / CALIBRATION).write_text("{}")
    with pytest.raises(CheckpointError, match="not the record of a calibration"):
        Calibration.read(folder / CALIBRATION)


def test_fp8_runs_nowhere_on_a_cpu(fp8: Artifact) -> None:
    with pytest.raises(PrecisionError, match="is fp8, which ONNX Runtime does not compute"):
        OnnxRuntime(fp8).run("transformer", {})
    with pytest.raises(UsageError, match="calibrated for its present weights"):
        swap_weights(fp8.folder, "base")


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """An fp16 artifact, whose graphs the tests above have traced. Do not change it."""
    folder = tmp_path_factory.mktemp("half")
    return exported("meanflow-shapes", folder / "artifact", ExportOptions(precision="fp16"))


def half_node(model: onnx.ModelProto, module: str, operator: str) -> NodeProto:
    """The first node of an operator in a module whose result is fp16."""
    kinds = {value.name: value.type.tensor_type.elem_type for value in model.graph.value_info}
    return next(
        node
        for node in model.graph.node
        if node.op_type == operator and module_of(node) == module and kinds[node.output[0]] == TensorProto.FLOAT16
    )


def compute_in_fp32(model: onnx.ModelProto, node: NodeProto) -> None:
    """Puts casts around a node, as a forward that upcasts would leave them."""
    nodes = list(model.graph.node)
    place = next(i for i, other in enumerate(nodes) if other.output == node.output)
    inputs, output = list(node.input), node.output[0]
    before = [
        helper.make_node("Cast", [name], [f"{name}.wide"], to=TensorProto.FLOAT) for name in dict.fromkeys(inputs)
    ]
    wide = NodeProto()
    wide.CopyFrom(node)
    wide.ClearField("input")
    wide.ClearField("output")
    wide.input.extend(f"{name}.wide" for name in inputs)
    wide.output.append(f"{output}.wide")
    after = helper.make_node("Cast", [f"{output}.wide"], [output], to=TensorProto.FLOAT16)
    model.graph.ClearField("node")
    model.graph.node.extend([*nodes[:place], *before, wide, after, *nodes[place + 1 :]])
    # the types of all values are inferred again
    model.graph.ClearField("value_info")


@pytest.mark.parametrize(
    ("module", "operator"),
    [
        ("transformer_blocks.0.attn", "Softmax"),
        ("transformer_blocks.0.attn", "MatMul"),
        ("transformer_blocks.0.attn", "Mul"),  # the scale: a Mul that is no rotation
        ("transformer_blocks.0.norm1", "Add"),  # scale and shift of an adaptive normalization
        ("transformer_blocks.0.ff.net.0", "Gelu"),
        ("time_text_embed.timestep_embedder.act", "Mul"),
        ("single_transformer_blocks.1", "Add"),
    ],
)
def test_a_node_that_is_fp32_without_reason_is_named(
    module: str, operator: str, half: Artifact, tmp_path: Path
) -> None:
    file = half.onnx("transformer")
    assert precision_of_file(file, "fp16").foreign == ()
    model = onnx.load(str(file), load_external_data=False)
    compute_in_fp32(model, half_node(model, module, operator))
    (tmp_path / "g.onnx").write_bytes(model.SerializeToString())
    assert precision_of_file(tmp_path / "g.onnx", "fp16").foreign == (f"{module}: {operator} (fp32)",)


@pytest.mark.parametrize("name", ["x_embedder.weight", "time_text_embed.timestep_embedder.linear_1.weight"])
def test_a_weight_that_is_stored_in_fp32_is_counted(name: str, half: Artifact, tmp_path: Path) -> None:
    model = onnx.load(str(half.onnx("transformer")), load_external_data=False)
    stored = next(tensor for tensor in model.graph.initializer if tensor.name == name)
    reader = next(node for node in model.graph.node if name in node.input)
    stored.data_type = TensorProto.FLOAT
    cast = helper.make_node("Cast", [name], ["narrow"], to=TensorProto.FLOAT16)
    reader.input[list(reader.input).index(name)] = "narrow"
    nodes = [cast, *model.graph.node]
    model.graph.ClearField("node")
    model.graph.node.extend(nodes)
    model.graph.ClearField("value_info")
    (tmp_path / "g.onnx").write_bytes(model.SerializeToString())
    numbers = int(np.prod(stored.dims))
    assert precision_of_file(tmp_path / "g.onnx", "fp16").foreign == (f"weights: {numbers} elements fp32",)


def test_the_documentation_has_the_same_list() -> None:
    text = Path("docs/export.md").read_text(encoding="utf-8")
    section = text.partition("### What stays fp32")[2].partition("\n#")[0]
    listed = dict(re.findall(r"^\| ([^|]+?) \| ([^|]+?) \|$", section, re.MULTILINE)[1:])
    assert listed == STAYS_FP32


def test_a_sana_model_is_refused_in_one_line(tmp_path: Path) -> None:
    folder = build_tiny_sana(tmp_path / "sana")
    recipe = Recipe.default("sana-sprint", **{"model.folder": str(folder), "rewards": ["jpeg-incompressibility"]})
    with pytest.raises(UsageError, match=r"^The model 'sana-sprint' is not of the FLUX\.1 family") as caught:
        find_source(Target("sana", recipe, None))
    assert "\n" not in str(caught.value)
