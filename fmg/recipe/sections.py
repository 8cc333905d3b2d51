"""The contents of a recipe: references to components, numeric sections, and `RecipeFields`, which has them all."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal, cast

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializeAsAny,
    ValidationError,
    ValidationInfo,
    WithJsonSchema,
    model_serializer,
    model_validator,
)
from pydantic.config import JsonDict

from fmg.core.errors import UsageError, suggestion
from fmg.core.machine import DEVICE_NAME, device_name
from fmg.core.specs import LORA_PRESETS
from fmg.flow.grids import STATIC_SHIFT, check_name, named_grids
from fmg.recipe.document import Plain
from fmg.registry.catalog import registry_for
from fmg.registry.config import ComponentConfig, ModelConfig, ObjectiveConfig, StochasticizerConfig, TrackerConfig
from fmg.registry.validation import Problem, first_problem, validate_strictly

PYTHON_REWARD, FUNCTION_REWARD = "python", "function"
_LABELS = {PYTHON_REWARD: "target", FUNCTION_REWARD: "function"}


class ComponentRef(BaseModel):
    """`{name: N, option: value, ...}`: the component `N` of one kind. `config` has all its options, typed."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    kind: ClassVar[str]

    name: str
    config: SerializeAsAny[ComponentConfig]

    @model_validator(mode="before")
    @classmethod
    def _options_to_config(cls, value: object, info: ValidationInfo) -> object:
        if isinstance(value, cls):
            return value
        if isinstance(value, str):
            value = {"name": value}
        advice = f"Write {{name: NAME}}; `fmg list {cls.kind}` lists the names"
        if not isinstance(value, Mapping):
            what = f"The {cls.kind} must be a name or a mapping with a name (given: {value!r})"
            raise Problem((), what, advice).as_pydantic()
        own = {key: value[key] for key in cls.model_fields if key in value}
        name = own.get("name")
        if not isinstance(name, str):
            what = (
                f"The name of the {cls.kind} is missing"
                if name is None
                else f"The {cls.kind} has a name that is not text"
            )
            raise Problem(("name",) if "name" in own else (), what, advice).as_pydantic()
        if not isinstance(own.get("config"), ComponentConfig):
            options = {key: option for key, option in value.items() if key not in own or key == "config"}
            own["config"] = _validated(cls.kind, name, options, strict=info.mode == "json")
        return own

    @model_serializer(mode="plain")
    def _flatten(self) -> dict[str, Any]:
        own = {key: getattr(self, key) for key in type(self).model_fields if key != "config"}
        return {**own, **self.config.model_dump(mode="json")}


def _validated(kind: str, name: str, options: Mapping[str, object], *, strict: bool) -> ComponentConfig:
    registry = registry_for(kind)
    try:
        config_class = registry.config_class(name)
    except UsageError as error:
        raise Problem(("name",), error.what, error.fix).as_pydantic() from None
    try:
        if strict:
            return validate_strictly(config_class, options)
        return config_class.model_validate(dict(options))
    except ValidationError as error:
        raise first_problem(error, config_class, f"The {kind} '{name}'").as_pydantic() from None


class ModelRef(ComponentRef):
    """A model."""

    kind = "model"
    config: SerializeAsAny[ModelConfig]


class StochasticizerRef(ComponentRef):
    """A stochasticizer."""

    kind = "stochasticizer"
    config: SerializeAsAny[StochasticizerConfig]


class ObjectiveRef(ComponentRef):
    """An objective."""

    kind = "objective"
    config: SerializeAsAny[ObjectiveConfig]


class OptimizerRef(ComponentRef):
    """An optimizer."""

    kind = "optimizer"


class PromptsRef(ComponentRef):
    """A prompt set."""

    kind = "prompt-set"


class RewardRef(ComponentRef):
    """A reward."""

    kind = "reward"

    @property
    def label(self) -> str:
        """Its name in log keys: `module:function` or the name of a user's own function, else the registered name."""
        return cast(str, getattr(self.config, _LABELS[self.name])) if self.name in _LABELS else self.name


