"""Engine builds: the real Polygraphy drives the stand-in for TensorRT 11 in a separate process."""

from __future__ import annotations

import os
import shutil
import signal
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import psutil
import pytest

from fmg.core.cache import cache_dir
from fmg.core.errors import FmgError, UsageError
from fmg.core.events import Event, Notice, StageProgress, ignore
from fmg.export.tensorrt import worker
from fmg.export.tensorrt.build import Engine, EngineOptions, build_engines, check_network
from fmg.export.tensorrt.worker import Built, Failed, Job, Message, Step, from_line, to_line
from fmg.inference.artifact import Artifact
from fmg.inference.artifact.layout import ENGINES
from fmg.inference.artifact.manifest import GRAPHS, TensorSpec
from fmg.inference.tensorrt.flavours import Gpu
from fmg.inference.tensorrt.records import Profile, ShapeRange, read_records
from tests.support import tensorrt as support
from tests.support.tiny_artifact import build_tiny_artifact, reseal, write_graph


@pytest.fixture
def trt() -> Iterator[ModuleType]:
    with support.stand_in() as module:
        yield module


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Engine], list[Event]]:
    folder = tmp_path_factory.mktemp("built") / "artifact"
    build_tiny_artifact(folder)
    with support.stand_in():
        return folder, *support.build(folder)


@pytest.fixture
def artifact(built: tuple[Path, list[Engine], list[Event]], tmp_path: Path) -> Path:
    return Path(shutil.copytree(built[0], tmp_path / "artifact"))


def small_job(folder: Path, *, operator: str = "MatMul", options: EngineOptions | None = None) -> Job:
    """A graph of one node."""
    spec = (TensorSpec("x", "float32", ("batch", 4)),)
    nodes = [(operator, ["x", "proj.weight"] if operator == "MatMul" else ["x"], "y", {})]
    out = (TensorSpec("y", "float32", ("batch", 4) if operator == "MatMul" else ("n",)),)
    write_graph(folder, "g", nodes, {"proj.weight": (4, 4)}, spec, out)
    profile = Profile("g", {"x": ShapeRange((1, 4), (1, 4), (2, 4))})
    chosen = (options or EngineOptions()).ingredients()
    return Job(str(folder / "g.onnx"), str(folder / "g.plan"), "tensorrt", (profile,), chosen, None)


def test_every_graph_gets_an_engine_and_its_record(built: tuple[Path, list[Engine], list[Event]]) -> None:
    folder, engines, events = built
    assert [engine.record.graph for engine in engines] == list(GRAPHS)
    assert read_records(folder) == sorted((engine.record for engine in engines), key=lambda record: record.plan)
    names = {engine.record.plan.removesuffix(".plan") for engine in engines}
    expected = {f"{name}.{end}" for name in names for end in ("plan", "json")}
    assert {file.name for file in (folder / ENGINES).iterdir()} == expected
    for engine in engines:
        made = engine.record.ingredients
        assert engine.record.plan.startswith(f"{engine.record.graph}-{made.key()[:12]}")
        assert (made.flavour, made.version, made.gpu) == ("tensorrt", "11.4.0.106", support.GPU.name)
    assert engines[2].record.layers["MATRIX_MULTIPLY"] == {"FLOAT": 6}
    assert any(isinstance(event, StageProgress) and event.stage == "transformer: building engine" for event in events)


@pytest.mark.slow
def test_the_timing_cache_of_this_gpu_is_read_and_added_to(tmp_path: Path, trt: ModuleType) -> None:
    build_tiny_artifact(tmp_path / "artifact")
    support.build(tmp_path / "artifact")
    cache = cache_dir() / "tensorrt" / "timing-11.4.0.106-nvidia-h100-80gb-hbm3-9.0.cache"
    # each of four builds adds what it measured to what it loaded
    assert cache.read_bytes().count(b"measured;") >= len(GRAPHS)
    before = cache.read_bytes()
    engines, _ = support.build(tmp_path / "artifact", options=EngineOptions(timing_cache=False), resolutions=(8,))
    assert not all(engine.reused for engine in engines)
    assert cache.read_bytes() == before


