"""Models for these tests only, so that recipes resolve without any asset."""

from __future__ import annotations

from fmg.core.specs import MapSpec
from fmg.registry import ModelConfig


class TwoTimeConfig(ModelConfig):
    """A two-time map on the linear path; its default recipe is the embedded model's."""

    size: int = 1

    def spec(self) -> MapSpec:
        default = ("asfmc", (("ratio", 0.5),))
        return MapSpec("any", "linear", 32, 4, "uniform", default, "meanflow-shapes")


class SingleTimeConfig(ModelConfig):
    """A single-time map on the trigonometric path."""

    def spec(self) -> MapSpec:
        return MapSpec("endpoint", "trig", 32, 4, "uniform", ("asfmc-endpoint", ()), "scm-shapes")


class TrigTwoTimeConfig(ModelConfig):
    """A two-time map on the trigonometric path."""

    def spec(self) -> MapSpec:
        return MapSpec("any", "trig", 32, 4, "uniform", ("asfmc-endpoint", ()), "meanflow-shapes")


class VelocityConfig(ModelConfig):
    """A velocity map, which jumps by Euler steps."""

    def spec(self) -> MapSpec:
        return MapSpec("any", "linear", 32, 4, "uniform", ("asfmc", ()), "meanflow-shapes", kind="velocity")


MODELS = {
    "two-time": TwoTimeConfig,
    "single-time": SingleTimeConfig,
    "trig": TrigTwoTimeConfig,
    "velocity": VelocityConfig,
}