class WeightedRewardRef(RewardRef):
    """A reward and its weight in the sum that is maximised."""

    weight: float = Field(1.0, description="factor in the weighted sum; negative to minimise")


class TrackerRef(ComponentRef):
    """A tracker that follows the run."""

    kind = "tracker"
    config: SerializeAsAny[TrackerConfig]


class Section(BaseModel):
    """A section of a recipe: unknown keys are refused, values are immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)


def _grid(value: object) -> object:
    if isinstance(value, str):
        try:
            check_name(value)
        except UsageError as error:
            raise Problem((), error.what, error.fix).as_pydantic() from None
        return value
    if (
        isinstance(value, (list, tuple))
        and value
        and all(type(time) in (int, float) and math.isfinite(time) for time in value)
    ):
        return tuple(float(time) for time in value)
    what = f"The grid must be a name or a list of finite times (given: {value!r})"
    fix = f"Names: {', '.join(named_grids())}; times decrease from 1 to 0, as in [1, 0.5, 0]"
    raise Problem((), what, fix).as_pydantic()


def _targets(value: object) -> object:
    presets = tuple(LORA_PRESETS)
    if isinstance(value, str):
        if value not in presets:
            fix = f"{suggestion(value, presets)} Put module names in a list: [{value}]"
            raise Problem((), f"There is no preset of LoRA targets named '{value}'", fix).as_pydantic()
        return value
    if isinstance(value, (list, tuple)) and value and all(isinstance(name, str) and name for name in value):
        return tuple(value)
    what = f"The LoRA targets must be the name of a preset or a list of module names (given: {value!r})"
    raise Problem((), what, f"Presets: {', '.join(presets)}; a list: [to_q, to_k]").as_pydantic()


def _named(names: Iterable[str], item: str, *more: JsonDict) -> WithJsonSchema:
    """The schema of a name or a list, or of `more`."""
    items: JsonDict = {"type": "array", "items": {"type": item}, "minItems": 1}
    return WithJsonSchema({"anyOf": [{"type": "string", "enum": list(names)}, *more, items]})


_SHIFTED: JsonDict = {"type": "string", "pattern": f"^{STATIC_SHIFT}$"}
Device = Annotated[str, AfterValidator(device_name), WithJsonSchema({"type": "string", "pattern": DEVICE_NAME})]
Grid = Annotated[str | tuple[float, ...], BeforeValidator(_grid), _named(named_grids(), "number", _SHIFTED)]
LoraTargets = Annotated[str | tuple[str, ...], BeforeValidator(_targets), _named(LORA_PRESETS, "string")]


class WindowSection(Section):
    """Steps that are stochastic and trained; the others are deterministic jumps, which only a two-time map can make."""

    size: int = Field(ge=1, description="consecutive stochastic steps, at most rollout.steps - 1")
    mode: Literal["fixed", "random", "progressive"] = Field(
        "progressive",
        description="fixed: at start; random: resampled; progressive: advances by one step and stays at the last",
    )
    start: int = Field(0, ge=0, description="first step at which the window may begin; 0 is the noisiest")
    every: int = Field(10, ge=1, description="iterations between changes; fixed ignores it")


class BranchSection(Section):
    """How `rollout.kind: branch` generates a group; chains ignore it (docs/branching.md)."""

    steps: Literal["first", "cycle", "random", "adaptive"] = Field(
        "first",
        description="transition at which a group branches: the noisiest, each in turn, a random one, or adaptive: more"
        " groups for the transitions whose siblings' rewards differ most",
    )
    floor: float = Field(
        0.05, ge=0, le=1, description="minimum share of the groups for every transition; adaptive only"
    )
    completion: Literal["jump", "grid"] = Field(
        "jump", description="how siblings reach 0: one jump, or the remaining intervals of the grid"
    )
    prefix: Literal["native", "stochastic"] = Field(
        "native", description="how the state is reached: by the map's own sampler, or by the stochasticizer"
    )
    antithetic: bool = Field(False, description="whether siblings come in pairs of opposite noise")
    backend: Literal["torch", "torch-compile", "onnxruntime"] = Field(
        "torch",
        description="what runs the completions: the trained network itself, its compiled form, or its exported graph",
    )


class RolloutSection(Section):
    """How samples are generated for one iteration."""

    kind: Literal["chain", "branch"] = Field(
        "chain",
        description="chain: every sample has its own transitions; branch: a group shares one state and one transition",
    )
    groups: int = Field(24, ge=1, le=100_000, description="prompts of one iteration; each is a group")
    group_size: int = Field(16, ge=2, le=4096, description="samples of one prompt, compared with each other")
    steps: int = Field(4, ge=1, le=1000, description="sampling steps N (N - 1 stochastic transitions)")
    grid: Grid = Field("uniform", description="times from 1 to 0: the name of a rule, or the list of times itself")
    same_initial_noise: bool = Field(False, description="whether all images of a group start from the same noise")
    batch_size: int | None = Field(
        None, ge=1, le=100_000, description="samples generated at once; null: by device and model"
    )
    window: WindowSection | None = Field(None, description="moving window of stochastic steps; null: all but the last")
    branch: BranchSection = BranchSection()
    prompt_sampling: Literal["uniform", "dynamic"] = Field(
        "uniform",
        description="uniform: every prompt equally often; dynamic: prompts whose images got equal rewards less often",
    )
    prompt_floor: float = Field(
        0.2,
        gt=0,
        le=1,
        description="minimum weight of a prompt under dynamic sampling; a prompt that still gives a gradient has 1",
    )

    @property
    def samples(self) -> int:
        """Images of one iteration."""
        return self.groups * self.group_size

    @property
    def units(self) -> int:
        """The units that are divided among processes: the groups of branched rollouts, or the samples of chains."""
        return self.groups if self.kind == "branch" else self.samples


class TrainSection(Section):
    """The optimisation loop."""

    iterations: int = Field(60, ge=1, le=10_000_000, description="rollouts, each followed by its updates")
    updates_per_iteration: int = Field(2, ge=1, le=1000, description="optimizer steps on one rollout")
    max_grad_norm: float = Field(1.0, gt=0, description="gradients are scaled down to this norm")
    lr_schedule: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="learning rate after the warm-up: constant, or falling to 0 at the end of the run"
    )
    lr_warmup_steps: int = Field(
        0, ge=0, le=10_000_000_000, description="optimizer steps over which the learning rate rises to optimizer.lr"
    )
    seed: int = Field(0, ge=0, lt=2**63, description="seed of the prompts, the noise and the adapter's initial values")
    micro_batch: int | None = Field(
        None, ge=1, le=100_000, description="rows of one backward pass; null: as many as are generated at once"
    )
    device: Device = Field("auto", description="device of the run; auto is CUDA if available, else the CPU")
    dtype: Literal["fp32", "bf16"] = Field("fp32", description="precision of the network; log-probs are always fp32")
    parallel: Literal["auto", "ddp", "fsdp2"] = Field(
        "auto",
        description="several processes: ddp keeps the model in each, fsdp2 shards its base; auto follows the launcher",
    )
    shuffle_advantages: bool = Field(False, description="the null control: advantages are given to random samples")
    trainable: Literal["lora", "lora+duration", "full"] = Field(
        "lora",
        description="what is trained: a LoRA, a LoRA and the second-time embedder, or the whole network",
    )
    ema_decay: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="moving average over updates, evaluated and saved beside the raw weights; null keeps none",
    )
    state_every: int | None = Field(
        10, ge=1, le=10_000_000, description="iterations between full states, for --resume; null saves none"
    )
    recompute_old: Literal["auto", "always"] = Field(
        "auto", description="whether old log-probs are recomputed through the update path: when needed, or always"
    )

    @property
    def updates(self) -> int:
        """Optimizer steps of the whole run, including those that a KL limit or equal rewards may skip."""
        return self.iterations * self.updates_per_iteration


class LoraSection(Section):
    """The trained adapter."""

    rank: int = Field(8, ge=1, le=4096, description="rank of every adapted matrix")
    alpha: float = Field(16.0, gt=0, description="the adapter's output is scaled by alpha / rank")
    targets: LoraTargets = Field("attention", description="preset of module names, or the list of names")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the adapter's input while training")

    def target_names(self) -> tuple[str, ...]:
        """Presets and module names to adapt."""
        return (self.targets,) if isinstance(self.targets, str) else self.targets


class EvalSection(Section):
    """Held-out evaluation during training."""

    every: int = Field(
        10, ge=1, le=10_000_000, description="iterations between evaluations; the first and the last always are"
    )
    prompts: PromptsRef = Field(description="prompt set that training does not see")
    num: int = Field(1000, ge=1, le=1_000_000, description="number of images per evaluation")
    rewards: tuple[RewardRef, ...] = Field((), description="rewards that are measured besides the trained ones")
    steps: int | None = Field(None, ge=1, le=1000, description="sampling steps; null takes rollout.steps")
    seed: int = Field(0, ge=0, lt=2**63, description="seed of the evaluation's prompts and noise")
    batch_size: int | None = Field(
        None, ge=1, le=100_000, description="images generated at once; null: as in a rollout, at most 64"
    )
    backend: Literal["torch", "torch-compile"] = Field(
        "torch", description="what generates the images: the trained network itself, or its compiled form"
    )
    stop_on_hacking: bool = Field(
        False, description="stop when the trained reward rises at the cost of a held-out one or of diversity"
    )
    hacking_tolerance: float = Field(
        0.15, ge=0, le=10, description="tolerated fall of a held-out reward, in stds over images of the base"
    )
    min_diversity: float = Field(
        0.1, ge=0, lt=1, description="minimum share of the first rollout's diversity within prompts"
    )


class RecipeFields(Section):
    """The values of a recipe, validated one by one; `fmg.recipe.Recipe` adds its constructors."""

    model: ModelRef
    stochasticizer: StochasticizerRef
    rewards: tuple[WeightedRewardRef, ...] = Field(
        min_length=1, description="rewards that are maximised, each with its weight"
    )
    objective: ObjectiveRef
    optimizer: OptimizerRef
    rollout: RolloutSection = RolloutSection()
    train: TrainSection = TrainSection()
    lora: LoraSection = LoraSection()
    prompts: PromptsRef
    eval: EvalSection
    trackers: tuple[TrackerRef, ...] = Field((), description="experiment trackers that follow the run")

    def plain(self) -> dict[str, Plain]:
        """Nested plain values, every option stated."""
        return cast("dict[str, Plain]", self.model_dump(mode="json"))

    def notes(self) -> dict[str, str]:
        """What each value means, by dotted path (`optimizer.lr`, `rewards.0.weight`): for annotating a recipe."""
        return dict(_notes(self, ""))

    @property
    def measured_rewards(self) -> tuple[RewardRef, ...]:
        """What an evaluation measures: the trained rewards, then the held-out ones, each once."""
        by_label: dict[str, RewardRef] = {}
        for reward in (*self.rewards, *self.eval.rewards):
            by_label.setdefault(reward.label, reward)
        return tuple(by_label.values())


def _notes(section: BaseModel, path: str) -> Iterator[tuple[str, str]]:
    """Path and meaning of every value under `path`; the options of a component are described by its config."""
    if isinstance(section, ComponentRef):
        yield f"{path}name", registry_for(section.kind).row(section.name).summary
        yield from _notes(section.config, path)
    for key, info in type(section).model_fields.items():
        value = getattr(section, key)
        if isinstance(section, ComponentRef) and key in ComponentRef.model_fields:
            continue
        if isinstance(value, BaseModel):
            # a value such as `second_time` is written as a word, or as a mapping
            yield from [(f"{path}{key}", info.description)] if info.description else ()
            yield from _notes(value, f"{path}{key}.")
        elif isinstance(value, tuple) and value and all(isinstance(item, BaseModel) for item in value):
            for number, item in enumerate(value):
                yield from _notes(item, f"{path}{key}.{number}.")
        else:
            yield f"{path}{key}", info.description or ""
