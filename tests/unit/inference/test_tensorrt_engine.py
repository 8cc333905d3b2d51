"""Engines on the stand-in for TensorRT 11, which enforces the order of calls and computes real results."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import onnxruntime
import pytest
import torch

from fmg.core.errors import CheckpointError, FmgError, FmgWarning, UsageError
from fmg.export.tensorrt.build import EngineOptions, check_refit
from fmg.inference.artifact import Artifact, open_artifact
from fmg.inference.artifact.layout import ENGINES
from fmg.inference.artifact.manifest import BATCH, HEIGHT, IMAGE, TEXT, WIDTH
from fmg.inference.loading import load
from fmg.inference.tensorrt import engine as engine_module
from fmg.inference.tensorrt.engine import Engine, RunOptions
from fmg.inference.tensorrt.flavours import TENSORRT, Gpu, lists_gpu
from fmg.inference.tensorrt.records import EngineRecord, read_records
from fmg.inference.tensorrt.refit import Refit
from fmg.inference.tensorrt.runtime import EngineRuntime
from tests.support import tensorrt as support
from tests.support.fake_cuda import FakeCuda
from tests.support.fake_device import DEVICE
from tests.support.fake_rtx import as_rtx
from tests.support.tiny_artifact import LENGTH, PROMPTS, build_tiny_artifact, random_inputs, reseal

SMALL, LARGE = {IMAGE: 4, HEIGHT: 4, WIDTH: 4, TEXT: LENGTH}, {IMAGE: 16, HEIGHT: 8, WIDTH: 8, TEXT: LENGTH}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache of this computer, which records the engines that were built here."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def trt(cache: Path) -> Iterator[ModuleType]:
    with support.stand_in(cache=cache) as module:
        yield module


def _built(folder: Path, cache: Path, options: EngineOptions, batch: tuple[int, int, int] = (1, 2, 4)) -> Path:
    build_tiny_artifact(folder, batch=batch)
    with support.stand_in(cache=cache):
        support.build(folder, options=options)
    return folder


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    return _built(tmp_path_factory.mktemp("plain") / "artifact", cache, EngineOptions())


@pytest.fixture(scope="module")
def special(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    """Refittable, weight-streaming engines that take at least two rows."""
    options = EngineOptions(refittable=True, weight_streaming=True)
    return _built(tmp_path_factory.mktemp("special") / "artifact", cache, options, batch=(2, 2, 4))


def transformer(folder: Path, trt: ModuleType, options: RunOptions | None = None) -> Engine:
    plan = next((folder / ENGINES).glob("transformer-*.plan"))
    return Engine(trt, plan, FakeCuda(), options or RunOptions())


def inputs(folder: Path, sizes: dict[str, int], rows: int, seed: int = 0) -> dict[str, torch.Tensor]:
    graph = open_artifact(folder).manifest.graphs["transformer"]
    return random_inputs(graph, {**sizes, BATCH: rows}, seed)


def reference(folder: Path, feeds: dict[str, torch.Tensor]) -> torch.Tensor:
    session = onnxruntime.InferenceSession(str(folder / "transformer.onnx"), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {name: x.numpy() for name, x in feeds.items()})[0])


def test_a_shape_is_set_up_once_recorded_when_it_comes_again_and_then_replayed(plain: Path, trt: ModuleType) -> None:
    engine = transformer(plain, trt)
    DEVICE.calls.clear()
    for seed in range(4):
        feeds = inputs(plain, SMALL, 2, seed)
        assert torch.equal(engine.run(feeds)["velocity"], reference(plain, feeds))
    names = [name for name in DEVICE.names() if name not in ("set_input_shape", "set_tensor_address")]
    assert names == [
        "set_optimization_profile_async",
        "execute_async_v3",
        "synchronize",
        "captured",
        "replay",
        "replay",
        "replay",
    ]
    assert DEVICE.names().count("set_input_shape") == 7
    assert DEVICE.names().count("set_tensor_address") == 8


def test_each_resolution_has_its_profile_and_each_shape_its_recording(plain: Path, trt: ModuleType) -> None:
    engine = transformer(plain, trt)
    DEVICE.calls.clear()
    order = [(SMALL, 1), (LARGE, 2), (SMALL, 1), (LARGE, 2), (LARGE, 3), (SMALL, 1), (LARGE, 2)]
    for seed, (sizes, rows) in enumerate(order):
        feeds = inputs(plain, sizes, rows, seed)
        assert torch.equal(engine.run(feeds)["velocity"], reference(plain, feeds))
    assert [call[1] for call in DEVICE.calls if call[0] == "set_optimization_profile_async"] == [0, 1, 1]
    assert DEVICE.names().count("captured") == 2
    assert DEVICE.names().count("replay") == 4


def test_without_cuda_graphs_every_call_is_queued(plain: Path, trt: ModuleType) -> None:
    engine = transformer(plain, trt, RunOptions(cuda_graphs=False))
    for _ in range(3):
        engine.run(inputs(plain, SMALL, 1))
    assert DEVICE.names().count("execute_async_v3") == 3
    assert "captured" not in DEVICE.names()


def test_results_do_not_change_when_the_engine_runs_again(plain: Path, trt: ModuleType) -> None:
    engine = transformer(plain, trt)
    first = engine.run(inputs(plain, SMALL, 1, seed=0))["velocity"]
    kept = first.clone()
    for seed in (1, 2, 3):
        engine.run(inputs(plain, SMALL, 1, seed=seed))
    assert torch.equal(first, kept)


def test_old_contexts_go_after_the_device_is_done(
    plain: Path, trt: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "MAX_CONTEXTS", 2)
    engine = transformer(plain, trt)
    for rows in (1, 2, 3, 1):
        feeds = inputs(plain, SMALL, rows)
        assert torch.equal(engine.run(feeds)["velocity"], reference(plain, feeds))
    assert DEVICE.names().count("set_optimization_profile_async") == 4
    assert DEVICE.names().count("synchronize") == 2


def test_shapes_that_no_profile_admits_are_one_clear_line(plain: Path, trt: ModuleType) -> None:
    engine = transformer(plain, trt)
    with pytest.raises(
        UsageError, match=r"takes 'hidden_states' as \(1, 4, 16\) to \(4, 4, 16\) or .*, not \(5, 4, 16\)"
    ):
        engine.run(inputs(plain, SMALL, 5))
    with pytest.raises(UsageError, match=r"not \(2, 9, 16\)"):
        engine.run(inputs(plain, {**SMALL, IMAGE: 9}, 2))


def test_missing_and_unknown_inputs_are_named(plain: Path, trt: ModuleType) -> None:
    engine, feeds = transformer(plain, trt), inputs(plain, SMALL, 1)
    with pytest.raises(UsageError, match="'second' does not fit"):
        engine.run({name: x for name, x in feeds.items() if name != "second"})
    with pytest.raises(UsageError, match="'guidance' does not fit"):
        engine.run({**feeds, "guidance": torch.ones(1)})


def test_tensorrts_reason_is_reported_when_it_cannot_load(plain: Path, trt: ModuleType) -> None:
    DEVICE.broken = "cudaError 35: CUDA driver version is insufficient for CUDA runtime version"
    with pytest.raises(CheckpointError, match=r"cannot load the engine transformer-.*cudaError 35"):
        transformer(plain, trt)


def test_tensorrts_reason_is_reported_when_it_cannot_run(plain: Path, trt: ModuleType) -> None:
    engine = transformer(plain, trt)
    DEVICE.failing = "Error Code 1: Cuda Runtime (out of memory)"
    with pytest.raises(FmgError, match=r"failed while running it .*out of memory"):
        engine.run(inputs(plain, SMALL, 1))


@pytest.mark.parametrize(("invalid", "says"), [(2, r"\(unsupported cc\)"), (0, "cudaError 35"), (5, "old cuda driver")])
def test_tensorrt_rtx_says_what_it_finds_in_the_header_of_a_plan_that_does_not_load(
    plain: Path, trt: ModuleType, invalid: int, says: str
) -> None:
    DEVICE.broken, DEVICE.invalid = "cudaError 35", invalid
    with pytest.raises(CheckpointError, match=rf"cannot load the engine transformer-.*{says}"):
        transformer(plain, as_rtx(trt))


def test_tensorrt_rtx_compiles_for_a_shape_before_it_is_recorded_and_records_nothing_itself(
    plain: Path, trt: ModuleType
) -> None:
    engine = transformer(plain, as_rtx(trt))
    # a verdict on the header is no reason to refuse an engine that loads: it is wrong on GPUs that are not listed
    DEVICE.invalid = 2
    for seed in range(3):
        feeds = inputs(plain, SMALL, 2, seed)
        assert torch.equal(engine.run(feeds)["velocity"], reference(plain, feeds))
    assert [call for call in DEVICE.calls if call[0] == "runtime_config"] == [("runtime_config", "EAGER", "DISABLED")]
    assert DEVICE.names().count("captured") == 1
    assert "get_engine_validity" not in DEVICE.names()


def test_a_gpu_that_tensorrt_rtx_does_not_list_is_not_used_automatically(trt: ModuleType) -> None:
    ada, hopper = Gpu("NVIDIA L40S", "8.9", "580"), support.GPU
    assert lists_gpu(as_rtx(trt), ada)
    assert not lists_gpu(as_rtx(trt), hopper)
    assert lists_gpu(trt, hopper)


def test_a_file_that_is_not_a_plan_is_refused(plain: Path, trt: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "x.plan").write_bytes(b"not a plan")
    with pytest.raises(CheckpointError, match="magic tag"):
        Engine(trt, tmp_path / "x.plan", FakeCuda(), RunOptions())


@pytest.mark.slow
def test_code_inside_an_engine_runs_only_with_consent(tmp_path: Path, cache: Path) -> None:
    folder = _built(tmp_path / "artifact", cache, EngineOptions(version_compatible=True))
    with support.stand_in(cache=cache) as trt:
        plan = next((folder / ENGINES).glob("transformer-*.plan"))
        with pytest.raises(UsageError, match="contains a runtime, which is unchecked code"):
            Engine(trt, plan, FakeCuda(), RunOptions(), carries_code=True)
        engine = Engine(trt, plan, FakeCuda(), RunOptions(allow_code=True), carries_code=True)
        assert engine.run(inputs(folder, SMALL, 1))["velocity"].shape == (1, 4, 16)
        artifact = open_artifact(folder)
        with pytest.raises(UsageError, match=r"contains a runtime.*allow_code=True"):
            load(artifact, backend="tensorrt").generate(["a"], [0])
        assert load(artifact).backend.name == "onnxruntime"
        assert load(artifact, allow_code=True).backend.name == "tensorrt"


def test_an_engine_of_another_computer_is_taken_only_by_name(plain: Path) -> None:
    assert load(plain, backend="onnxruntime", device="cpu").backend.name == "onnxruntime"
    with support.stand_in():
        says = (
            r"text_encoder-.*\.plan was not built on this computer .* If you trust who made it, use --backend tensorrt"
        )
        with pytest.warns(FmgWarning, match=says):
            backend = load(plain).backend.name
        assert backend == "onnxruntime"
        assert "deserialize_cuda_engine" not in DEVICE.names()
        named = load(plain, backend="tensorrt")
        assert named.backend.name == "tensorrt"
        assert named.generate(["a"], [0]).image_array.std() > 0


def test_a_plan_that_claims_to_have_been_built_here_is_not_loaded(plain: Path, trt: ModuleType, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(plain, tmp_path / "artifact"))
    # the engine that is run first
    plan = next((folder / ENGINES).glob("text_encoder_2-*.plan"))
    plan.write_bytes(plan.read_bytes()[:-1] + b"!")
    # its record still has the sha256 of the plan that this computer recorded
    with pytest.raises(CheckpointError, match="is damaged: its hash is not the one in its record"):
        load(folder).generate(["a"], [0])
    assert "deserialize_cuda_engine" not in DEVICE.names()


def test_a_streaming_budget_is_set_before_the_first_context_and_stops_recording(special: Path, trt: ModuleType) -> None:
    engine = transformer(special, trt, RunOptions(streaming_budget=100))
    for seed in range(3):
        feeds = inputs(special, SMALL, 2, seed)
        assert torch.equal(engine.run(feeds)["velocity"], reference(special, feeds))
    assert ("weight_streaming_budget_v2", 100) in DEVICE.calls
    assert "captured" not in DEVICE.names()


def test_all_weights_on_the_gpu_are_not_streaming(special: Path, trt: ModuleType) -> None:
    engine = transformer(special, trt, RunOptions(streaming_budget=1 << 40))
    for _ in range(2):
        engine.run(inputs(special, SMALL, 2))
    assert "captured" in DEVICE.names()


def test_a_budget_for_an_engine_without_streaming_is_refused(plain: Path, trt: ModuleType) -> None:
    with pytest.raises(UsageError, match="not built for weight streaming"):
        transformer(plain, trt, RunOptions(streaming_budget=100))


def test_the_backend_generates_the_images_of_onnxruntime(plain: Path, trt: ModuleType) -> None:
    drawn = {}
    for backend in ("auto", "onnxruntime"):
        for resolution in (8, 16):
            generator = load(plain, backend=backend, resolution=resolution, batch_size=4)
            drawn[backend, resolution] = generator.generate(PROMPTS, range(len(PROMPTS))).image_array
            assert generator.backend.name == ("tensorrt" if backend == "auto" else "onnxruntime")
    for resolution in (8, 16):
        assert drawn["auto", resolution].shape == (len(PROMPTS), 3, resolution, resolution)
        assert np.array_equal(drawn["auto", resolution], drawn["onnxruntime", resolution])
    assert drawn["auto", 8].std() > 0.1


def test_the_backend_says_which_engines_it_took(plain: Path, trt: ModuleType) -> None:
    detail = load(plain).backend.detail
    assert detail.startswith("tensorrt 11.4.0.106: ")
    assert all(file.stem in detail for file in (plain / ENGINES).glob("*.plan"))


def runtime(folder: Path, trt: ModuleType) -> EngineRuntime:
    return EngineRuntime(open_artifact(folder), engines_in(folder), TENSORRT, trt, FakeCuda(), RunOptions())


def engines_in(folder: Path) -> dict[str, EngineRecord]:
    return {record.graph: record for record in read_records(folder)}


def test_more_rows_than_the_largest_batch_are_cut_and_fewer_than_the_smallest_filled(
    special: Path, trt: ModuleType
) -> None:
    graphs = runtime(special, trt)
    for rows in (1, 2, 3, 4, 5, 9):
        feeds = inputs(special, SMALL, rows, seed=rows)
        output = graphs.run("transformer", feeds)
        assert output.shape == (rows, 4, 16)
        assert torch.allclose(output, reference(special, feeds), atol=1e-6)
    shapes = [call[2] for call in DEVICE.calls if call[:2] == ("set_input_shape", "hidden_states")]
    assert {shape[0] for shape in shapes} <= {2, 3, 4}


def test_engines_are_loaded_when_they_are_needed_and_again_after_they_were_freed(plain: Path, trt: ModuleType) -> None:
    graphs = runtime(plain, trt)
    assert "deserialize_cuda_engine" not in DEVICE.names()
    ids = {"input_ids": torch.ones(1, LENGTH, dtype=torch.int64)}
    first = graphs.run("text_encoder", ids)
    graphs.free(["text_encoder", "text_encoder_2"])
    assert torch.equal(graphs.run("text_encoder", ids), first)
    assert DEVICE.names().count("deserialize_cuda_engine") == 2


def test_a_damaged_engine_is_refused_when_it_is_loaded(plain: Path, trt: ModuleType, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(plain, tmp_path / "artifact"))
    plan = next((folder / ENGINES).glob("text_encoder-*.plan"))
    plan.write_bytes(plan.read_bytes() + b" ")
    with pytest.raises(CheckpointError, match="is damaged"):
        load(folder, backend="tensorrt").generate(["a"], [0])


def swapped(folder: Path, target: Path) -> Artifact:
    """A copy of an artifact with other weights in its transformer, as `--swap-weights` leaves it."""
    copy = Path(shutil.copytree(folder, target))
    other = build_tiny_artifact(target.parent / "other", seed=1)
    shutil.copy(other.path("transformer.safetensors"), copy / "transformer.safetensors")
    old, new = (a.manifest.files["transformer.safetensors"].sha256 for a in (open_artifact(folder), other))
    (copy / "manifest.json").write_text((copy / "manifest.json").read_text().replace(old, new))
    reseal(copy)
    return open_artifact(copy)


def test_engines_of_other_weights_are_not_taken(plain: Path, trt: ModuleType, tmp_path: Path) -> None:
    artifact = swapped(plain, tmp_path / "artifact")
    assert load(artifact).backend.name == "onnxruntime"
    with pytest.raises(
        UsageError, match=r"no tensorrt engine of 'transformer' that fits here: .* built from other weights"
    ):
        load(artifact, backend="tensorrt")


def test_a_refittable_engine_takes_the_new_weights_and_gives_the_old_ones_back(
    special: Path, trt: ModuleType, tmp_path: Path
) -> None:
    artifact = swapped(special, tmp_path / "artifact")
    plans = {file.name: file.read_bytes() for file in (artifact.folder / ENGINES).glob("*.plan")}
    feeds = inputs(special, SMALL, 2)
    new = EngineRuntime(artifact, engines_in(special), TENSORRT, trt, FakeCuda(), RunOptions()).run(
        "transformer", feeds
    )
    assert torch.equal(new, reference(artifact.folder, feeds))
    assert not torch.allclose(new, reference(special, feeds), atol=1e-2)
    assert load(artifact, backend="auto").backend.name == "tensorrt"
    # the plan was not touched, so the engine as built is one load away
    assert {file.name: file.read_bytes() for file in (artifact.folder / ENGINES).glob("*.plan")} == plans
    assert torch.equal(runtime(special, trt).run("transformer", feeds), reference(special, feeds))


def test_a_refit_lets_no_old_recording_live(special: Path, trt: ModuleType, tmp_path: Path) -> None:
    artifact = swapped(special, tmp_path / "artifact")
    engine, feeds = transformer(special, trt, RunOptions(streaming_budget=1 << 40)), inputs(special, SMALL, 2)
    for _ in range(3):
        engine.run(feeds)
    assert Refit(trt, engine, artifact, "transformer").apply() == 8
    assert torch.equal(engine.run(feeds)["velocity"], reference(artifact.folder, feeds))


def test_an_engine_that_was_not_built_for_it_is_not_refitted(plain: Path, trt: ModuleType) -> None:
    with pytest.raises(UsageError, match="is not refittable"):
        Refit(trt, transformer(plain, trt), open_artifact(plain), "transformer")


def test_a_weight_of_another_size_is_refused_in_a_refit(special: Path, trt: ModuleType, tmp_path: Path) -> None:
    artifact = open_artifact(special)
    refit = Refit(trt, transformer(special, trt), artifact, "transformer")
    with pytest.raises(FmgError, match=r"weight 'proj_out\.bias' was refused in a refit .*another size"):
        refit._set("proj_out.bias", torch.zeros(15))


@pytest.mark.parametrize("lost", [(), ("proj_out.bias",)])
def test_biases_that_an_engine_ignores_are_found(special: Path, trt: ModuleType, lost: tuple[str, ...]) -> None:
    DEVICE.dropped = frozenset(lost)
    plan = next((special / ENGINES).glob("transformer-*.plan"))
    profile = engines_in(special)["transformer"].ingredients.profiles[0].shapes
    if not lost:
        check_refit(trt, plan, open_artifact(special), "transformer", profile, FakeCuda())
        return
    with pytest.raises(FmgError, match=r"ignores the bias 'proj_out\.bias', a known defect"):
        check_refit(trt, plan, open_artifact(special), "transformer", profile, FakeCuda())
