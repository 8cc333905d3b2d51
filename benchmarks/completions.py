"""What completions on another backend save: torch, torch-compile and ONNX Runtime in turn, iteration by iteration.

Each backend trains its own model in one process, and their iterations alternate, so the ratios hold when the machine's
speed drifts. Times are CPU time of one thread; those of completions include putting the new weights in place. The cost
before the first iteration is stated separately: a trace if the cache has none, or a compilation with the processes of
its compiler.

    python benchmarks/completions.py [--model meanflow-shapes] --out benchmarks/results/completions.json
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fmg import Recipe
from fmg.core.machine import machine
from fmg.core.protocols import Anchors, FlowMap, ProbabilityPath
from fmg.core.types import Conditioning
from fmg.data.run_folder import RunFolder
from fmg.training.completing import Completer, open_completer
from fmg.training.compose import compose
from fmg.training.distributed import DistContext
from fmg.training.launch import choose_sizes
from fmg.training.trainer import Trainer

BACKENDS = ("torch", "torch-compile", "onnxruntime")


@dataclass
class Clocked:
    """A completer that counts the CPU seconds of its calls and of taking over weights."""

    inner: Completer
    spent: float = 0.0
    refreshed: float = 0.0

    @property
    def anchors(self) -> Anchors:
        """Those of the map."""
        return self.inner.flow_map.anchors

    @property
    def path(self) -> ProbabilityPath:
        """That of the map."""
        return self.inner.flow_map.path

    def jump(self, x_t: torch.Tensor, t: torch.Tensor, s: torch.Tensor, cond: Conditioning) -> torch.Tensor:
        """As the map, timed."""
        start = time.process_time()
        after = self.inner.flow_map.jump(x_t, t, s, cond)
        self.spent += time.process_time() - start
        return after

    def velocity(self, x_t: torch.Tensor, t: torch.Tensor, cond: Conditioning) -> torch.Tensor:
        """As the map."""
        return self.inner.flow_map.velocity(x_t, t, cond)

    def refresh(self) -> None:
        """As the completer, timed."""
        start = time.process_time()
        self.inner.refresh()
        self.refreshed += time.process_time() - start

    @property
    def flow_map(self) -> FlowMap:
        """This object."""
        return self


@dataclass
class Arm:
    """One backend: its trainer and what was measured."""

    trainer: Trainer
    clock: Clocked
    setup_s: float
    reopened_s: float | None
    rows: list[dict[str, float]] = field(default_factory=list)

    def iterate(self, iteration: int) -> None:
        """One timed iteration."""
        self.clock.spent = self.clock.refreshed = 0.0
        start = time.process_time()
        self.trainer.iterate(iteration)
        whole = time.process_time() - start
        completions = self.clock.spent + self.clock.refreshed
        self.rows.append({"completions_s": completions, "weights_s": self.clock.refreshed, "iteration_s": whole})


def cpu() -> float:
    """CPU seconds of this process and of those that it has waited for."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def opened(backend: str, args: argparse.Namespace, folder: Path) -> Arm:
    """The trainer of a backend after its first iteration, which compiles and checks."""
    recipe = Recipe.default(
        model=args.model,
        **{
            "rollout.kind": "branch",
            "rollout.branch.backend": backend,
            "rollout.branch.completion": args.completion,
            "rollout.groups": args.groups,
            "rollout.group_size": args.group_size,
        },
    )
    composed = compose(recipe, torch.device("cpu"), torch.float32)
    sizes = choose_sizes(recipe, "cpu")
    start = cpu()
    trainer = Trainer(composed, RunFolder.create(folder / backend, args.model), sizes, lambda event: None)
    sampler: Any = trainer._sampler
    completer = sampler._completer or Completer(composed.model.flow_map, lambda: None)
    built = cpu() - start
    clock = Clocked(completer)
    if backend == "torch-compile":
        # the first call compiles
        start = cpu()
        x = torch.zeros(1, *composed.model.latent_shape)
        cond = composed.model.encode([composed.prompts[0].text])
        completer.flow_map.jump(x, torch.ones(1), torch.zeros(1), cond)
        built += cpu() - start
    trainer.iterate(0)
    trainer.iterate(1)
    sampler._completer = clock
    reopened = None
    if backend == "onnxruntime":
        start = cpu()
        open_completer(composed, sizes.rollout_batch, DistContext())
        reopened = cpu() - start
    return Arm(trainer, clock, built, reopened)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="meanflow-shapes")
    parser.add_argument("--completion", default="jump", choices=["jump", "grid"])
    parser.add_argument("--groups", type=int, default=24)
    parser.add_argument("--group-size", type=int, default=16)
    parser.add_argument("--iterations", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="file for the result, besides stdout")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    where = machine()
    with tempfile.TemporaryDirectory() as folder:
        # an empty cache: the cost of the first use is measured too
        os.environ["FMG_CACHE"] = os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
        arms = {backend: opened(backend, args, Path(folder)) for backend in BACKENDS}
        for iteration in range(2, args.iterations + 2):
            for arm in arms.values():
                arm.iterate(iteration)
    result = {
        "benchmark": "completions",
        "model": args.model,
        "completion": args.completion,
        "siblings": args.groups * args.group_size,
        "iterations": args.iterations,
        "threads": args.threads,
        "machine": where,
        "backends": {backend: summary(arm, arms["torch"]) for backend, arm in arms.items()},
    }
    text = json.dumps(result, indent=2)
    print(text)
    if args.out is not None:
        args.out.write_text(text + "\n", encoding="utf-8")


def summary(arm: Arm, torch_arm: Arm) -> dict[str, float | None]:
    """Medians in CPU seconds, and medians of the ratios torch : backend of the same iteration."""

    def median(key: str) -> float:
        return statistics.median(row[key] for row in arm.rows)

    def ratio(key: str) -> float:
        return statistics.median(t[key] / row[key] for t, row in zip(torch_arm.rows, arm.rows, strict=True))

    saved = statistics.median(
        t["iteration_s"] - row["iteration_s"] for t, row in zip(torch_arm.rows, arm.rows, strict=True)
    )
    return {
        "setup_s": round(arm.setup_s, 2),
        "setup_again_s": None if arm.reopened_s is None else round(arm.reopened_s, 2),
        "completions_s": round(median("completions_s"), 4),
        "weights_s": round(median("weights_s"), 4),
        "iteration_s": round(median("iteration_s"), 4),
        "completions_ratio": round(ratio("completions_s"), 3),
        "iteration_ratio": round(ratio("iteration_s"), 3),
        "iterations_to_pay_setup": round(arm.setup_s / saved, 1) if saved > 0 and arm is not torch_arm else None,
    }


if __name__ == "__main__":
    main()
