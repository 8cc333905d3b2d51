"""What an export starts from: the files of a model and the changes of a run, found without loading the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from fmg.core.errors import UsageError
from fmg.core.hub import locate
from fmg.export.delta import Delta, check_base, read_delta
from fmg.inference.target import Target
from fmg.models.common.saved_weights import COMPONENT, is_full, read_transformer_manifest
from fmg.models.common.weights import (
    TensorReader,
    empty_transformer,
    folder_weights,
    stored_digest,
    stored_shapes,
    transformer_shapes,
)
from fmg.models.conventions import FlowMapConventions, read_conventions
from fmg.models.embedded import EmbeddedConfig
from fmg.models.flux.configs import FluxConfig, FluxStudentConfig
from fmg.models.flux.loading import TransformerSource, transformer_source
from fmg.models.flux.students import check_student
from fmg.models.flux.transformer import FlowMapFluxTransformer2DModel
from fmg.recipe import Recipe


@dataclass(frozen=True)
class ExportSource:
    """A model on this computer.

    Attributes:
        label: what the user called it.
        name: registered name of the model.
        recipe: how it is sampled and judged.
        folder: its pipeline folder; a student's is that of its teacher.
        conventions: how the transformer wants to be sampled.
        transformer: config and files of the transformer; a fully tuned one stands in place of the model's own.
        checkpoint: folder of what was trained, or None.
    """

    label: str
    name: str
    recipe: Recipe
    folder: Path
    conventions: FlowMapConventions
    transformer: TransformerSource
    checkpoint: Path | None

    @property
    def tuned_whole(self) -> bool:
        """Whether every weight of the transformer was trained, so that there is nothing to merge."""
        return self.checkpoint is not None and is_full(self.checkpoint)

    @property
    def base(self) -> str:
        """What the weights under an adapter are called: the model, or the run that tuned all of them."""
        return self.label if self.tuned_whole else self.name

    @cached_property
    def reader(self) -> TensorReader:
        """The stored weights of the transformer."""
        return TensorReader(self.transformer.weights.files)

    @cached_property
    def stored(self) -> Mapping[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Dtype and shape of every stored weight of the transformer, which are exactly those of its config.

        Raises:
            CheckpointError: a file is damaged or does not fit the config.
        """
        described = {name: self.reader.describe(name) for name in sorted(self.transformer.weights.files)}
        origin = self.transformer.weights.origin
        wanted = transformer_shapes(empty_transformer(FlowMapFluxTransformer2DModel, self.transformer.config, origin))
        check_student(wanted, stored_shapes(self.transformer.weights), origin)
        return described

    @cached_property
    def digest(self) -> str:
        """Sha256 of the stored transformer."""
        return stored_digest(self.transformer.weights)

    @cached_property
    def delta(self) -> Delta | None:
        """What was trained, or None for the base itself.

        Raises:
            CheckpointError: it is damaged or belongs to other weights.
        """
        if self.checkpoint is None or self.tuned_whole:
            return None
        delta = read_delta(self.checkpoint, {name: shape for name, (_, shape) in self.stored.items()}, self.label)
        check_base(delta, self.digest, str(self.transformer.weights.origin))
        return delta


def conventions_of(recipe: Recipe) -> FlowMapConventions:
    """How the model of a recipe wants to be sampled; its weights need not be there.

    Raises:
        UsageError: the model is of a family that has no export.
        CheckpointError: a local folder that does not state it.
    """
    config, name = recipe.model.config, recipe.model.name
    if isinstance(config, EmbeddedConfig):
        return read_conventions(config.directory())
    if isinstance(config, FluxConfig):
        return config.conventions()
    raise UsageError(
        f"The model '{name}' is not of the FLUX family, the only one that can be exported",
        "Load the adapter of the run with `pipe.load_lora_weights` instead.",
    )


def find_source(target: Target) -> ExportSource:
    """The files behind a target.

    Raises:
        UsageError: the model is of a family that has no export.
        MissingDependencyError: published files that have not been fetched.
        CheckpointError: a local source that does not exist or is not complete.
    """
    config, name = target.recipe.model.config, target.recipe.model.name
    conventions = conventions_of(target.recipe)
    student = None
    if isinstance(config, FluxConfig):
        folder = locate(config.architecture(), "model", name).path
        if isinstance(config, FluxStudentConfig):
            student = locate(config.assets()[0], "model", name).path
    else:
        assert isinstance(config, EmbeddedConfig)
        folder = config.directory()
    source = transformer_source(folder, conventions, student)
    if target.adapter is not None and is_full(target.adapter):
        read_transformer_manifest(target.adapter)
        source = replace(source, weights=folder_weights(target.adapter / COMPONENT))
    return ExportSource(target.label, name, target.recipe, folder, conventions, source, target.adapter)


def recipe_facts(recipe: Recipe) -> tuple[tuple[Mapping[str, object], ...], Mapping[str, object]]:
    """What a manifest keeps of a recipe to repeat the proof of equal reward: its rewards, and its prompt sets."""
    plain: Any = recipe.plain()
    return tuple(plain["rewards"]), {"train": plain["prompts"], "eval": plain["eval"]["prompts"]}
