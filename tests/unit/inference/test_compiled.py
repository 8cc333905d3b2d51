"""The compiled network: the images of torch, few compilations, and recordings that follow weights and adapter.

Shapes, compilations and equality are tested with the compiler that runs the traced graph as it is, which takes no C++
compiler and no minute. One test runs inductor.
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import fmg
from fmg.core.errors import CompositionError, FmgWarning, GateError, MissingDependencyError, UsageError
from fmg.core.profiling import TOTAL, TRANSFORMER, WARM_UP, StageClock, wall_clock
from fmg.inference import compiled
from fmg.inference.compiled import CompiledNetwork, TorchCompileBackend, bucket, check_compiler
from fmg.inference.generator import Generated, Generator
from fmg.inference.loading import find, pick_backend
from fmg.inference.openers import TorchCompileOpener, TorchOpener
from fmg.inference.parity import check_same_images
from fmg.inference.torch_backend import TorchBackend
from fmg.models.flux.model import FluxModel
from tests.support.cli import fmg as cli
from tests.tiny_flux import build_tiny_flux

pytestmark = pytest.mark.compile

CPU = torch.device("cpu")
PROMPTS = ["red", "a red", "blue", "green", "a"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_flux(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(autouse=True)
def _own_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Traced graphs run as they are, with a cache of their own; nothing compiled stays for the next test."""
    monkeypatch.setenv("FMG_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    monkeypatch.setattr(compiled, "COMPILER", "eager")
    yield
    # the reset must not meet a GPU that a test pretends to have
    monkeypatch.undo()
    torch._dynamo.reset()


@pytest.fixture
def model(folder: Path) -> FluxModel:
    return FluxModel.from_folder(folder, CPU, torch.float32, name="tiny")


def generated(backend: TorchBackend, rows: int, batch: int = 64) -> Generated:
    prompts = PROMPTS[:rows]
    return Generator(backend, "uniform", 2, batch).generate(prompts, list(range(rows)), progress=False)


def same(ours: Generated, theirs: Generated) -> None:
    check_same_images(ours.image_array, theirs.image_array, "fp32", "Images", "Look into it.")


def shake(model: FluxModel, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in model.trainable():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


class Cuda:
    """`fmg.inference.cuda_device.Device` on the CPU: a recording holds what was queued, with the tensors it used."""

    torch_device = CPU

    def __init__(self, refuses: bool = False) -> None:
        self.recordings = self.replays = 0
        self._refuses = refuses

    @contextmanager
    def working(self) -> Iterator[int]:
        yield 7

    def synchronize(self) -> None:
        return None

    def capture(self, enqueue: Callable[[int], None]) -> Callable[[], None]:
        if self._refuses:
            raise RuntimeError("operation not permitted when stream is capturing")
        self.recordings += 1

        def replay() -> None:
            self.replays += 1
            enqueue(7)

        return replay

    def clock(self) -> StageClock[Any]:
        return wall_clock()

    def reset_peak_memory(self) -> None:
        return None

    def peak_memory(self) -> int:
        return 0

    def free_memory(self) -> int:
        return 0


class Affine(nn.Module):
    """A network of two weights."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([2.0, 3.0]))
        self.register_buffer("shift", torch.tensor([1.0, 0.0]))

    def forward(self, *, x: Tensor, t: Tensor, flip: bool = False) -> tuple[Tensor, Tensor]:
        y = self.weight * x + self.shift + t[:, None]
        return (-y if flip else y), t


def test_buckets_are_powers_of_two() -> None:
    assert [bucket(rows) for rows in (1, 2, 3, 4, 5, 8, 9, 64)] == [1, 2, 4, 4, 8, 8, 16, 64]


@pytest.mark.slow
def test_images_are_those_of_torch_with_one_compilation_for_each_bucket(model: FluxModel) -> None:
    ours, theirs = TorchCompileBackend(model), TorchBackend(model)
    for rows, compilations in ((3, 1), (4, 1), (1, 2), (1, 2)):
        same(generated(ours, rows), generated(theirs, rows))
        assert ours.network.compilations == compilations
    # a batch of four and a short last one of one row
    same(generated(ours, 5, batch=4), generated(theirs, 5, batch=4))
    assert ours.network.compilations == 2
    assert ours.detail.startswith("eager, 2 compilations in ")


@pytest.mark.slow
def test_compiling_is_not_part_of_the_time(model: FluxModel) -> None:
    backend = TorchCompileBackend(model)
    first, second = (generated(backend, 2).timings_ms for _ in range(2))
    assert first[WARM_UP] > first[TRANSFORMER] > 0
    assert first[TOTAL] == pytest.approx(sum(first.values()) - first[TOTAL] - first[WARM_UP])
    assert WARM_UP not in second


@pytest.mark.slow
def test_compilations_are_bounded_with_one_warning(model: FluxModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "MAX_COMPILATIONS", 2)
    ours, theirs = TorchCompileBackend(model), TorchBackend(model)
    generated(ours, 1)
    generated(ours, 2)
    with pytest.warns(
        FmgWarning,
        match=r"was compiled 2 times, for different shapes\. Further shapes .* hidden_states \(4, 16, 64\), ",
    ):
        same(generated(ours, 4), generated(theirs, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        same(generated(ours, 5), generated(theirs, 5))
        same(generated(ours, 2), generated(theirs, 2))
    assert ours.network.compilations == 2


@pytest.mark.slow
def test_a_lora_in_training_is_followed_without_compiling_again(model: FluxModel) -> None:
    model.attach_adapter(2, 4.0, ["attention"], 0.0, seed=0)
    ours, theirs = TorchCompileBackend(model), TorchBackend(model)
    before = generated(ours, 2)
    optimizer = torch.optim.SGD([p for _, p in model.trainable()], lr=0.1)
    for seed in (1, 2):
        shake(model, seed)
        x = torch.randn(2, *model.latent_shape)
        t = torch.tensor([1.0, 0.5])
        model.flow_map.jump(x, t, t / 2, model.encode(PROMPTS[:2])).square().mean().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        model.snapshot()
        same(generated(ours, 2), generated(theirs, 2))
    assert ours.network.compilations == 1
    assert abs(before.image_array - generated(ours, 2).image_array).max() > 1e-3
    # without the adapter it is another graph
    for compilations in (2, 2):
        with model.adapter_enabled(False):
            same(generated(ours, 2), generated(theirs, 2))
        same(generated(ours, 2), generated(theirs, 2))
        assert ours.network.compilations == compilations


@pytest.mark.slow
@pytest.mark.parametrize("trained", ["lora", "full"])
def test_recordings_follow_weights_inputs_and_adapter(model: FluxModel, trained: str) -> None:
    if trained == "lora":
        model.attach_adapter(2, 4.0, ["attention"], 0.0, seed=0)
    else:
        model.unfreeze("full")
    gpu = Cuda()
    ours, theirs = TorchCompileBackend(model), TorchBackend(model)
    ours.network._gpu = gpu
    for seed in (1, 2):
        shake(model, seed)
        for rows in (2, 4):
            same(generated(ours, rows), generated(theirs, rows))
    # two steps of two batches for each of two values of the weights, and one call for each compilation
    assert (gpu.recordings, gpu.replays) == (2, 10)
    with model.adapter_enabled(False):
        same(generated(ours, 2), generated(theirs, 2))
    same(generated(ours, 2), generated(theirs, 2))


def test_a_recording_is_made_again_where_parameters_move_and_its_results_stay() -> None:
    module, gpu = Affine(), Cuda()
    network = CompiledNetwork(module, gpu)
    t = torch.tensor([0.5, 1.0])
    first, _ = network(x=torch.ones(2, 2), t=t)
    second, _ = network(x=torch.zeros(2, 2), t=t)
    torch.testing.assert_close(first, torch.tensor([[3.5, 3.5], [4.0, 4.0]]))
    torch.testing.assert_close(second, torch.tensor([[1.5, 0.5], [2.0, 1.0]]))
    module.shift += 1  # type: ignore[operator]
    torch.testing.assert_close(network(x=torch.zeros(2, 2), t=t)[0], second + 1)
    assert gpu.recordings == 1
    module.weight.data = torch.tensor([0.0, 1.0])
    torch.testing.assert_close(network(x=torch.ones(2, 2), t=t)[0], module(x=torch.ones(2, 2), t=t)[0])
    assert gpu.recordings == 2
    # an option of another value, and one tensor for two arguments
    torch.testing.assert_close(network(x=torch.ones(2, 2), t=t, flip=True)[0], -module(x=torch.ones(2, 2), t=t)[0])
    assert network.compilations == 2
    both = torch.ones(2)
    torch.testing.assert_close(network(x=both, t=both)[0], module(x=both, t=both)[0])


def test_what_cannot_be_recorded_runs_compiled_with_one_warning() -> None:
    module = Affine()
    network = CompiledNetwork(module, Cuda(refuses=True))
    x, t = torch.ones(2, 2), torch.zeros(2)
    with pytest.warns(FmgWarning, match="not recorded as a CUDA graph: operation not permitted when stream"):
        torch.testing.assert_close(network(x=x, t=t), module(x=x, t=t))
    torch.testing.assert_close(network(x=2 * x, t=t), module(x=2 * x, t=t))


class Broken(nn.Module):
    def forward(self, *, x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return 2 * x


def test_what_cannot_be_compiled_runs_eagerly_or_is_an_error() -> None:
    x = torch.ones(2)
    network = CompiledNetwork(Broken())
    with pytest.warns(FmgWarning, match="is no longer compiled and runs eagerly: Call to `torch._dynamo"):
        assert torch.equal(network(x=x), 2 * x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(network(x=x), 2 * x)
    with pytest.raises(CompositionError, match=r"cannot be compiled here: .* Set eval\.backend to torch\."):
        CompiledNetwork(Broken(), instead="Set eval.backend to torch.")(x=x)


class Fickle(nn.Module):
    """A network with a number that torch compiles into the graph."""

    factor = 1

    def forward(self, *, x: Tensor) -> Tensor:
        return self.factor * x


@pytest.mark.slow
def test_a_network_that_keeps_changing_is_given_up() -> None:
    module, x = Fickle(), torch.ones(2)
    network = CompiledNetwork(module)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always", FmgWarning)
        for factor in range(compiled.MAX_COMPILATIONS + 4):
            module.factor = factor
            assert torch.equal(network(x=x), factor * x)
    assert [str(w.message) for w in heard] == [
        "The network is no longer compiled and runs eagerly: it was compiled 16 times, because its adapter, its"
        " precision or the number of its weights keeps changing (TORCH_LOGS=recompiles shows why)"
    ]
    assert network.compilations == compiled.MAX_COMPILATIONS


@pytest.mark.slow
def test_networks_of_one_class_do_not_share_a_limit() -> None:
    for _ in range(compiled.MAX_COMPILATIONS + 2):
        module = Affine()
        network = CompiledNetwork(module, instead="Do not.")
        x, t = torch.ones(2, 2), torch.zeros(2)
        torch.testing.assert_close(network(x=x, t=t), module(x=x, t=t))
        assert network.compilations == 1


def test_a_missing_compiler_is_one_line_that_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import cpp_builder, exc

    def missing() -> str:
        raise exc.InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", missing)
    done = cli("generate", "a red circle", "--from", "meanflow-shapes", "--backend", "torch-compile")
    assert (done.code != 0, done.stdout) == (True, "")
    assert "torch.compile needs a C++ compiler, but found none" in done.stderr
    assert "apt-get install g++" in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
    with pytest.raises(MissingDependencyError, match=r"or set eval\.backend to torch"):
        check_compiler(CPU, "set eval.backend to torch")


def test_a_gpu_needs_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match="on a GPU needs triton"):
        check_compiler(torch.device("cuda"))


def test_auto_compiles_on_a_gpu_and_only_models_whose_shapes_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    target = find("meanflow-shapes")
    assert isinstance(pick_backend(target), TorchOpener)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(compiled, "check_compiler", lambda device: None)
    assert isinstance(pick_backend(target), TorchCompileOpener)
    assert isinstance(pick_backend(target, device="cuda:0", options={"dtype": "bf16"}), TorchCompileOpener)
    assert isinstance(pick_backend(target, device="cpu"), TorchOpener)
    assert isinstance(pick_backend(target, "torch"), TorchOpener)
    assert isinstance(pick_backend(find("z-image-turbo")), TorchOpener)

    def refuses(device: torch.device) -> None:
        raise MissingDependencyError("no compiler", "Install one.")

    monkeypatch.setattr(compiled, "check_compiler", refuses)
    assert isinstance(pick_backend(target), TorchOpener)


def test_a_model_that_nothing_replaces_is_refused() -> None:
    with pytest.raises(UsageError, match=r"This model cannot be compiled: object\. Use --backend torch"):
        TorchCompileBackend(object())  # type: ignore[arg-type]


@pytest.mark.slow
def test_evaluations_of_a_run_are_checked_against_torch(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = fmg.Recipe.default(
        model={"name": "meanflow-shapes", "folder": str(folder)},
        **{
            "rewards": ["jpeg-compressibility"],
            "rollout.groups": 2,
            "rollout.group_size": 4,
            "train.iterations": 2,
            "optimizer.lr": 0.1,
            "eval.every": 1,
            "eval.num": 3,
            "eval.rewards": [],
            "eval.backend": "torch-compile",
        },
    )
    heard: list[Any] = []
    fmg.train(recipe, tmp_path / "run", heard.append)
    said = [event.text for event in heard if hasattr(event, "text")]
    assert len([text for text in said if text.startswith("Images by torch-compile checked: within")]) == 2
    # a backend that stays behind is found at the second evaluation, when the adapter is no longer zero
    monkeypatch.setattr(compiled, "PaddedBatches", lambda flow_map, rows: _Scaled(flow_map))
    with pytest.raises(GateError, match="Images by torch-compile differ from torch's"):
        fmg.train(recipe, tmp_path / "wrong", heard.append)


class _Scaled:
    """A map with an error in it."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self.anchors, self.path = inner.anchors, inner.path

    def jump(self, *args: Any) -> Tensor:
        jumped: Tensor = 1.2 * self._inner.jump(*args)
        return jumped


@pytest.mark.slow
def test_the_commands_take_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for backend in ("torch", "torch-compile"):
        done = cli(
            "generate",
            "a red circle",
            "--from",
            "meanflow-shapes",
            "--backend",
            backend,
            "--num",
            "3",
            "--out",
            backend,
        )
        assert done.code == 0, done.stderr
    assert "backend torch-compile: eager" in done.stderr
    for ours, theirs in zip(sorted(Path("torch-compile").iterdir()), sorted(Path("torch").iterdir()), strict=True):
        # three images are padded to four, which rounds otherwise
        pixels = [np.asarray(Image.open(file), np.int16) for file in (ours, theirs)]
        assert np.abs(pixels[0] - pixels[1]).max() <= 1
    done = cli("bench", "meanflow-shapes", "--compare", "torch,torch-compile", "--repeats", "2", "--batch-size", "2")
    assert done.code == 0, done.stderr
    assert "torch-compile" in done.stdout
    common = ("eval", "meanflow-shapes", "--num", "8", "--batch-size", "4", "--json")
    assert cli(*common, "--backend", "torch-compile").stdout == cli(*common).stdout
    done = cli(*common, "--backend", "onnxruntime")
    assert (done.code, done.stdout) == (2, "")
    assert "The backend 'onnxruntime' runs exported artifacts" in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs g++")
def test_inductor_gives_the_images_of_torch(model: FluxModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "COMPILER", "inductor")
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    model.attach_adapter(2, 4.0, ["attention"], 0.0, seed=0)
    shake(model, 1)
    ours, theirs = TorchCompileBackend(model), TorchBackend(model)
    for seed in (2, 3):
        same(generated(ours, 2), generated(theirs, 2))
        shake(model, seed)
    assert ours.network.compilations == 1
    # torch keeps its kernels where fmg keeps its files, unless it was told otherwise
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "cache" / "inductor")
    assert any((tmp_path / "cache" / "inductor").iterdir())
