"""A repository for Triton: configurations that fit the graphs, and a Python model that gives the images of fmg."""

from __future__ import annotations

import ast
import hashlib
import shutil
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fmg.core.errors import UsageError
from fmg.core.files import SUMS, read_sums
from fmg.export.fused import add_sampler
from fmg.export.triton import PYTHON_MODEL, TritonOptions, export_triton, pbtxt, python_modules
from fmg.inference.artifact import Artifact
from fmg.inference.artifact.layout import write_manifest
from fmg.inference.artifact.manifest import Adapter, AdapterPart
from fmg.inference.onnxruntime import load
from fmg.inference.tensorrt.records import EngineRecord, Ingredients, Profile, ShapeRange, engine_name, note_built
from fmg.inference.triton import TritonPythonModel
from tests.support.cli import fmg
from tests.support.tiny_artifact import LENGTH, PROMPTS, build_tiny_artifact
from tests.support.triton import triton_python_backend_utils as utils
from tests.support.triton.repository import read_configs

MODEL = "tiny"


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return build_tiny_artifact(tmp_path_factory.mktemp("triton") / "artifact")


@pytest.fixture(scope="module")
def repository(artifact: Artifact) -> Path:
    """Written by the command."""
    out = artifact.folder.parent / "repository"
    done = fmg("export", str(artifact.folder), "--triton", str(out))
    assert done.code == 0, done.stderr
    assert done.stdout == f"{out}: model 'tiny' for Triton, 4 graphs, up to 4 images per batch\n"
    return out


@pytest.fixture(scope="module")
def served(repository: Path) -> utils.Server:
    return utils.Server(repository, read_configs(repository))


@pytest.fixture
def model(served: utils.Server, monkeypatch: pytest.MonkeyPatch) -> TritonPythonModel:
    return started(served, monkeypatch)


def started(server: utils.Server, monkeypatch: pytest.MonkeyPatch) -> TritonPythonModel:
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", utils)
    monkeypatch.setattr(utils.Server, "running", server)
    monkeypatch.setattr(utils.Logger, "lines", [])
    server.calls.clear()
    model: TritonPythonModel = server.started(TritonPythonModel(), MODEL)
    return model


def images(response: utils.InferenceResponse) -> np.ndarray:
    assert not response.has_error(), response.error().message()
    (tensor,) = response.output_tensors()
    assert tensor.name() == "image"
    return tensor.as_numpy()


def kind_of(config: Mapping[str, Any]) -> str:
    (group,) = config["instance_group"]
    assert group["count"] == 1
    return str(group["kind"])


def distance(artifact: Artifact, rows: list[Mapping[str, Any]], made: np.ndarray) -> float:
    """The largest difference from the images that fmg generates, of rows with equal steps and sizes."""
    prompts, seeds = [str(row["prompt"]) for row in rows], [int(row["seed"]) for row in rows]
    with load(artifact, threads=1, resolution=rows[0].get("size")) as generator:
        expected = generator.generate(prompts, seeds, steps=rows[0].get("steps")).image_array
    return float(np.abs(made.transpose(0, 3, 1, 2) / 255 - expected).max())


def test_every_graph_is_a_model_that_forms_batches(served: utils.Server) -> None:
    graphs = ("text_encoder", "text_encoder_2", "transformer", "vae_decoder")
    assert served.configs.keys() == {MODEL, *(f"{MODEL}_{graph}" for graph in graphs)}
    for name, config in served.configs.items():
        assert config["max_batch_size"] == 4
        assert "dynamic_batching" in config
        assert config["version_policy"] == {"latest": {"num_versions": 1}}
        assert kind_of(config) == ("KIND_CPU" if name == MODEL else "KIND_AUTO")
    # what the artifact fixes is fixed for clients as well, so a wrong size is refused by the server
    inputs = {spec["name"]: spec for spec in served.configs["tiny_transformer"]["input"]}
    assert inputs["txt_ids"]["dims"] == [str(LENGTH), "3"]
    assert inputs["img_ids"]["dims"] == ["-1", "3"]
    assert (inputs["timestep"]["dims"], inputs["timestep"]["reshape"]) == (["1"], {"shape": []})


def test_the_samples_of_the_warm_up_run(served: utils.Server, model: TritonPythonModel) -> None:
    assert served.warm_up() == 2 * 4
    assert sorted(rows for _, rows in served.calls) == [1] * 4 + [4] * 4