def test_the_same_request_takes_the_engines_that_are_there(artifact: Path, trt: ModuleType) -> None:
    engines, events = support.build(artifact)
    assert all(engine.reused for engine in engines)
    notices = [event.text for event in events if isinstance(event, Notice)]
    assert len(notices) == len(GRAPHS)
    assert all("exists already" in text for text in notices)


def test_an_engine_of_unknown_origin_is_reported(artifact: Path) -> None:
    with support.stand_in():
        _, events = support.build(artifact)
    origin = "exists already, but this computer has no record of building it"
    assert sum(isinstance(event, Notice) and event.text.endswith(origin) for event in events) == 4


def test_other_options_and_profiles_make_other_engines_beside_them(artifact: Path, trt: ModuleType) -> None:
    before = {record.plan for record in read_records(artifact)}
    engines, _ = support.build(artifact, resolutions=(8,))
    # text encoders do not depend on the resolution, so theirs are kept
    assert [engine.reused for engine in engines] == [True, True, False, False]
    assert before < {record.plan for record in read_records(artifact)}


def test_other_weights_of_one_graph_make_a_new_engine_of_that_graph(
    tmp_path: Path, artifact: Path, trt: ModuleType
) -> None:
    other = build_tiny_artifact(tmp_path / "other", seed=1)
    shutil.copy(other.path("transformer.safetensors"), artifact / "transformer.safetensors")
    manifest = (artifact / "manifest.json").read_text()
    old = support.open_artifact(artifact, hashes=False).manifest.files["transformer.safetensors"].sha256
    new = other.manifest.files["transformer.safetensors"].sha256
    (artifact / "manifest.json").write_text(manifest.replace(old, new))
    reseal(artifact)
    engines, _ = support.build(artifact)
    assert [engine.reused for engine in engines] == [True, True, False, True]


def test_a_damaged_plan_is_rebuilt_and_reported(artifact: Path, trt: ModuleType) -> None:
    plan = next((artifact / ENGINES).glob("transformer-*.plan"))
    plan.write_bytes(plan.read_bytes()[:-1])
    engines, events = support.build(artifact)
    assert [engine.reused for engine in engines] == [True, True, False, True]
    assert any(isinstance(e, Notice) and e.level == "warning" and "damaged" in e.text for e in events)


