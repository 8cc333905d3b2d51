"""Options of the rewards and prompt sets of the worlds. Imports no torch."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from fmg.registry.config import About, ComponentConfig


class ShapesRewardConfig(ComponentConfig):
    """Prompt adherence in the shapes world, read from pixels by a rule-based verifier."""

    score: Literal["soft", "strict"] = Field(
        default="soft",
        description="soft: share of the requested attributes that the image shows; strict: 1 if it shows all, else 0",
    )


class ShapesQualityConfig(ComponentConfig):
    """Image quality in the shapes world; does not look at the prompt."""


class ShapesClipConfig(ComponentConfig):
    """Agreement of image and prompt in the shapes world under a small trained CLIP."""

    about: ClassVar[About] = About(
        licence="Apache-2.0", weights=("in the package; `fmg pretrain shapes-clip` retrains them",)
    )
    differentiable: ClassVar[bool] = True


class ShapesPromptsConfig(ComponentConfig):
    """Prompts of the shapes world."""


class TextFidelityConfig(ComponentConfig):
    """Likeness to a printed sign of the text world; does not look at the prompt."""


class TextPromptsConfig(ComponentConfig):
    """Prompts of the text world."""
