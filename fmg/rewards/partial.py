"""Rollouts of which some images have no score: their whole prompt groups are left out of the update."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from fmg.core.types import PartialRewardOutput, RewardOutput


def complete_groups(output: RewardOutput, groups: Int[Tensor, " b"]) -> Bool[Tensor, " b"]:
    """True for images of groups in which every image was scored.

    A group advantage compares the images of one prompt, so a group with a gap would be compared with another sample
    than was drawn. Images outside belong to no update: their advantage is 0.
    """
    if not isinstance(output, PartialRewardOutput):
        return torch.ones(len(groups), dtype=torch.bool)
    return ~torch.isin(groups.cpu(), groups.cpu()[~output.scored])


def select_rows(output: RewardOutput, rows: Bool[Tensor, " b"]) -> RewardOutput:
    """The scores of some of the images, all of which must have been scored."""
    if isinstance(output, PartialRewardOutput) and not bool(output.scored[rows].all()):
        raise ValueError("select_rows got a row without a score")
    return RewardOutput(output.total[rows], {part: values[rows] for part, values in output.parts.items()})
