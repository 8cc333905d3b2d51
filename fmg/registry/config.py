"""Base classes of component configs. Configs live in torch-free `configs.py` files beside the components."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from fmg.core.hub import Asset
from fmg.core.protocols import Needs
from fmg.core.specs import MapSpec, ModelGeometry, Requirements


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

    judges: ClassVar[bool] = True
    """For a reward: whether less is worse. A held-out plain measurement does not indicate reward hacking."""

    differentiable: ClassVar[bool] = False
    """For a reward: whether its score has a gradient with respect to the images (`fmg.core.protocols.Reward`)."""

    exclusive: ClassVar[frozenset[str]] = frozenset()
    """Options of which at most one may be given; naming one replaces that of the layers below in a recipe."""

    needs_consent: ClassVar[Mapping[str, str]] = {}
    """Options that a recipe file may set only with the user's consent, and what each lets the file's author do."""

    @property
    def has_gradient(self) -> bool:
        """`differentiable`, or what an option says instead."""
        return self.differentiable

    def assets(self) -> tuple[Asset, ...]:
        """The files that the component reads, in the order in which it loads them."""
        return ()

    def usual(self) -> ComponentConfig:
        """The component with its default options; itself, if it has options without a default."""
        required = any(field.is_required() for field in type(self).model_fields.values())
        return self if required else type(self)()

    def source_options(self) -> dict[str, object]:
        """The options that choose other files than the usual ones, as plain values."""
        usual, plain, assets = self.usual(), self.model_dump(mode="json"), self.assets()
        others = {name: getattr(usual, name) for name in plain if getattr(usual, name) != getattr(self, name)}
        return {name: plain[name] for name in others if self.model_copy(update={name: others[name]}).assets() != assets}


class ModelConfig(ComponentConfig, ABC):
    """Options of a model; declares the kind of map without reading a weight."""

    recipe: ClassVar[str | None] = None
    """The model's default recipe, for a config with options without a default: the recipe states them."""

    in_diffusers: ClassVar[str] = ""
    """The object whose `load_lora_weights` loads a saved adapter, for model cards."""
    flow_map_pipeline: ClassVar[bool] = False
    """Whether `fmg.FlowMapPipeline` runs the model."""
    exportable: ClassVar[bool] = False
    """Whether the network can be traced as a graph for runtimes other than torch: its shapes depend on no values."""
    constant_shapes: ClassVar[bool] = True
    """Whether every prompt gives the network tensors of one shape, as compiling it once needs."""
    sampling_options: ClassVar[frozenset[str]] = frozenset({"default_steps", "default_grid"})
    """Options that only say how the model is sampled: no traced graph depends on them."""
    mergeable: ClassVar[bool] = True
    """Whether `fmg export --diffusers` merges an adapter into the model's folder."""

    anchor_note: ClassVar[str] = ""
    """Note on what anchors mean for the map, if its kind does not tell; for `fmg show`."""

    @abstractmethod
    def spec(self) -> MapSpec:
        """Declared properties, read from the config or the small JSON file beside the weights."""

    def facts(self) -> Mapping[str, str]:
        """How the weights are sampled, for `fmg show`: facts that a family must state because no weight file does."""
        spec = self.spec()
        grid = spec.default_grid if isinstance(spec.default_grid, str) else ", ".join(map(str, spec.default_grid))
        name, options = spec.default_stochasticizer
        given = ", ".join(f"{key} {value}" for key, value in options)
        return {
            "map": f"{spec.map_name}, {spec.path} path",
            "grid": f"{grid}, {spec.default_steps} steps",
            "stochasticizer": f"{name} ({given})" if given else name,
            **({"anchors": self.anchor_note} if self.anchor_note else {}),
        }

    def card_facts(self) -> Mapping[str, str]:
        """Facts about the base for the front matter of a model card: `base_model` (a hub id) and `license`."""
        return {}

    def geometry(self) -> ModelGeometry | None:
        """The sizes that a memory plan needs, read without loading weights; None: the plan counts only calls."""
        return None


class StochasticizerConfig(ComponentConfig, ABC):
    """Options of a stochasticizer; declares which maps it fits."""

    @abstractmethod
    def requires(self) -> Requirements:
        """Its requirements on the map and the grid."""


class LastStepOptions(BaseModel):
    """The gradient of differentiable rewards through the last jump, added to an objective (docs/math.md, eq. 36)."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)

    weight: float = Field(gt=0, description="weight of the reward beside the objective's own loss")
    rewards: tuple[str, ...] | None = Field(
        default=None,
        min_length=1,
        description="which of the recipe's differentiable rewards, each with its weight or 1 if that is 0; null: all"
        " of them that have a weight",
    )
    checkpointing: bool | None = Field(
        default=None,
        description="whether activations are recomputed in the backward pass to save memory; null: on a GPU only",
    )


class ObjectiveConfig(ComponentConfig, ABC):
    """Options of an objective: how advantages are formed, and whether it needs transition densities."""

    adv_clip_max: float = Field(default=5.0, gt=0, description="bound on the absolute advantage")
    global_std: bool = Field(default=True, description="divide advantages by the std of the batch, not of the group")
    reward_combination: Literal["sum", "per-reward"] = Field(
        default="sum",
        description="advantage of the weighted sum of rewards, or weighted sum of each reward's advantage (GDPO)",
    )
    last_step: LastStepOptions | None = Field(
        default=None,
        description="adds the gradient of differentiable rewards through the last jump (RTDMD); null adds none",
    )

    @property
    @abstractmethod
    def needs(self) -> Needs:
        """What kind of rollout it consumes."""

    @property
    def branches(self) -> bool:
        """Whether it takes branched rollouts (`BranchRollout`), of which it makes one row per group."""
        return False

    def rows_per_sample(self, transitions: int) -> int:
        """Rows of a batch that `prepare` makes of one sample with `transitions` stored transitions, at least 1."""
        return max(1, transitions)

    def trained_calls(self, calls: int) -> int:
        """Network evaluations with gradients of one row, besides those of `last_step`.

        Args:
            calls: evaluations of one transition.
        """
        return calls

    @property
    def compares_with(self) -> frozenset[Literal["old", "reference"]]:
        """Which policies besides the current one the loss evaluates; a full fine-tune keeps copies for these alone."""
        return frozenset({"old", "reference"})

    @property
    def on_policy(self) -> bool:
        """Whether every update needs rows of the current policy, so that an iteration has one update."""
        return False

    @property
    def moving_old(self) -> Callable[[int], float] | None:
        """The decay with which `policies.old` follows the trained weights after n iterations (n = 1, 2, ...):
        `old <- decay old + (1 - decay) current`. Then `old` generates the rollouts. None: `old` is a copy of the
        weights before the updates of an iteration."""
        return None

    def frozen_calls(self, calls: int) -> float:
        """Network evaluations without gradients that the loss makes for one row, on average; for plans.

        Args:
            calls: evaluations of one transition.
        """
        return 0.0

    def misfit(self, spec: MapSpec) -> tuple[str, str] | None:
        """Why the objective is not defined for such a map, and what to do; None if it is."""
        return None

    @property
    def kl_limit(self) -> float | None:
        """Bound on `approx_kl` after an update, beyond which the iteration's other updates are skipped; None: no bound.

        Only an objective whose loss reports the part `approx_kl` can have one.
        """
        return None


class TrackerConfig(ComponentConfig):
    """Options of a tracker; declares the package that it needs."""

    package: ClassVar[str] = ""
    """The module that the tracker imports, looked for before a run starts."""
    extra: ClassVar[str] = ""
    """The extra of fmg that installs it; empty: the package is installed by its own name."""
