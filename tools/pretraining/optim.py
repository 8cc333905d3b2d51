"""Optimiser pieces shared by the stages: Muon for block matrices, AdamW for the rest, cosine schedule."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fmg.training.update import Ema


def cosine(step: int, total: int, warmup: int, floor: float = 0.02) -> float:
    """Learning-rate factor: linear warm-up, then a half cosine from 1 to `floor`."""
    if step < warmup:
        return (step + 1) / warmup
    phase = (step - warmup) / max(1, total - warmup)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * phase))


class Fp32Muon(torch.optim.Optimizer):
    """`torch.optim.Muon` with its Newton-Schulz iteration in fp32, batched over matrices of one shape.

    torch's own iterates in bf16, whose products take 27 times as long as fp32 on a CPU without bf16 arithmetic, and two
    thirds of a training step of these small models. Steps are the same up to the rounding of bf16 (tested).
    """

    def __init__(self, params: Iterable[nn.Parameter], lr: float, momentum: float, weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every matrix that has a gradient."""
        for group in self.param_groups:
            updates: dict[torch.Size, list[tuple[Tensor, Tensor]]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    momentum = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
                    momentum.lerp_(parameter.grad, 1 - group["momentum"])
                    nesterov = parameter.grad.lerp(momentum, group["momentum"])
                    updates.setdefault(parameter.shape, []).append((parameter, nesterov))
            for shape, pairs in updates.items():
                rate = group["lr"] * max(1.0, shape[0] / shape[1]) ** 0.5
                directions = orthogonalised(torch.stack([update for _, update in pairs]))
                for (parameter, _), direction in zip(pairs, directions, strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.add_(direction, alpha=-rate)


def orthogonalised(matrices: Float[Tensor, "n rows columns"], steps: int = 5) -> Float[Tensor, "n rows columns"]:
    """Matrices with singular values near 1 by Muon's quintic Newton-Schulz iteration (Jordan et al., 2024)."""
    a, b, c = 3.4445, -4.7750, 2.0315
    wide = matrices.shape[1] <= matrices.shape[2]
    x: Tensor = matrices if wide else matrices.mT
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if wide else x.mT


class HybridOptimizer:
    """Muon (Jordan et al., 2024) on the matrices of transformer blocks and AdamW on every other parameter.

    Both follow one cosine schedule; gradients are clipped to norm 1 before the step. `fp32` chooses `Fp32Muon`.
    """

    def __init__(
        self,
        modules: Iterable[nn.Module],
        lr: float,
        muon_lr: float,
        steps: int,
        warmup: int = 100,
        fp32: bool = False,
    ) -> None:
        named = [item for module in modules for item in module.named_parameters() if item[1].requires_grad]
        matrices = [p for name, p in named if p.ndim == 2 and _is_block_matrix(name)]
        chosen = {id(p) for p in matrices}
        self.parameters = [p for _, p in named]
        rest = [p for p in self.parameters if id(p) not in chosen]
        self.optimizers: list[tuple[torch.optim.Optimizer, float]] = [
            (torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.99), weight_decay=0.0), lr)
        ]
        if matrices:
            kind = Fp32Muon if fp32 else torch.optim.Muon
            muon = kind(matrices, lr=muon_lr, momentum=0.95, weight_decay=0.01)
            self.optimizers.append((muon, muon_lr))
        self.steps, self.warmup, self.step_index = steps, warmup, 0

    def step(self, loss: Tensor) -> None:
        """Backpropagate and update."""
        for optimizer, _ in self.optimizers:
            optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        factor = cosine(self.step_index, self.steps, self.warmup)
        for optimizer, lr in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr * factor
            optimizer.step()
        self.step_index += 1


def _is_block_matrix(name: str) -> bool:
    return "transformer_blocks" in name and "norm" not in name


@torch.no_grad()
def load_average(module: nn.Module, average: Ema) -> None:
    """Replace a module's parameters by their average."""
    for parameter, value in zip(module.parameters(), average.values, strict=True):
        parameter.copy_(value)
