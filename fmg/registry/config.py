"""Base classes of component configs. Configs live in torch-free `configs.py` files beside the components."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from fmg.core.geometry import ModelGeometry
from fmg.core.specs import MapSpec, Requirements


@dataclass(frozen=True)
class About:
    """Where a component comes from, for `fmg show`. An empty field claims nothing.

    Attributes:
        licence: terms of the published code and weights, as their authors state them.
        citation: the publication to cite.
        weights: the files that are downloaded, one line each, with their size.
    """

    licence: str = ""
    citation: str = ""
    weights: tuple[str, ...] = ()


class ComponentConfig(BaseModel):
    """Options of one component. Unknown options are an error; values are immutable after validation.

    Every field states its meaning in `Field(description=...)`; ranges are pydantic constraints.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)

    about: ClassVar[About] = About()


class ModelConfig(ComponentConfig, ABC):
    """Options of a model; knows what kind of map it is without reading a weight."""

    @abstractmethod
    def spec(self) -> MapSpec:
        """Declared properties, read from the config or the small JSON beside the weights."""

    def geometry(self) -> ModelGeometry | None:
        """The measures that a memory plan needs, read without a weight; None: the plan counts calls only."""
        return None


class StochasticizerConfig(ComponentConfig, ABC):
    """Options of a stochasticizer; knows which maps it fits."""

    @abstractmethod
    def requires(self) -> Requirements:
        """What it asks of the map and the grid."""


class ObjectiveConfig(ComponentConfig, ABC):
    """Options of an objective: how advantages are formed, and whether it needs transition densities."""

    adv_clip_max: float = Field(default=5.0, gt=0, description="bound on the absolute advantage")
    global_std: bool = Field(default=True, description="divide advantages by the std of the batch, not of the group")

    @property
    @abstractmethod
    def needs(self) -> Literal["transitions", "samples"]:
        """What kind of rollout it consumes."""
