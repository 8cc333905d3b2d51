"""Torch's optimizers by name. Each factory takes a config and returns a function of named parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from importlib import import_module
from typing import Any

import torch
from torch.nn import Parameter
from torch.optim import Optimizer

from fmg.core.errors import CheckpointError, MissingDependencyError
from fmg.core.protocols import OptimizerFactory
from fmg.training.configs import AdafactorConfig, AdamW8bitConfig, AdamWConfig, MuonConfig, SgdConfig

NamedParameters = Iterable[tuple[str, Parameter]]


def adamw(config: AdamWConfig) -> OptimizerFactory:
    """`torch.optim.AdamW`."""
    return lambda parameters: torch.optim.AdamW(list(parameters), **config.model_dump())


def adamw8bit(config: AdamW8bitConfig) -> OptimizerFactory:
    """`bitsandbytes.optim.AdamW8bit`, which keeps fp32 moments for tensors of fewer than 4096 numbers.

    Raises:
        MissingDependencyError: bitsandbytes is not installed; raised before any weight is read.
    """
    try:
        library = import_module("bitsandbytes")
    except ImportError as error:
        raise MissingDependencyError(
            "The optimizer 'adamw8bit' needs bitsandbytes", "Run: pip install bitsandbytes; or use --optimizer adamw."
        ) from error

    def make(parameters: NamedParameters) -> Optimizer:
        optimizer: Optimizer = library.optim.AdamW8bit([p for _, p in parameters], **config.model_dump())
        return optimizer

    return make


def sgd(config: SgdConfig) -> OptimizerFactory:
    """`torch.optim.SGD`."""
    options = {**config.model_dump(), "nesterov": config.nesterov and config.momentum > 0}
    return lambda parameters: torch.optim.SGD(list(parameters), **options)


def adafactor(config: AdafactorConfig) -> OptimizerFactory:
    """`torch.optim.Adafactor`."""
    options = config.model_dump()
    options["d"] = options.pop("clip_threshold")
    return lambda parameters: torch.optim.Adafactor(list(parameters), **options)


def muon(config: MuonConfig) -> OptimizerFactory:
    """`torch.optim.Muon` on parameters with two dimensions, `torch.optim.AdamW` on the rest, as one optimizer."""

    def make(parameters: NamedParameters) -> Optimizer:
        named = list(parameters)
        matrices = [(name, p) for name, p in named if p.ndim == 2]
        others = [(name, p) for name, p in named if p.ndim != 2]
        parts: list[Optimizer] = []
        if matrices:
            parts.append(
                torch.optim.Muon(
                    matrices,
                    lr=config.lr,
                    weight_decay=config.weight_decay,
                    momentum=config.momentum,
                    nesterov=config.nesterov,
                    ns_steps=config.ns_steps,
                    adjust_lr_fn=config.adjust_lr,
                )
            )
        if others:
            parts.append(
                torch.optim.AdamW(
                    others, lr=config.lr, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay
                )
            )
        return JointOptimizer(parts)

    return make


class JointOptimizer(Optimizer):
    """Several optimizers over disjoint parameters that step, save and load as one.

    `param_groups` are the groups of the parts themselves, so a learning-rate schedule reaches them.
    """

    def __init__(self, parts: list[Optimizer]) -> None:
        self.parts = parts
        super().__init__([p for part in parts for group in part.param_groups for p in group["params"]], {})
        self._share_groups()

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Steps every part; `closure` is evaluated once, before them."""
        loss: float | None = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what `state_dict` returned.

        Raises:
            CheckpointError: it was saved by a different kind of optimizer.
        """
        states = state_dict.get("parts", ())
        if len(states) != len(self.parts):
            raise CheckpointError(
                f"The optimizer state has {len(states)} parts, but this optimizer has {len(self.parts)}",
                "Resume with the optimizer that the run was started with.",
            )
        for part, state in zip(self.parts, states, strict=True):
            part.load_state_dict(state)
        self._share_groups()

    def _share_groups(self) -> None:
        self.param_groups = [group for part in self.parts for group in part.param_groups]
