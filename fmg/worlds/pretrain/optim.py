"""Optimiser pieces shared by the stages: Muon for block matrices, AdamW for the rest, cosine schedule, EMA."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn


def cosine(step: int, total: int, warmup: int, floor: float = 0.02) -> float:
    """Learning-rate factor: linear warm-up, then a half cosine from 1 to `floor`."""
    if step < warmup:
        return (step + 1) / warmup
    phase = (step - warmup) / max(1, total - warmup)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * phase))


class HybridOptimizer:
    """Muon (Jordan et al., 2024) on the matrices of transformer blocks and AdamW on every other parameter.

    Both follow one cosine schedule; gradients are clipped to norm 1 before the step.
    """

    def __init__(self, modules: Iterable[nn.Module], lr: float, muon_lr: float, steps: int, warmup: int = 100) -> None:
        named = [item for module in modules for item in module.named_parameters() if item[1].requires_grad]
        matrices = [p for name, p in named if p.ndim == 2 and _is_block_matrix(name)]
        chosen = {id(p) for p in matrices}
        self.parameters = [p for _, p in named]
        rest = [p for p in self.parameters if id(p) not in chosen]
        self.optimizers: list[tuple[torch.optim.Optimizer, float]] = [
            (torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.99), weight_decay=0.0), lr)
        ]
        if matrices:
            muon = torch.optim.Muon(matrices, lr=muon_lr, momentum=0.95, weight_decay=0.01, ns_steps=5)
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


class Ema:
    """Exponential moving average of a module's parameters, with the usual warm-up `min(decay, (1 + n) / (10 + n))`."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.module, self.decay, self.updates = module, decay, 0
        self.shadow = [p.detach().clone() for p in module.parameters()]

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the module's present parameters."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(self.shadow, [p.detach() for p in self.module.parameters()], 1 - decay)

    @torch.no_grad()
    def copy_to_module(self) -> None:
        """Replace the module's parameters by the average."""
        for parameter, average in zip(self.module.parameters(), self.shadow, strict=True):
            parameter.copy_(average)
