"""A model of any family that can be traced as the source of an artifact: loaded once, with what a run trained merged.

The weights of FLUX are streamed from their files instead (`fmg.export.source.ExportSource`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor

from fmg.core.errors import CheckpointError, UsageError
from fmg.core.prompt import MASK, PromptForm
from fmg.export.fp8 import Read
from fmg.export.graphs import DTYPES, GraphPlan
from fmg.export.model_graphs import encoders, plans, text_stack
from fmg.export.options import ExportOptions, plain_config
from fmg.export.source import adapter_facts, base_dtypes, base_options, graph_options, save_tokenizer
from fmg.inference.artifact.backend import PromptTokenizer
from fmg.inference.artifact.manifest import (
    LATENT,
    TEXT_ENCODERS,
    TRANSFORMER,
    VAE_DECODER,
    Adapter,
    AxisRange,
    Base,
    FormedTokenizerFacts,
    ModelFacts,
    Sampling,
    TokenizerFacts,
)
from fmg.inference.target import Target, load_model
from fmg.models.common.adapter import merged_tensors, named_tuner_layers
from fmg.models.common.checkpoint_files import COMPONENT, is_full
from fmg.models.common.model import AdaptedModel
from fmg.models.common.saved_weights import read_adapter_manifest
from fmg.models.common.weights import TensorReader, WeightFiles, folder_weights, stored_digest

# short, long, with capitals, spaces and letters beyond ASCII: every difference that tokenizers make
_PROBES = ("", "a red circle", "  A Blue Square\n", "ein grüner Kreis, 圆", "a very long prompt " * 300)


class LoadedSource:
    """A model in memory as an `fmg.export.artifact.ArtifactSource`.

    Args:
        target: what was loaded.
        model: the model with the adapter of the target, in fp32.
    """

    schema: Literal[2] = LATENT

    def __init__(self, target: Target, model: AdaptedModel[Any]) -> None:
        self._target = target
        self.model = model
        self.label = target.label
        self.recipe = target.recipe

    @classmethod
    def load(cls, target: Target) -> LoadedSource:
        """The model of a target on the CPU.

        Raises:
            UsageError: it is not of a family that can be exported.
            MissingDependencyError, CheckpointError: as loading it.
        """
        model = load_model(target, device="cpu", dtype="fp32")
        if not isinstance(model, AdaptedModel):
            raise UsageError(f"'{target.label}' has no transformer that can be exported", "Export another model.")
        return cls(target, model)

    def sampling(self, resolutions: Sequence[int] | None) -> Sampling:
        model, rollout = self.model, self.recipe.rollout
        conventions = model.components.conventions
        own = (conventions.resolution,)
        if resolutions not in (None, own):
            raise UsageError(
                f"Graphs of '{self.facts.name}' have one size, here {own[0]} px, not {resolutions}",
                "Set model.resolution in the recipe, and export one artifact for each size.",
            )
        channels, height, _ = model.latent_shape
        try:
            return Sampling(
                map=conventions.map,
                path=conventions.path,
                time_scale=conventions.time_scale,
                second_time=conventions.second_time.takes,
                guidance=model.guidance_of(model.components),
                latent_channels=channels,
                latent_scale=conventions.resolution // height,
                resolution=own[0],
                resolutions=own,
                grid=rollout.grid,
                steps=rollout.steps,
            )
        except ValueError as error:
            raise UsageError(
                f"'{self.label}' cannot be exported as it is sampled: {error}", "Change that value in the recipe."
            ) from None

    @property
    def facts(self) -> ModelFacts:
        network, model = self.model.network, self.recipe.model
        return ModelFacts(
            model.name,
            plain_config(dict(cast("Any", network).config)),
            plain_config(dict(self.model.components.vae.config)),
            graph_options(model.config),
        )

    @property
    def _trained(self) -> Path | None:
        """Folder of the adapter that is merged; None for the base itself, and for a full fine-tune."""
        folder = self._target.adapter
        return None if folder is None or is_full(folder) else folder

    @cached_property
    def _files(self) -> WeightFiles:
        """The weights under the adapter: those of the model, or of a full fine-tune."""
        folder = self._target.adapter
        if folder is None or folder == self._trained:
            return self.model.components.weights
        return folder_weights(folder / COMPONENT)

    @cached_property
    def reader(self) -> TensorReader:
        return TensorReader(self._files.files)

    @cached_property
    def base(self) -> Base:
        dtypes = base_dtypes({name: self.reader.describe(name) for name in self.reader.names})
        whole = self._files is not self.model.components.weights
        options = None if whole else base_options(self.recipe.model.config)
        return Base(self.label if whole else self.facts.name, stored_digest(self._files), dtypes, None, options)

    @cached_property
    def adapter(self) -> Adapter | None:
        folder = self._trained
        if folder is None:
            return None
        return adapter_facts(folder, read_adapter_manifest(folder), self.label, self._target.merged)

    @cached_property
    def summed(self) -> frozenset[str]:
        return frozenset(f"{name}.weight" for name in named_tuner_layers(self.model.network))

    @cached_property
    def changed(self) -> frozenset[str]:
        return self.summed if self._trained is None else self.summed.union(read_adapter_manifest(self._trained).extra)

    def axes(self, sampling: Sampling, tokenizers: Mapping[str, TokenizerFacts]) -> dict[str, AxisRange]:
        return {}

    def plans(self, precision: str, tokenizers: Mapping[str, TokenizerFacts]) -> Sequence[GraphPlan]:
        return plans(self.model, DTYPES[precision])

    def sizes(self, options: ExportOptions) -> Iterator[int]:
        for graph, tensors in self._tensors.items():
            # 8-bit weights with the quantiser's temporary copies, and what is kept of the base
            more = 10 * options.int8 if graph == TRANSFORMER else 0
            yield sum((4 + more + 4 * (name in self.changed)) * x.numel() for name, x in tensors.items())

    @cached_property
    def _tensors(self) -> Mapping[str, Mapping[str, Tensor]]:
        """The weights of each graph by their names in it."""
        model = self.model
        texts = {
            f"{name}.{key}": x
            for name, encoder in encoders(text_stack(model)).items()
            for key, x in encoder.state_dict().items()
        }
        network = merged_tensors(model.network, torch.float32)
        return {TEXT_ENCODERS: texts, TRANSFORMER: network, VAE_DECODER: model.components.vae.state_dict()}

    def graph_reader(self, graph: str, names: Sequence[str]) -> Read:
        return lambda name, dtype: self._tensors[graph][name].detach().to(dtype).contiguous()

    def write_tokenizers(self, out: Path) -> dict[str, FormedTokenizerFacts]:
        stack, length = text_stack(self.model), self.model.components.conventions.max_sequence_length
        wanted = stack.tokenise(list(_PROBES), length)
        form = stack.form
        written = {}
        for name in (name for name in wanted if not name.endswith(MASK)):
            loaded: Any = getattr(stack, name)
            file = save_tokenizer(loaded, out, name)
            written[name] = self._reproducing(out / file, file, loaded, form, name, wanted)
        return written

    def _reproducing(
        self, path: Path, file: str, loaded: Any, form: PromptForm, name: str, wanted: Mapping[str, Tensor]
    ) -> FormedTokenizerFacts:
        """The facts with which the file gives the ids, and the mask, of the model."""
        mask = wanted.get(name + MASK)
        facts = FormedTokenizerFacts(
            file=file,
            length=wanted[name].shape[1],
            pad_id=int(loaded.pad_token_id),
            pad_token=str(loaded.pad_token),
            prefix=form.prefix,
            suffix=form.suffix,
            lower=form.lower,
            strip=form.strip,
            padding="right",
            mask=mask is not None,
        )
        for fitting in (facts, replace(facts, padding="left")):
            ids, shown = (torch.from_numpy(x) for x in PromptTokenizer(path, fitting).with_mask(_PROBES))
            if torch.equal(ids, wanted[name].long()) and (mask is None or torch.equal(shown, mask.long())):
                return fitting
        raise CheckpointError(
            f"The tokenizer of {self.model.components.folder / name} does more than its tokenizer.json says",
            "Restore the folder from where the model came from.",
        )
