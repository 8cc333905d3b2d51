"""The exported transformer of FLUX.1-lite's shape, run in every possible way, beside eager torch and the roofline.

On a GPU: 8.2 B random parameters in bf16, 512 and 1024 px, 1 to 5 steps; eager, a CUDA graph of it, torch.compile in a
CUDA graph, and an engine of every flavour of TensorRT that is installed, built here from the exported graph. An engine
that cannot be built or run is part of the result, with the reason. Without a GPU: tiny shapes in fp32, ONNX Runtime in
place of the engines, which are built (TensorRT-RTX) and not run; those figures say nothing about speed.

    python benchmarks/gpu_export.py [--batch 1] [--repeats 10] [--no-compile] [--no-engines] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fmg.core.errors import FmgError
from fmg.core.events import ignore
from fmg.core.machine import machine
from fmg.export.graphs import GraphModule, GraphPlan, transformer_plan
from fmg.export.onnx import save_graph, trace
from fmg.export.tensorrt.build import EngineOptions
from fmg.export.tensorrt.worker import Job, build_engine
from fmg.export.weights import lay_out, write_weights
from fmg.inference.artifact.manifest import BATCH, IMAGE, TEXT
from fmg.inference.compiled import CompiledNetwork
from fmg.inference.cuda_device import CudaDevice
from fmg.inference.tensorrt.engine import Engine, RunOptions, open_device
from fmg.inference.tensorrt.flavours import FLAVOURS, Flavour, importable, load_module
from fmg.inference.tensorrt.records import Profile, ShapeRange
from fmg.models.flux.size import FLUX_LITE

RESULTS = Path(__file__).parent / "results" / "gpu_export.json"
STEPS = (1, 2, 3, 4, 5)
# Pixels along the side of a token: the autoencoder's eight, packed two by two
TOKEN = 16

Inputs = Mapping[str, Tensor]
Forward = Callable[[Inputs], Tensor]


@dataclass(frozen=True)
class Scale:
    """What is run: the shapes of the published model, or tiny ones."""

    name: str
    config: Mapping[str, Any]
    dtype: torch.dtype
    sides: tuple[int, ...]
    text: int


_CONVENTIONS = {"time_scale": 1.0, "second_time": "duration"}
FULL = Scale(
    "flux.1-lite, bf16",
    {**FLUX_LITE, **_CONVENTIONS, "axes_dims_rope": (16, 56, 56)},
    torch.bfloat16,
    (512, 1024),
    512,
)
TINY = Scale(
    "tiny, fp32: no GPU",
    {
        **FULL.config,
        "num_layers": 1,
        "num_single_layers": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 32,
        "axes_dims_rope": (8, 12, 12),
        "joint_attention_dim": 64,
        "pooled_projection_dim": 64,
    },
    torch.float32,
    (64, 128),
    16,
)


class Bench:
    """One transformer with random weights, its exported graph, and the ways of running it."""

    def __init__(self, scale: Scale, device: torch.device, batch: int, folder: Path) -> None:
        self.scale, self.device, self.batch, self.folder = scale, device, batch, folder
        self.plan = transformer_plan(scale.config, scale.dtype)
        self.module = _built(self.plan, device)
        self.onnx = folder / "transformer.onnx"
        self.engines: dict[str, dict[str, Any]] = {}
        self._gpu = CudaDevice(device) if device.type == "cuda" else None

    def export(self) -> float:
        """Writes graph and weights as `fmg export` does; returns the seconds."""
        began = time.perf_counter()
        traced, state = trace(self.plan), self.module.inner.state_dict()
        layout = lay_out({name: (self.plan.dtype, shape) for name, shape in traced.parameters.items()})
        weights = self.onnx.with_suffix(".safetensors")
        write_weights(weights, layout, lambda name: state[name].cpu())
        save_graph(traced, self.onnx, weights.name, layout.places)
        return time.perf_counter() - began

    def inputs(self, side: int) -> dict[str, Tensor]:
        """Standard normal states and the ids of a square image."""
        generator = torch.Generator().manual_seed(side)
        made = {}
        for spec in self.plan.inputs:
            shape = self._shape(spec.shape, side)
            made[spec.name] = torch.randn(shape, generator=generator).to(self.device)
        across = side // TOKEN
        rows, columns = torch.arange(across**2) // across, torch.arange(across**2) % across
        made["img_ids"] = torch.stack([0 * rows, rows, columns], dim=1).float().to(self.device)
        made["txt_ids"] = torch.zeros_like(made["txt_ids"])
        return made

    def ways(self, compiled: bool, engines: bool) -> Iterator[tuple[str, Callable[[Inputs], Forward]]]:
        """By name: a function that prepares a forward for inputs of one shape."""
        yield "eager", lambda inputs: self._eager
        if self._gpu is None:
            session = onnxruntime.InferenceSession(str(self.onnx), providers=["CPUExecutionProvider"])
            yield "onnxruntime", lambda inputs: lambda given: _by_onnxruntime(session, given)
        else:
            yield "cuda-graph", lambda inputs: self._captured(self._eager, inputs)
            if compiled:
                compiled = CompiledNetwork(self.module, self._gpu, instead="Give --no-compile.")
                yield "compile+cuda-graph", lambda inputs: lambda given: compiled(**given)
        for flavour in FLAVOURS.values() if engines else ():
            if (engine := self._engine(flavour)) is not None:
                yield flavour.backend, lambda inputs, engine=engine: lambda given: engine.run(given)["velocity"]

    def flops(self, side: int) -> int:
        """FLOPs of one forward, with attention as plain products, which the counter can count on any device."""
        counter = FlopCounterMode(display=False)
        with sdpa_kernel(SDPBackend.MATH), counter:
            self._eager(self.inputs(side))
        return int(counter.get_total_flops())

    def weight_bytes(self) -> int:
        """Bytes of weights, which every forward reads at least once."""
        return sum(parameter.nbytes for parameter in self.module.parameters())

    def _eager(self, given: Inputs) -> Tensor:
        output: Tensor = self.module(**given)
        return output

    def _captured(self, forward: Forward, inputs: Inputs) -> Forward:
        gpu = self._gpu
        assert gpu is not None
        held = {name: x.clone() for name, x in inputs.items()}
        with gpu.working():
            for _ in range(3):
                output = forward(held).clone()
        gpu.synchronize()
        replay = gpu.capture(lambda stream: output.copy_(forward(held)))

        def replayed(given: Inputs) -> Tensor:
            with gpu.working():
                for name, x in given.items():
                    held[name].copy_(x)
                replay()
                return output.clone()

        return replayed

    def _engine(self, flavour: Flavour) -> Engine | None:
        if not importable(flavour) or (self._gpu is None and not flavour.ahead_of_time):
            return None
        plan = self.folder / f"{flavour.name}.plan"
        profiles = tuple(self._profile(side) for side in self.scale.sides)
        job = Job(str(self.onnx), str(plan), flavour.name, profiles, EngineOptions().ingredients(), None)
        found = self.engines[flavour.backend] = {"built": False, "runs": False}
        try:
            built = build_engine(job, "transformer", ignore)
            found |= {"built": True, "seconds": round(built.seconds, 1), "bytes": plan.stat().st_size}
            engine = Engine(load_module(flavour), plan, open_device("auto"), RunOptions())
            engine.run(self.inputs(self.scale.sides[0]))
        except FmgError as error:
            found["reason"] = error.what
            return None
        found["runs"] = True
        return engine

    def _profile(self, side: int) -> Profile:
        shapes = {spec.name: self._shape(spec.shape, side) for spec in self.plan.inputs}
        return Profile(f"{side}px", {name: ShapeRange(shape, shape, shape) for name, shape in shapes.items()})

    def _shape(self, axes: tuple[int | str, ...], side: int) -> tuple[int, ...]:
        sizes = {BATCH: self.batch, IMAGE: (side // TOKEN) ** 2, TEXT: self.scale.text}
        return tuple(axis if isinstance(axis, int) else sizes[axis] for axis in axes)


def _built(plan: GraphPlan, device: torch.device) -> GraphModule:
    default = torch.get_default_dtype()
    torch.set_default_dtype(plan.dtype)
    torch.manual_seed(0)
    try:
        with torch.device(device):
            return plan.build().eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(default)


def _by_onnxruntime(session: onnxruntime.InferenceSession, given: Inputs) -> Tensor:
    return torch.from_numpy(session.run(None, {name: x.numpy() for name, x in given.items()})[0])


def draw(forward: Forward, inputs: Inputs, steps: int) -> Tensor:
    """Latents after `steps` average-velocity steps from 1 to 0."""
    x = inputs["hidden_states"]
    for step in range(steps):
        start, end = 1 - step / steps, 1 - (step + 1) / steps
        times = {
            "timestep": torch.full_like(inputs["timestep"], start),
            "second": torch.full_like(inputs["second"], end),
        }
        x = x - (start - end) * forward({**inputs, "hidden_states": x, **times})
    return x


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Wall time until the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def reached(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """FLOP/s of a large product and bytes/s of reading a large tensor: what this machine gives in practice."""
    side = 8192 if device.type == "cuda" else 512
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    large = torch.zeros(4 * side, side, device=device, dtype=dtype)
    product = min(seconds(lambda: a @ b, device) for _ in range(10))
    read = min(seconds(large.sum, device) for _ in range(10))
    return {"product_flops_per_s": 2 * side**3 / product, "read_bytes_per_s": large.nbytes / read}


def measured(bench: Bench, side: int, args: argparse.Namespace, ways: Mapping[str, Any]) -> dict[str, Any]:
    """Latency of every way at one resolution; each repeat runs all of them in turn."""
    inputs = bench.inputs(side)
    forwards = {name: prepare(inputs) for name, prepare in ways.items()}
    reference = draw(forwards["eager"], inputs, STEPS[-1])
    spent: dict[str, dict[int, list[float]]] = {name: {steps: [] for steps in STEPS} for name in forwards}
    # an engine records a shape at its second run and replays it from then on
    for turn in range(-2, args.repeats):
        for steps in STEPS:
            for name, forward in forwards.items():
                taken = seconds(lambda f=forward, k=steps: draw(f, inputs, k), bench.device)
                if turn >= 0:
                    spent[name][steps].append(1e3 * taken)
    result: dict[str, Any] = {}
    for name, forward in forwards.items():
        error = draw(forward, inputs, STEPS[-1]) - reference
        medians = {steps: statistics.median(times) for steps, times in spent[name].items()}
        quotients = {k: [e / t for e, t in zip(spent["eager"][k], spent[name][k], strict=True)] for k in STEPS}
        result[name] = {
            "ms_by_steps": {str(k): round(value, 3) for k, value in medians.items()},
            "times_faster_than_eager": {str(k): round(statistics.median(q), 3) for k, q in quotients.items()},
            "relative_l2_to_eager": float(error.float().norm() / reference.float().norm()),
        }
    return result


def roofline(bench: Bench, side: int, peak: Mapping[str, float], ways: Mapping[str, Any]) -> dict[str, Any]:
    """The least time of one forward here, and the share of it that each way reaches."""
    flops, size = bench.flops(side), bench.weight_bytes()
    floor = 1e3 * max(flops / peak["product_flops_per_s"], size / peak["read_bytes_per_s"])
    last = STEPS[-1]
    shares = {name: round(last * floor / found["ms_by_steps"][str(last)], 3) for name, found in ways.items()}
    return {"flops": flops, "weight_bytes": size, "floor_ms": round(floor, 3), "share": shares}


def store(report: Mapping[str, Any], path: Path) -> None:
    """Writes the results so far, so that an interruption loses only the current resolution."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--no-compile", action="store_true", help="skip torch.compile, which takes minutes")
    parser.add_argument("--no-engines", action="store_true", help="skip the engines")
    parser.add_argument("--folder", type=Path, help="temporary folder for graph and plans; 40 GB at full size")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    if args.batch < 1 or args.repeats < 1:
        parser.error("--batch and --repeats are at least 1")
    gpu = torch.cuda.is_available()
    if not gpu:
        print("No GPU: tiny shapes on the CPU. The comparisons are real, the figures of speed mean nothing.")
    device, scale = (torch.device("cuda", 0), FULL) if gpu else (torch.device("cpu"), TINY)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder, torch.no_grad():
        bench = Bench(scale, device, args.batch, Path(folder))
        report: dict[str, Any] = {"benchmark": "gpu_export", "scale": scale.name, "batch": args.batch}
        engines = not args.no_engines and any(map(importable, FLAVOURS.values()))
        if engines or not gpu:
            # only engines and ONNX Runtime read the graph
            report["export_seconds"] = round(bench.export(), 1)
        report["reached"] = reached(device, scale.dtype)
        ways = dict(bench.ways(not args.no_compile, engines))
        for side in scale.sides:
            found = measured(bench, side, args, ways)
            report[f"{side}px"] = {"ways": found, "roofline": roofline(bench, side, report["reached"], found)}
            report |= {"engines": bench.engines, "complete": side == scale.sides[-1], "machine": machine()}
            store(report, args.out)
    print(json.dumps(report, indent=2))
    allowed = 3e-2 if gpu else 1e-5
    distances = {
        f"{name} at {side} px": report[f"{side}px"]["ways"][name]["relative_l2_to_eager"]
        for side in scale.sides
        for name in ways
    }
    if wrong := [where for where, distance in distances.items() if not distance <= allowed]:
        sys.exit(f"failed: {', '.join(wrong)} not within {allowed:g} of eager")


if __name__ == "__main__":
    main()