def test_options_of_the_builder(tmp_path: Path, trt: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_TENSORRT_CONFIG", str(tmp_path / "seen"))
    options = EngineOptions(
        level=4, workspace_gib=0.5, hardware="ampere-plus", version_compatible=True, weight_streaming=True
    )
    worker.build_engine(small_job(tmp_path, options=options), "g", ignore)
    # no precision among the flags, and no TF32: an fp32 graph is computed in fp32
    assert (tmp_path / "seen").read_text() == (
        "['VERSION_COMPATIBLE', 'WEIGHT_STREAMING'] 4 AMPERE_PLUS {'WORKSPACE': 536870912}"
    )


def test_the_parsers_reason_and_its_node_reach_the_user(tmp_path: Path, trt: ModuleType) -> None:
    with pytest.raises(FmgError, match=r"node_y and operator: Unique .*UNSUPPORTED_NODE"):
        worker.build_engine(small_job(tmp_path, operator="Unique"), "g", ignore)
    assert not (tmp_path / "g.plan").exists()


def test_the_builders_reason_reaches_the_user(tmp_path: Path, trt: ModuleType) -> None:
    job = small_job(tmp_path)
    narrow = Profile("g", {"x": ShapeRange((1, 3), (1, 3), (1, 3))})
    with pytest.raises(FmgError, match="Dimension mismatch for tensor x and profile 0"):
        worker.build_engine(replace(job, profiles=(narrow,)), "g", ignore)


def test_a_crash_of_the_builder_is_one_line_and_leaves_nothing(
    artifact: Path, trt: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = sorted(file.name for file in (artifact / ENGINES).iterdir())
    monkeypatch.setenv("FAKE_TENSORRT_BUILD", "crash")
    with pytest.raises(FmgError, match=r"engine of transformer was not built: the builder ended by SIGABRT") as caught:
        support.build(artifact, resolutions=(8,))
    # Polygraphy's advice to install a package for colours is not the reason
    assert "colored" not in caught.value.what
    assert sorted(file.name for file in (artifact / ENGINES).iterdir()) == before


def test_a_builder_that_takes_too_much_memory_is_stopped(
    tmp_path: Path, trt: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_TENSORRT_BUILD", "hoard")
    with pytest.raises(FmgError, match=r"used more than 0\.2 GiB of memory"):
        worker.build_engine(small_job(tmp_path), "g", ignore, memory_gib=0.2)


def test_ctrl_c_ends_the_builder_first(tmp_path: Path, trt: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_TENSORRT_BUILD", "hang")
    began = threading.Event()

    def observer(event: Event) -> None:
        if not began.is_set():
            began.set()
            os.kill(os.getpid(), signal.SIGINT)

    # a test-suite that runs in the background has SIGINT ignored
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            worker.build_engine(small_job(tmp_path), "g", observer)
    finally:
        signal.signal(signal.SIGINT, before)
    workers = [child for child in psutil.Process().children() if "worker" in " ".join(child.cmdline())]
    assert began.is_set()
    assert not workers


def test_a_graph_that_cannot_be_built_is_refused_before_anything_is(tmp_path: Path, trt: ModuleType) -> None:
    artifact = build_tiny_artifact(tmp_path / "artifact")
    decoder = artifact.folder / "vae_decoder.onnx"
    decoder.write_bytes(decoder.read_bytes()[:100])
    with pytest.raises(FmgError, match="is not an ONNX file"):
        build_engines(artifact, flavour="tensorrt")
    assert not (artifact.folder / ENGINES).exists()


def test_without_a_gpu_the_flavour_tensorrt_is_refused(tmp_path: Path) -> None:
    build_tiny_artifact(tmp_path / "artifact")
    with support.stand_in(gpu=None), pytest.raises(UsageError, match="torch sees none here"):
        support.build(tmp_path / "artifact")


def test_a_network_in_another_precision_is_refused() -> None:
    check_network("transformer", {"MATRIX_MULTIPLY": {"BF16": 30, "FLOAT": 2}, "CAST": {"FLOAT": 9}}, "bf16")
    with pytest.raises(FmgError, match="30 layers compute in BF16 where FLOAT was requested"):
        check_network("transformer", {"MATRIX_MULTIPLY": {"BF16": 30}}, "fp32")
    check_network("transformer", {"MATRIX_MULTIPLY": {"BF16": 30}, "QUANTIZE": {"FP8": 12}}, "fp8")
    with pytest.raises(FmgError, match="no layer computes in FP8"):
        check_network("transformer", {"MATRIX_MULTIPLY": {"BF16": 30}}, "fp8")


@pytest.mark.parametrize("message", [Step("Building", 1, 4), Built({"CAST": {"FLOAT": 2}}, 0.5), Failed("why", "n")])
def test_messages_between_processes_arrive_unchanged(message: Message) -> None:
    assert from_line(to_line(message)) == message


@pytest.mark.parametrize("line", ["", "{", "[]", '{"kind": "other"}', '{"kind": "step", "phase": 1}'])
def test_lines_that_are_not_messages_are_refused(line: str) -> None:
    with pytest.raises(ValueError, match=r"Expect|not a message|missing"):
        from_line(line)


@pytest.mark.parametrize(
    ("gpu", "options", "reason"),
    [
        (
            Gpu("NVIDIA A100", "8.0", "580"),
            EngineOptions(),
            r"compute capability 8\.9 \(Ada\), but NVIDIA A100 has 8\.0",
        ),
        (support.GPU, EngineOptions(refittable=True), "weights of an fp8 engine cannot be replaced"),
        (support.GPU, EngineOptions(hardware="ampere-plus"), r"--hardware ampere-plus asks for 8\.0"),
    ],
)
def test_fp8_is_refused_before_the_build_where_it_cannot_run(
    gpu: Gpu, options: EngineOptions, reason: str, tmp_path: Path
) -> None:
    artifact = build_tiny_artifact(tmp_path / "artifact")
    narrow = Artifact(artifact.folder, replace(artifact.manifest, precision="fp8"))
    with support.stand_in(gpu), pytest.raises(UsageError, match=reason):
        build_engines(narrow, flavour="tensorrt", options=options)
    assert not artifact.engines.exists()
