"""Rewards as users write them, for `--reward python:tests.support.user_rewards:NAME`."""

from __future__ import annotations

import os
from collections.abc import Sequence

from torch import Tensor


def redness(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """How red an image is, in steps far above the rounding of its pixels, which a difference of means would show."""
    return (1e4 * (images[:, 0] - images[:, 2]).mean((1, 2))).round() / 1e4


def fails_in_process_1(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """`redness`, but one process of several cannot reach its scorer."""
    if os.environ.get("RANK") == "1":
        raise ConnectionError("the scorer went away")
    return redness(images, prompts)


def warmth(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """Red minus blue of each pixel, smooth and never saturated: it has a gradient."""
    return (images[:, 0] - images[:, 2]).sin().mean((1, 2))


def cannot_be_differentiated_in_process_1(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """`warmth`, but one process of several fails in the update, which is where gradients are recorded."""
    if images.requires_grad and os.environ.get("RANK") == "1":
        raise ConnectionError("the scorer went away")
    return warmth(images, prompts)
