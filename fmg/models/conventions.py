"""How a folder of weights is sampled: the small JSON file beside the weights. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    ModelWrapValidatorHandler,
    ValidationError,
    model_serializer,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from fmg.core.errors import CheckpointError, UsageError, reason
from fmg.core.json_io import JsonError, read_object
from fmg.core.specs import MAX_SIDE, MapKind, MapSpec

CONVENTIONS_FILE = "fmg_flow_map.json"
FLUX_IN_DIFFUSERS = "a `fmg.FlowMapPipeline` of the base"
"""For model cards."""


Takes = Literal["none", "duration", "target"]
"""What a second-time embedder receives: nothing, the duration t - s, or the target time s."""


class Worded(BaseModel):
    """Options that a bare string is short for, as a component's name is for `{name: ...}`."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    word: ClassVar[str]
    """The field that the string sets; every other has a default."""

    @model_validator(mode="wrap")
    @classmethod
    def _from_word(cls, value: object, handler: ModelWrapValidatorHandler[Self]) -> Self:
        return handler({cls.word: value} if isinstance(value, str) else value)

    @model_serializer
    def plain(self) -> str | dict[str, object]:
        """The string alone where it says everything, else a mapping of what differs from the defaults."""
        stated = {name: (getattr(self, name), field.default) for name, field in type(self).model_fields.items()}
        given = {name: value for name, (value, default) in stated.items() if name == self.word or value != default}
        return str(given[self.word]) if len(given) == 1 else given

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        words = handler(core)["properties"][cls.word]
        return {"anyOf": [{key: words[key] for key in ("type", "enum") if key in words}, handler(core)]}


class SecondTime(Worded):
    """How the second time of a two-time map joins the first, whatever the family.

    Written as a word, such as `duration`, it is added, at the scale of the first time, as in MeanFlow students of FLUX.
    AnyFlow's convention is `{takes: target, gate: 0.25}`; the mean of the two in HunyuanImage is a gate of 0.5.
    """

    word: ClassVar[str] = "takes"

    takes: Takes = Field(description="What the second embedder receives: t - s, s, or nothing for a single-time map.")
    gate: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="Weight g in (1 - g) emb(t) + g emb2; null adds emb2 to emb(t).",
    )
    scale: float | None = Field(
        default=None, gt=0, description="Factor on the second time before its sinusoids; null: that of the first time."
    )

    @model_validator(mode="after")
    def _nothing_joins_without_it(self) -> SecondTime:
        if self.takes == "none" and (self.gate is not None or self.scale is not None):
            raise ValueError("a map without a second time has neither a gate nor a scale for it")
        return self

    def __bool__(self) -> bool:
        """Whether there is a second time."""
        return self.takes != "none"


class FlowMapConventions(BaseModel):
    """What a state dict does not say: the kind of map, its path, its time convention and its sampling defaults.

    Two students with the same keys and shapes may expect times that differ by a factor of 1000, and a forward pass
    under the wrong convention gives garbage without an error. Hence nothing that changes a forward pass has a default.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    schema_version: Literal[1] = Field(alias="schema", description="Version of this file's layout.")
    map: MapKind = Field(
        description="What the network predicts at time t: the average velocity to any target time, that to 0, or the "
        "velocity at t, of which a jump is one Euler step."
    )
    path: Literal["linear", "trig"] = Field(description="Probability path of the latents that the network takes.")
    time_scale: float = Field(gt=0, description="Factor on times and guidance before their sinusoids: 1 or 1000.")
    second_time: SecondTime = Field(description="How the second time enters: a word, or takes, gate and scale.")
    resolution: int = Field(strict=True, gt=0, le=MAX_SIDE, description="Side of the square image in pixels.")
    max_sequence_length: int = Field(
        strict=True, gt=0, le=512, description="Length to which text tokens are padded or truncated."
    )
    default_steps: int = Field(strict=True, gt=0, description="Sampling steps (NFE) of the native sampler.")
    default_grid: str | list[float] = Field(description="Name of the time grid, or its times.")
    guidance: float | None = Field(default=None, ge=0, description="Embedded guidance scale, if the weights use one.")

    @model_validator(mode="after")
    def _second_time_fits_the_map(self) -> FlowMapConventions:
        check_second_time(self.map, self.second_time)
        return self

    def plain(self) -> dict[str, object]:
        """The JSON object in `fmg_flow_map.json`."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)

    def embedded_guidance(self, transformer: Mapping[str, Any]) -> float | None:
        """The guidance scale as a transformer with this config takes it; None for weights that embed none."""
        return None if self.guidance is None else self.guidance * transformer.get("guidance_embeds_scale", 1.0)

    def spec(self, recipe: str) -> MapSpec:
        """The declared properties of the map; `recipe` names the recipe shipped with the model."""
        return MapSpec(
            anchors="endpoint" if self.map == "single-time" else "any",
            kind=self.map,
            path=self.path,
            resolution=self.resolution,
            default_steps=self.default_steps,
            default_grid=self.default_grid if isinstance(self.default_grid, str) else tuple(self.default_grid),
            default_stochasticizer=("asfmc-endpoint" if self.map == "single-time" else "asfmc", ()),
            default_recipe=recipe,
        )


def check_second_time(kind: MapKind, second: SecondTime) -> None:
    """Checks that there is a second time if and only if the map is two-time.

    Raises:
        ValueError: it does not.
    """
    if (kind == "two-time") != bool(second):
        raise ValueError(f"a {kind} map cannot have second_time '{second.takes}'")


def read_conventions(folder: Path) -> FlowMapConventions:
    """The conventions of a model folder.

    Raises:
        CheckpointError: the folder or its `fmg_flow_map.json` is missing, unreadable or has an unsupported schema.
    """
    file = folder / CONVENTIONS_FILE
    if not file.is_file():
        raise CheckpointError(
            f"{folder} is not a flow-map model folder: it has no {CONVENTIONS_FILE}",
            "Give a folder that fmg wrote, or remake the embedded models with `fmg pretrain`.",
        )
    try:
        return FlowMapConventions.model_validate(read_object(file))
    except (OSError, JsonError, ValidationError) as error:
        raise CheckpointError(
            f"{file} cannot be used: {reason(error)}",
            "Restore the file from where the model came from, or use the version of fmg that wrote it.",
        ) from None


def as_conventions(stated: FlowMapConventions | Mapping[str, object] | None) -> FlowMapConventions:
    """Conventions from what a caller or a `model_index.json` states.

    Raises:
        UsageError: nothing is stated.
        CheckpointError: it cannot be used.
    """
    if isinstance(stated, FlowMapConventions):
        return stated
    if stated is None:
        raise UsageError(
            "The conventions of this map are not given",
            f"Load it with FlowMapPipeline.from_pretrained, which reads {CONVENTIONS_FILE}, or pass conventions.",
        )
    try:
        return FlowMapConventions.model_validate(dict(stated), strict=True)
    except ValidationError as error:
        raise CheckpointError(
            f"The conventions of the map cannot be used: {reason(error)}",
            f"Compare them with {CONVENTIONS_FILE} of a folder that fmg wrote.",
        ) from None
