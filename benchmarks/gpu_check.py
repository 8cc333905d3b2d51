"""One rollout and one update of a FLUX.1-lite-shaped MeanFlow student with random weights, against the plan.

On a GPU: 8.2 B parameters made there in bf16, 512 px. Without one: tiny shapes in fp32, with a note; those figures say
nothing about speed. The JSON goes to benchmarks/results/gpu_check.json.

    python benchmarks/gpu_check.py [--images 16] [--micro-batch 4] [--out FILE]
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FluxPipeline
from memory_meter import MemoryMeter

from fmg.core.specs import ModelGeometry
from fmg.core.types import Conditioning, RewardOutput, ScoredRollout
from fmg.flow import LinearPath, TwoTimeMap
from fmg.flow.grids import make_grid
from fmg.models.common import adapter, roundtrip_check, saved_weights
from fmg.models.conventions import FlowMapConventions
from fmg.models.flux.model import FluxNetwork
from fmg.models.flux.size import FLUX_LITE, flux_geometry
from fmg.models.flux.transformer import FlowMapFluxTransformer2DModel
from fmg.recipe import Recipe
from fmg.registry import objectives, stochasticizers
from fmg.rl import group_advantages, refresh_old, replay_ratio, rollout
from fmg.training.compose import finite_attention
from fmg.training.launch import Sizes
from fmg.training.plan_memory import Memory, plan_memory
from fmg.training.update import Updater

RESULTS = Path(__file__).parent / "results" / "gpu_check.json"
STEPS, GROUP, RANK = 5, 4, 32
# Dense bf16 peak from the data sheets, in FLOP/s; for other GPUs only the share of a measured product is given.
DATA_SHEET = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "B200": 2250e12, "L40S": 362e12, "RTX 4090": 165e12}


@dataclass(frozen=True)
class Scale:
    """What is built: the shapes of the published student, or tiny ones."""

    transformer: dict[str, Any]
    vae_channels: tuple[int, ...]
    resolution: int
    text_tokens: int
    dtype: torch.dtype


FULL = Scale(dict(FLUX_LITE), (128, 256, 512, 512), 512, 256, torch.bfloat16)
TINY = Scale(
    {
        **FLUX_LITE,
        "num_layers": 2,
        "num_single_layers": 4,
        "num_attention_heads": 2,
        "attention_head_dim": 64,
        "axes_dims_rope": (16, 24, 24),
        "joint_attention_dim": 64,
        "pooled_projection_dim": 64,
    },
    (16, 32, 32, 32),
    64,
    16,
    torch.float32,
)


@dataclass(frozen=True)
class Policies:
    """Views of the student; the old policy is what the rollout recorded."""

    current: TwoTimeMap
    old: TwoTimeMap
    reference: TwoTimeMap


class Check:
    """The student on one device and the checks on it."""

    def __init__(self, scale: Scale, device: torch.device, images: int, micro_batch: int) -> None:
        self.scale, self.device, self.images = scale, device, images
        self.conventions = FlowMapConventions(
            schema=1,
            map="two-time",
            path="linear",
            time_scale=1.0,
            second_time="duration",
            resolution=scale.resolution,
            max_sequence_length=scale.text_tokens,
            default_steps=STEPS,
            default_grid="paper",
            guidance=3.5,
        )
        self.recipe = Recipe.default().with_(
            {
                "stochasticizer": {"name": "asfmc", "gap": 0.0147},
                "rollout.kind": "chain",
                "rollout.groups": images // GROUP,
                "rollout.group_size": GROUP,
                "rollout.steps": STEPS,
                "rollout.grid": "paper",
                "rollout.batch_size": min(images, micro_batch),
                "train.updates_per_iteration": 1,
                "train.micro_batch": micro_batch,
                "train.dtype": "bf16" if scale.dtype is torch.bfloat16 else "fp32",
                "lora.rank": RANK,
            }
        )
        self.transformer, self.vae = _build(scale, device)
        adapter.attach(self.transformer, RANK, 2.0 * RANK, ["attention"], 0.0, seed=0)
        self.sizes = Sizes(min(images, micro_batch), micro_batch)
        options = self.recipe.stochasticizer.config
        self.stochasticizer = stochasticizers.build_config("asfmc", options)
        self.objective = objectives.build_config("grpo", self.recipe.objective.config).bind(self.stochasticizer)
        layers = adapter.tuner_layers(self.transformer)
        off = _view(self.transformer, scale.dtype, lambda: adapter.adapter_switched(layers, enabled=False))
        on = _view(self.transformer, scale.dtype, nullcontext)
        self.policies = Policies(on, on, off)
        self.side = scale.resolution // 8
        self.geometry = self._geometry()

    def _geometry(self) -> ModelGeometry:
        with tempfile.TemporaryDirectory() as folder:
            for name, module in (("transformer", self.transformer), ("vae", self.vae)):
                module.save_config(str(Path(folder) / name))
            stated = flux_geometry(Path(folder), self.conventions, checkpointing=True, encoders_resident=False)
        return replace(stated, decoder_parameters=sum(p.numel() for p in self.vae.parameters()))

    def run(self) -> dict[str, Any]:
        """Every check, in order, as one JSON object."""
        self._rollout()
        drawn, rollout_s = self._timed(self._rollout)
        noise = torch.randn(self.images, generator=torch.Generator().manual_seed(0))
        advantages = group_advantages(noise, drawn.groups, global_std=True, clip_max=5.0)
        scored = ScoredRollout(drawn, RewardOutput(noise, {}), advantages)
        batch = self.objective.prepare(scored, self.policies, 0)
        micro = self.sizes.micro_batch
        before = replay_ratio(self.stochasticizer, self.policies, batch, micro)
        batch = refresh_old(self.stochasticizer, self.policies, batch, micro)
        after = replay_ratio(self.stochasticizer, self.policies, batch, micro)
        parameters = list(adapter.adapter_parameters(self.transformer).items())
        optimizer = torch.optim.AdamW([p for _, p in parameters], lr=1e-4)
        updater = Updater(self.objective, self.policies, optimizer, [p for _, p in parameters], 1.0, micro)
        start = {name: p.detach().clone() for name, p in parameters}
        logged, update_s = self._timed(lambda: updater.update(batch))
        moved = max(float((p.detach() - start[name]).abs().max()) for name, p in parameters)
        calls, rows, flops = self.images * STEPS, len(batch), self.geometry.call_flops
        clip = self.recipe.objective.config.model_dump()["clip_range"]
        return {
            "parameters": self.geometry.parameters,
            "trainable": sum(p.numel() for _, p in parameters),
            "rollout": {"images": self.images, "calls": calls, "seconds": rollout_s, "flops": calls * flops},
            # forward, the forward again under checkpointing, and the gradient of the activations
            "update": {"rows": rows, "seconds": update_s, "flops": 3 * rows * flops},
            "replay": {
                "ratio_error_of_the_rollout": before,
                "ratio_error_recomputed": after,
                "clip_range": clip,
                "holds": after <= 0.1 * clip,
            },
            "moved": moved,
            "loss": logged["loss"],
            "lora": self._save_and_reload(),
        }

    def planned(self) -> Memory:
        """The plan for what `run` does."""
        return plan_memory(self.recipe, self.geometry, self.sizes)

    def _rollout(self) -> Any:
        generator = torch.Generator().manual_seed(1)
        joint = self.scale.transformer["joint_attention_dim"]
        pooled = self.scale.transformer["pooled_projection_dim"]
        texts = tuple(f"prompt {i // GROUP}" for i in range(self.images))
        tensors = {
            "tokens": torch.randn(self.images, self.scale.text_tokens, joint, generator=generator),
            "pooled": torch.randn(self.images, pooled, generator=generator),
        }
        cond = Conditioning(texts, {name: x.to(self.device, self.scale.dtype) for name, x in tensors.items()})
        return rollout(
            self.policies.current,
            self.stochasticizer,
            cond,
            torch.arange(self.images) // GROUP,
            make_grid("paper", STEPS, image_tokens=(self.side // 2) ** 2),
            seed=0,
            latent_shape=(16, self.side, self.side),
            batch_size=self.sizes.rollout_batch,
            device=self.device,
        )

    @torch.no_grad()
    def _save_and_reload(self) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as parent:
            folder = Path(parent) / "adapter"
            base = saved_weights.BaseReference(name="random", digest="0" * 64)
            saved_weights.save_adapter(folder, self.transformer, FluxPipeline, base, self.conventions, lambda _: None)
            size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
            stock = _view(
                roundtrip_check.reloaded(self.transformer, folder, FluxPipeline), self.scale.dtype, nullcontext
            )
        noise = roundtrip_check.image_noise((16, self.side, self.side), self.device)
        cond = self._rollout().cond.select(torch.zeros(1, dtype=torch.long))
        start, end = torch.ones(1, device=self.device), torch.zeros(1, device=self.device)
        ours, theirs = (view.jump(noise, start, end, cond) for view in (self.policies.current, stock))
        difference = float((ours - theirs).abs().mean() / ours.abs().mean())
        return {"bytes": size, "relative_difference": difference, "holds": difference < 0.02}

    def _timed(self, work: Callable[[], Any]) -> tuple[Any, float]:
        self._drain()
        started = time.perf_counter()
        result = work()
        self._drain()
        return result, time.perf_counter() - started

    def _drain(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _build(scale: Scale, device: torch.device) -> tuple[Any, Any]:
    default = torch.get_default_dtype()
    torch.set_default_dtype(scale.dtype)
    try:
        torch.manual_seed(0)
        with torch.device(device):
            transformer = FlowMapFluxTransformer2DModel(time_scale=1.0, second_time="duration", **scale.transformer)
            vae = AutoencoderKL(
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
                block_out_channels=scale.vae_channels,
                layers_per_block=2,
                latent_channels=16,
                norm_num_groups=min(32, scale.vae_channels[0]),
            )
    finally:
        torch.set_default_dtype(default)
    for module in (transformer, vae):
        module.eval().requires_grad_(False)
    transformer.enable_gradient_checkpointing()
    return transformer, vae


def _view(transformer: Any, dtype: torch.dtype, scope: Callable[[], AbstractContextManager[None]]) -> TwoTimeMap:
    return TwoTimeMap(FluxNetwork(transformer, dtype, 3.5, scope).two_time, LinearPath())


def _product_flops(device: torch.device) -> float:
    """FLOP/s of a large bf16 matrix product, the most that this machine reaches in practice."""
    side, rounds = 8192, 10
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    a @ b
    torch.cuda.synchronize(device)
    started = time.perf_counter()
    for _ in range(rounds):
        a @ b
    torch.cuda.synchronize(device)
    return rounds * 2 * side**3 / (time.perf_counter() - started)


def _machine(device: torch.device) -> dict[str, Any]:
    versions = {name: importlib.metadata.version(name) for name in ("torch", "diffusers", "transformers", "peft")}
    machine: dict[str, Any] = {"python": platform.python_version(), "cpu": platform.machine(), **versions}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        machine |= {"gpu": properties.name, "gpu_memory_bytes": properties.total_memory, "cuda": torch.version.cuda}
    return machine


def _shares(report: dict[str, Any], device: torch.device, name: str) -> None:
    measured = _product_flops(device)
    sheet = next((peak for key, peak in DATA_SHEET.items() if key in name), None)
    for stage in ("rollout", "update"):
        rate = report[stage]["flops"] / report[stage]["seconds"]
        report[stage] |= {"flops_per_s": rate, "share_of_measured_product": rate / measured}
        report[stage] |= {} if sheet is None else {"share_of_data_sheet_peak": rate / sheet}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=16, help=f"a multiple of {GROUP}")
    parser.add_argument("--micro-batch", type=int, default=4)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    if args.images < GROUP or args.images % GROUP:
        parser.error(f"--images must be a multiple of {GROUP}")
    gpu = torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    if not gpu:
        print("No GPU: tiny shapes on the CPU. The checks are real, the figures of speed mean nothing.")
    check = Check(FULL if gpu else TINY, device, args.images, args.micro_batch)
    weights = sum(p.nbytes for module in (check.transformer, check.vae) for p in module.parameters())
    meter = MemoryMeter()
    with finite_attention(), nullcontext() if gpu else meter:
        report = check.run()
    peak = torch.cuda.max_memory_allocated(device) if gpu else weights + meter.peak
    planned = check.planned()
    machine = _machine(device)
    report |= {
        "memory": {"measured_peak": peak, "planned_peak": planned.peak, "planned_parts": dict(planned.parts)},
        "machine": machine,
        "scale": "flux.1-lite, 512 px, bf16" if gpu else "tiny, fp32: no GPU",
    }
    report["memory"]["planned_over_measured"] = planned.peak / peak
    if gpu:
        _shares(report, device, machine["gpu"])
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(report, indent=2))
    failed = [name for name in ("replay", "lora") if not report[name]["holds"]]
    if failed or report["moved"] == 0:
        sys.exit(f"failed: {', '.join(failed) or 'the update moved nothing'}")


if __name__ == "__main__":
    main()