def test_requests_are_batched_and_answered_with_the_images_of_fmg(
    served: utils.Server, model: TritonPythonModel, artifact: Artifact
) -> None:
    first = [{"prompt": PROMPTS[0], "seed": 3}, {"prompt": PROMPTS[1], "seed": -1}]
    second = [{"prompt": PROMPTS[2], "seed": 2**62}]
    answers = model.execute([utils.asked(first), utils.asked(second)])
    made = np.concatenate([images(answer) for answer in answers])
    assert made.dtype == np.uint8
    assert distance(artifact, first + second, made) <= 1 / 255
    # one call per step for both requests
    assert served.calls.count(("tiny_transformer", 3)) == 4
    assert {rows for _, rows in served.calls} == {3}


def test_steps_and_sizes_are_inputs(model: TritonPythonModel, artifact: Artifact) -> None:
    asked: list[list[Mapping[str, Any]]] = [
        [{"prompt": PROMPTS[0], "seed": 5, "steps": 2, "size": 16}],
        [{"prompt": PROMPTS[0], "seed": 5, "steps": 3, "size": 8}],
        [{"prompt": PROMPTS[3], "seed": 6, "steps": 2, "size": 16}],
    ]
    answers = [images(answer) for answer in model.execute([utils.asked(rows) for rows in asked])]
    assert [answer.shape for answer in answers] == [(1, 16, 16, 3), (1, 8, 8, 3), (1, 16, 16, 3)]
    for rows, answer in zip(asked, answers, strict=True):
        assert distance(artifact, rows, answer) <= 1 / 255


def test_images_of_one_prompt_have_consecutive_seeds_unless_given(model: TritonPythonModel, artifact: Artifact) -> None:
    (answer,) = model.execute([utils.asked([{"prompt": "circle"}, {"prompt": "circle"}, {"prompt": "a"}])])
    rows = [{"prompt": prompt, "seed": seed} for prompt, seed in (("circle", 0), ("circle", 1), ("a", 0))]
    assert distance(artifact, rows, images(answer)) <= 1 / 255


def test_a_wrong_request_fails_alone(model: TritonPythonModel, artifact: Artifact) -> None:
    wrong = {
        "51 steps are more than this model takes. Ask for up to 50.": {"prompt": "a", "steps": 51},
        "A grid has at least one step": {"prompt": "a", "steps": 0},
        "The artifact generates images of 8 to 16 pixels in steps of 4, not 9.": {"prompt": "a", "size": 9},
        "A prompt has more than 4000 characters.": {"prompt": "a" * 4001},
        "A prompt of 1 byte is not UTF-8.": {"prompt": b"\xff"},
    }
    good = [{"prompt": PROMPTS[0], "seed": 3}]
    answers = model.execute([*(utils.asked([row]) for row in wrong.values()), utils.asked(good)])
    for answer, says in zip(answers, wrong, strict=False):
        assert says in answer.error().message()
        assert answer.error().code() == utils.TritonError.INVALID_ARG
    assert distance(artifact, good, images(answers[-1])) <= 1 / 255
    (mixed,) = model.execute([utils.asked([{"prompt": "a", "size": 8}, {"prompt": "a", "size": 16}])])
    assert "different sizes" in mixed.error().message()


