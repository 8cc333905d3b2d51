"""Overhead of the training loop: wall time of an iteration against bare network calls of the same shapes.

Both run interleaved in one process, so the ratio holds when the machine's speed drifts.

    python benchmarks/overhead.py [--model meanflow-shapes] [--iterations 8] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from pathlib import Path

import torch

from fmg import Recipe
from fmg.core.types import Conditioning
from fmg.data.run_folder import RunFolder
from fmg.inference.torch_backend import pick_device
from fmg.training.compose import Composed, compose
from fmg.training.launch import Sizes, choose_sizes
from fmg.training.trainer import Trainer


def bare_calls(composed: Composed, sizes: Sizes) -> float:
    """Seconds of the network calls of one iteration: N forwards per sample, and forward + backward on every row."""
    recipe, model = composed.recipe, composed.model
    samples = recipe.rollout.groups * recipe.rollout.group_size
    prompt = composed.prompts[0].text
    calls, transitions = recipe.rollout.steps, recipe.rollout.steps - 1
    cond = model.encode([prompt] * sizes.rollout_batch)
    start = time.perf_counter()
    for _ in range(calls):
        with torch.no_grad():
            for rows in _chunks(samples, sizes.rollout_batch):
                _call(composed, cond, rows)
    parts = samples * transitions
    per_update = parts // recipe.train.updates_per_iteration
    for _ in range(recipe.train.updates_per_iteration):
        for rows in _chunks(per_update, sizes.micro_batch):
            _call(composed, cond, rows).square().mean().backward()
    spent = time.perf_counter() - start
    for _, parameter in model.trainable():
        parameter.grad = None
    return spent


def _chunks(total: int, size: int) -> list[int]:
    return [min(size, total - start) for start in range(0, total, size)]


def _call(composed: Composed, cond: Conditioning, rows: int) -> torch.Tensor:
    model = composed.model
    x = torch.zeros(rows, *model.latent_shape)
    return model.flow_map.jump(x, torch.ones(rows), torch.zeros(rows), cond.select(torch.arange(rows)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="meanflow-shapes")
    parser.add_argument("--iterations", type=int, default=8)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    recipe = Recipe.default(model=args.model)
    device = pick_device("cpu")
    composed = compose(recipe, device, torch.float32)
    sizes = choose_sizes(recipe, device.type)
    loop, bare = [], []
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(composed, RunFolder.create(Path(folder) / "run", args.model), sizes, lambda event: None)
        for iteration in range(args.iterations + 1):
            bare.append(bare_calls(composed, sizes))
            start = time.perf_counter()
            trainer.iterate(iteration)
            loop.append(time.perf_counter() - start)
    ratios = [a / b for a, b in zip(loop[1:], bare[1:], strict=True)]
    result = {
        "benchmark": "overhead",
        "model": args.model,
        "iteration_s": statistics.median(loop[1:]),
        "bare_calls_s": statistics.median(bare[1:]),
        "ratio": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "torch": torch.__version__,
    }
    print(json.dumps(result, indent=2))
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
