"""A head of linear layers without activations, as the LAION aesthetic score and ImageReward have it: an affine map."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from fmg.core.errors import CheckpointError
from fmg.rewards.checkpoints import Tensors, some

LAYERS = (0, 2, 4, 6, 7)
"""Positions of the linear layers; between them are only dropouts, so the head is affine."""


@dataclass(frozen=True)
class AffineHead:
    """`score = w . e + b`."""

    weight: Float[Tensor, " d"]
    bias: float

    def __call__(self, features: Float[Tensor, "b d"]) -> Float[Tensor, " b"]:
        """Scores in fp32."""
        return features @ self.weight.to(features.device) + self.bias


def affine_head(tensors: Tensors) -> AffineHead:
    """The five linear layers `layers.N.{weight,bias}` as one affine map, multiplied in double precision.

    Raises:
        CheckpointError: other keys, or shapes that do not follow on each other.
    """
    wanted = {f"layers.{layer}.{kind}" for layer in LAYERS for kind in ("weight", "bias")}
    if wrong := wanted ^ set(tensors):
        raise CheckpointError(
            f"The head lacks, or has no use for: {some(wrong)}",
            "Give the published file: five linear layers called layers.0, .2, .4, .6 and .7.",
        )
    weight = torch.eye(tensors["layers.0.weight"].shape[-1], dtype=torch.float64)
    bias = torch.zeros(len(weight), dtype=torch.float64)
    try:
        for layer in LAYERS:
            matrix = tensors[f"layers.{layer}.weight"].double()
            weight, bias = matrix @ weight, matrix @ bias + tensors[f"layers.{layer}.bias"].double()
        return AffineHead(weight.reshape(len(tensors["layers.0.weight"][0])).float(), float(bias))
    except RuntimeError as error:
        raise CheckpointError(
            f"The layers of the head do not fit each other: {error}", "Give an undamaged file."
        ) from error