def test_a_failure_reaches_only_the_requests_in_it(
    served: utils.Server, model: TritonPythonModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = served._run

    def failing(request: Any) -> Any:
        if request.model == "tiny_vae_decoder" and len(request.tensors["latents"].as_numpy()) == 2:
            raise utils.RefusedError("out of memory")
        outputs = run(request)
        if request.model == "tiny_vae_decoder" and len(outputs[0].as_numpy()) == 3:
            outputs[0].as_numpy()[1] = np.nan
        return outputs

    monkeypatch.setattr(served, "_run", failing)
    asked = [("a", 1, 2), ("circle", 2, 3), ("red", 3, 2), ("a", 4, 4), ("a", 5, 4), ("a", 6, 4)]
    answers = model.execute([utils.asked([{"prompt": p, "seed": s, "steps": n}]) for p, s, n in asked])
    assert [answer.has_error() for answer in answers] == [True, False, True, False, True, False]
    says = "The model 'tiny_vae_decoder' failed: out of memory. See the log of the server."
    assert (answers[0].error().message(), answers[0].error().code()) == (says, utils.TritonError.INTERNAL)
    assert "The image of seed 5 has values that are not finite" in answers[4].error().message()
    assert "Traceback" in utils.Logger.lines[0]


def test_a_truncated_prompt_is_logged(model: TritonPythonModel) -> None:
    images(model.execute([utils.asked([{"prompt": "red " * 20}])])[0])
    assert utils.Logger.lines == [
        "The prompt 'red red red red red red red red red red red red red red red ' has 20 tokens; the model reads the"
        " first 8. Shorten any prompt that should be read in full."
    ]


def test_files_and_origin_can_be_traced(repository: Path, served: utils.Server, artifact: Artifact) -> None:
    sums, manifest = read_sums(repository), artifact.manifest
    files = {path.relative_to(repository).as_posix(): path for path in repository.rglob("*") if path.is_file()}
    assert sums == {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items() if name != SUMS}
    for name, config in served.configs.items():
        stated = {key: value["string_value"] for key, value in config["parameters"].items()}
        assert stated["fmg.artifact.sha256"] == manifest.sampling_digest()
        if name != MODEL:
            graph = manifest.graphs[name.removeprefix("tiny_")]
            assert stated["fmg.graph.sha256"] == manifest.files[graph.file].sha256
            assert stated["fmg.weights.sha256"] == sums[f"{name}/1/{graph.weights}"]


def test_clients_learn_no_folders_of_this_computer(tmp_path: Path) -> None:
    artifact = build_tiny_artifact(tmp_path / "artifact")
    parts = (AdapterPart("/data/me/runs/a", "d1", 0.7), AdapterPart("owner/name@main", "d2", 0.3))
    adapter = Adapter("d", 4, 4.0, 1.0, ("all",), "0.7 /data/me/runs/a + 0.3 owner/name@main", parts)
    write_manifest(artifact.folder, replace(artifact.manifest, adapter=adapter))
    made = export_triton(artifact.folder, tmp_path / "r")
    for name, config in read_configs(made.folder).items():
        assert config["parameters"]["fmg.adapter.run"]["string_value"] == "0.7 a + 0.3 owner/name@main"
        assert config["parameters"]["fmg.adapter.sha256"]["string_value"] == "d"
        assert "/data/me" not in (made.folder / name / "config.pbtxt").read_text()


def test_a_changed_tokenizer_is_noticed(
    repository: Path, served: utils.Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = Path(shutil.copytree(repository, tmp_path / "copy"))
    file = copy / MODEL / "1" / "tokenizer" / "tokenizer.json"
    file.write_text(file.read_text().replace("green", "grean"))
    with pytest.raises(utils.TritonModelException, match="is not the file that was exported"):
        started(utils.Server(copy, served.configs), monkeypatch)


def test_only_code_that_needs_no_torch_is_copied(repository: Path) -> None:
    modules = python_modules(PYTHON_MODEL)
    assert modules == sorted(modules)
    copied = {path.relative_to(repository / MODEL / "1") for path in (repository / MODEL / "1").rglob("fmg/**/*.py")}
    assert len(copied) == len(modules) < 50
    known = {"numpy", "fmg", *sys.stdlib_module_names}
    for path in copied:
        for node in ast.parse((repository / MODEL / "1" / path).read_text()).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            assert {name.partition(".")[0] for name in names} <= known, path


def engine(artifact: Artifact, graph: str, *, rows: tuple[int, int, int], flavour: str = "tensorrt") -> EngineRecord:
    """A stored engine, which no test runs."""
    manifest, entry = artifact.manifest, artifact.manifest.graphs[graph]
    shapes = {}
    for spec in entry.inputs:
        ranges = [[n if axis == "batch" else axis if isinstance(axis, int) else 4 for axis in spec.shape] for n in rows]
        shapes[spec.name] = ShapeRange(*map(tuple, ranges))
    made = Ingredients(
        manifest.files[entry.file].sha256,
        manifest.files[entry.weights].sha256,
        (Profile("8px", shapes), Profile("16px", shapes)),
        {},
        flavour,
        "11.4.0",
        "NVIDIA H200",
        "9.0",
        "580",
        "0.53",
    )
    plan = f"{graph} {rows} {flavour}".encode()
    name, digest = engine_name(graph, made.key()), hashlib.sha256(plan).hexdigest()
    artifact.engines.mkdir(exist_ok=True)
    (artifact.engines / f"{name}.plan").write_bytes(plan)
    record = EngineRecord(1, made.key(), graph, f"{name}.plan", len(plan), digest, made, "fp32", {}, 1.0)
    (artifact.engines / f"{name}.json").write_text(record.to_json())
    return record


def test_engines_of_this_computer_are_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FMG_CACHE", str(tmp_path / "cache"))
    artifact = build_tiny_artifact(tmp_path / "artifact")
    used = [engine(artifact, "transformer", rows=(1, 2, 3)), engine(artifact, "vae_decoder", rows=(1, 2, 2))]
    others = {
        "of rtx": engine(artifact, "text_encoder", rows=(1, 2, 4), flavour="rtx"),
        "takes 2 rows or more": engine(artifact, "vae_decoder", rows=(2, 2, 4)),
        "was not built on this computer": engine(artifact, "text_encoder_2", rows=(1, 2, 4)),
    }
    for record in [*used, *list(others.values())[:2]]:
        note_built(record.sha256)
    notes: list[str] = []
    made = export_triton(artifact, tmp_path / "repository", observer=lambda event: notes.append(str(event)))
    assert made.max_batch == 3
    assert {name for name, backend in made.backends.items() if backend == "tensorrt"} == {
        "tiny_transformer",
        "tiny_vae_decoder",
    }
    assert len(notes) == len(others)
    for says, record in others.items():
        assert any(says in note and record.plan in note for note in notes), (says, notes)
    configs = read_configs(made.folder)
    config = configs["tiny_transformer"]
    # the engine takes positions without a batch axis, so the server cannot form its batches
    assert (config["max_batch_size"], "dynamic_batching" in config) == (0, False)
    assert (kind_of(config), config["instance_group"][0]["profile"]) == ("KIND_GPU", ["0", "1"])
    assert config["parameters"]["fmg.engine.sha256"]["string_value"] == used[0].sha256
    assert (made.folder / "tiny_transformer" / "1" / "model.plan").read_bytes() == b"transformer (1, 2, 3) tensorrt"
    # the graphs themselves take the place of their engines
    graphs = {f"tiny_{record.graph}": artifact.onnx(record.graph) for record in used}
    server = utils.Server(made.folder, configs, graphs)
    assert server.warm_up() == 2 * 3 + 1
    rows = [{"prompt": prompt, "seed": seed} for seed, prompt in enumerate(PROMPTS[:3])]
    (answer,) = started(server, monkeypatch).execute([utils.asked(rows)])
    assert distance(artifact, rows, images(answer)) <= 1 / 255
    # the decoder takes two rows, the others the three of the transformer
    assert sorted(n for name, n in server.calls if name == "tiny_vae_decoder") == [1, 2]
    assert ("tiny_text_encoder", 3) in server.calls


def test_the_sampler_as_one_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact = build_tiny_artifact(tmp_path / "artifact", kind="single-time")
    manifest = add_sampler(artifact.folder, artifact.manifest)
    write_manifest(artifact.folder, manifest)
    done = fmg("export", str(artifact.folder), "--triton", str(tmp_path / "one"), "--fused")
    assert done.code == 0, done.stderr
    looped = export_triton(artifact, tmp_path / "loop").folder
    rows = [{"prompt": prompt, "seed": seed} for seed, prompt in enumerate(PROMPTS[:3])]
    for repository, calls in ((tmp_path / "one", {"sampler": 1}), (looped, {"transformer": 4, "vae_decoder": 1})):
        configs = read_configs(repository)
        server = utils.Server(repository, configs)
        server.warm_up()
        (answer,) = started(server, monkeypatch).execute([utils.asked(rows)])
        assert distance(artifact, rows, images(answer)) <= 1 / 255
        graphs = [name.removeprefix("tiny_") for name, _ in server.calls if "text_encoder" not in name]
        assert Counter(graphs) == calls
    # its number of steps and its size are fixed
    config = read_configs(tmp_path / "one")[MODEL]
    assert [spec["name"] for spec in config["input"]] == ["prompt", "seed"]
    assert config["output"][0]["dims"] == ["8", "8", "3"]
    digests = [manifest.files[manifest.graphs[graph].weights].sha256 for graph in ("transformer", "vae_decoder")]
    origin = read_configs(tmp_path / "one")["tiny_sampler"]["parameters"]["fmg.weights.sha256"]
    assert origin["string_value"] == ",".join(digests)


def test_names_devices_and_versions(artifact: Artifact, tmp_path: Path) -> None:
    made = export_triton(artifact, tmp_path / "r", TritonOptions(name="signs.v2", device="gpu", version=7))
    assert made.model == "signs.v2"
    assert kind_of(read_configs(made.folder)["signs.v2_transformer"]) == "KIND_GPU"
    assert (made.folder / "signs.v2" / "7" / "model.py").is_file()
    for options, says in (
        (TritonOptions(name="../x"), "'../x' cannot be the name of a Triton model"),
        (TritonOptions(version=0), "Version 0 is not a version"),
        (TritonOptions(int8=True), "has no int8 transformer"),
        (TritonOptions(fused=True), "has no fused sampler"),
        (TritonOptions(fused=True, int8=True), "has no 8-bit weights"),
    ):
        with pytest.raises(UsageError, match=says):
            export_triton(artifact, tmp_path / "other", options)
    graphs = {**artifact.manifest.graphs}
    graphs["transformer"] = replace(graphs["transformer"], precision="bf16")
    half = build_tiny_artifact(tmp_path / "half")
    half = Artifact(half.folder, replace(half.manifest, graphs=graphs))
    write_manifest(half.folder, half.manifest)
    with pytest.raises(UsageError, match="cannot compute bf16 on a CPU"):
        export_triton(half, tmp_path / "other", TritonOptions(device="cpu"))
    configs = read_configs(export_triton(half, tmp_path / "half-r").folder)
    assert kind_of(configs["tiny_transformer"]) == "KIND_GPU"
    assert kind_of(configs["tiny_vae_decoder"]) == "KIND_AUTO"
    assert not (tmp_path / "other").exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--triton-device", "gpu"], "--triton-device is an option of a repository for Triton"),
        (["--triton", "{new}", "--triton-device", "tpu"], "--triton-device: 'tpu' is unknown"),
        (["--triton", "{old}"], "exists already"),
        (["--triton", "{new}", "--precision", "bf16"], "--precision cannot be used with --triton"),
        (["--triton", "{new}", "--batch", "1:2:4"], "--batch cannot be used with --triton"),
        (["--triton", "{new}", "--int8"], "has no int8 transformer"),
        (["--triton", "{new}", "--kohya"], "--triton cannot be used with --kohya"),
    ],
)
def test_wrong_options_are_refused_in_one_line(
    words: list[str], says: str, artifact: Artifact, repository: Path, tmp_path: Path
) -> None:
    given = [word.format(new=tmp_path / "new", old=repository) for word in words]
    done = fmg("export", str(artifact.folder), *given)
    assert (done.code, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert says in line
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--triton-name", "../x"], "'../x' cannot be the name of a Triton model"),
        (["--fused", "--int8"], "has no 8-bit weights"),
        (["--int8", "--triton-device", "gpu"], "8-bit weights are for a CPU"),
        (["--precision", "bf16", "--triton-device", "cpu"], "cannot compute bf16 on a CPU"),
        (["--precision", "fp8"], "fp8 runs only in TensorRT engines"),
        (["--triton", "{inside}"], "is in the artifact"),
    ],
)
def test_what_cannot_be_written_is_refused_before_an_export(
    words: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exported(*_: object, **__: object) -> None:
        raise AssertionError("the artifact was exported first")

    monkeypatch.setattr("fmg.export.artifact.export_artifact", exported)
    out = tmp_path / "artifact"
    given = [word.format(inside=out / "models") for word in words]
    done = fmg("export", "meanflow-shapes", "--out", str(out), "--triton", str(tmp_path / "models"), *given)
    assert (done.code, done.stdout) == (2, "")
    assert says in done.stderr


def test_no_repository_is_written_into_an_artifact(artifact: Artifact) -> None:
    with pytest.raises(UsageError, match="is in the artifact"):
        export_triton(artifact, artifact.folder / "models")
    assert not (artifact.folder / "models").exists()


def test_the_artifact_at_the_default_place_is_pointed_out(
    artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(artifact.folder, tmp_path / "artifacts" / "meanflow-shapes")
    done = fmg("export", "meanflow-shapes", "--triton", "models")
    assert done.code == 2
    assert "or name the artifact itself for --trt and --triton" in done.stderr


def test_text_format() -> None:
    message = {"name": 'a "b"\n', "on": True, "dims": [-1, 3], "inner": {"empty": {}}, "many": [{"x": 1}, {"x": 2}]}
    assert pbtxt(message) == (
        'name: "a \\"b\\"\\n"\non: true\ndims: [-1, 3]\ninner { empty { } }\nmany { x: 1 }\nmany { x: 2 }\n'
    )
