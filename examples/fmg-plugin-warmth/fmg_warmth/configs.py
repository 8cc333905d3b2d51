"""Options of the components. Imports no torch."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from fmg.core.specs import Requirements
from fmg.registry import ComponentConfig, StochasticizerConfig
from fmg.registry.config import About

ABOUT = About(licence="Apache-2.0")


class WarmthConfig(ComponentConfig):
    """Warm colours. Easily hacked: a picture that is all red has the highest score."""

    about: ClassVar[About] = ABOUT

    blue: float = Field(default=1.0, ge=0, description="how much blue counts against red")


class HalfwayConfig(StochasticizerConfig):
    """Anchored stochastic flow map composition with the anchor `fraction * s`."""

    about: ClassVar[About] = ABOUT

    fraction: float = Field(default=0.5, ge=0, lt=1, description="anchor a = fraction * s")

    def requires(self) -> Requirements:
        """An interior anchor needs a two-time map; any path will do."""
        return Requirements(anchors="any", path="any", calls=1, min_target_time=0.0)
