"""Exports a model of any family that can be traced: loaded once, with what a run trained merged in fp32.

FLUX, whose weights are streamed from their files, has an export of its own (`fmg.export.artifact`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, cast

import torch
from tokenizers import Tokenizer
from torch import Tensor

from fmg.core.errors import CheckpointError, UsageError
from fmg.core.events import Observer, StageProgress
from fmg.core.files import atomic_folder, check_space
from fmg.core.prompt import MASK, PromptForm
from fmg.export.calibration import CALIBRATION, calibrated
from fmg.export.fp8 import Fp8Graph
from fmg.export.fused import add_sampler
from fmg.export.graph_files import DTYPES, write_graph
from fmg.export.int8 import add_int8
from fmg.export.model_graphs import encoders, plans, text_stack
from fmg.export.onnx import OPSET, TracedGraph, trace
from fmg.export.options import LARGE_BATCH, SMALL_BATCH, ExportOptions, library_versions, plain_config
from fmg.export.source import adapter_facts, base_dtypes, base_options, graph_options, recipe_facts, write_base
from fmg.inference.artifact.backend import PromptTokenizer
from fmg.inference.artifact.layout import (
    BASE_WEIGHTS,
    TOKENIZER_FILE,
    Artifact,
    file_entry,
    write_manifest,
)
from fmg.inference.artifact.manifest import (
    BATCH,
    LATENT,
    TEXT_ENCODERS,
    TRANSFORMER,
    TRANSFORMER_INT8,
    VAE_DECODER,
    Adapter,
    AxisRange,
    Base,
    FormedTokenizerFacts,
    Graph,
    Manifest,
    ModelFacts,
    Sampling,
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
    """A model in memory as the source of an artifact: its facts, tokenizers and weights.

    Args:
        target: what was loaded.
        model: the model with the adapter of the target, in fp32.
    """

    def __init__(self, target: Target, model: AdaptedModel[Any]) -> None:
        self.target = target
        self.model = model
        self.label = target.label

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

    @property
    def sampling(self) -> Sampling:
        """How the artifact is sampled."""
        model, rollout = self.model, self.target.recipe.rollout
        conventions = model.components.conventions
        channels, height, _ = model.latent_shape
        return Sampling(
            map=conventions.map,
            path=conventions.path,
            time_scale=conventions.time_scale,
            second_time=conventions.second_time.takes,
            guidance=model.guidance_of(model.components),
            latent_channels=channels,
            latent_scale=conventions.resolution // height,
            resolution=conventions.resolution,
            resolutions=(conventions.resolution,),
            grid=rollout.grid,
            steps=rollout.steps,
        )

    @property
    def facts(self) -> ModelFacts:
        """Name, configs and options of the model."""
        network, model = self.model.network, self.target.recipe.model
        return ModelFacts(
            model.name,
            plain_config(dict(cast("Any", network).config)),
            plain_config(dict(self.model.components.vae.config)),
            graph_options(model.config),
        )

    @property
    def trained(self) -> Path | None:
        """Folder of the adapter that is merged; None for the base itself, and for a full fine-tune."""
        folder = self.target.adapter
        return None if folder is None or is_full(folder) else folder

    @cached_property
    def stored(self) -> WeightFiles:
        """The weights under the adapter: those of the model, or of a full fine-tune."""
        folder = self.target.adapter
        if folder is None or folder == self.trained:
            return self.model.components.weights
        return folder_weights(folder / COMPONENT)

    @cached_property
    def base(self) -> Base:
        """The facts of `stored`."""
        files, reader = self.stored, TensorReader(self.stored.files)
        dtypes = base_dtypes({name: reader.describe(name) for name in files.files})
        whole = files is not self.model.components.weights
        options = None if whole else base_options(self.target.recipe.model.config)
        return Base(self.label if whole else self.facts.name, stored_digest(files), dtypes, None, options)

    @property
    def adapter(self) -> Adapter | None:
        """What is merged."""
        folder = self.trained
        if folder is None:
            return None
        return adapter_facts(folder, read_adapter_manifest(folder), self.label, self.target.merged)

    @cached_property
    def changed(self) -> frozenset[str]:
        """Names of the weights that the adapter changes."""
        low_rank = {f"{name}.weight" for name in named_tuner_layers(self.model.network)}
        return frozenset(low_rank if self.trained is None else low_rank | {*read_adapter_manifest(self.trained).extra})

    @cached_property
    def tensors(self) -> Mapping[str, Mapping[str, Tensor]]:
        """The weights of each graph by their names in it."""
        model = self.model
        texts = {
            f"{name}.{key}": x
            for name, encoder in encoders(text_stack(model)).items()
            for key, x in encoder.state_dict().items()
        }
        network = merged_tensors(model.network, torch.float32)
        return {TEXT_ENCODERS: texts, TRANSFORMER: network, VAE_DECODER: model.components.vae.state_dict()}

    def read(self, graph: str, name: str, dtype: torch.dtype) -> Tensor:
        """A weight of a graph."""
        return self.tensors[graph][name].detach().to(dtype).contiguous()

    def write_tokenizers(self, out: Path) -> dict[str, FormedTokenizerFacts]:
        """Writes each tokenizer as `NAME/tokenizer.json` under `out`.

        Raises:
            CheckpointError: the file alone does not give the ids of the model.
        """
        stack, length = text_stack(self.model), self.model.components.conventions.max_sequence_length
        wanted = stack.tokenise(list(_PROBES), length)
        form = stack.form
        written = {}
        for name in (name for name in wanted if not name.endswith(MASK)):
            loaded: Any = getattr(stack, name)
            backend = Tokenizer.from_str(loaded.backend_tokenizer.to_str())
            # lengths are in the manifest, not in the file, so that a prompt's own length can still be counted
            backend.no_padding()
            backend.no_truncation()
            (out / name).mkdir()
            file = f"{name}/{TOKENIZER_FILE}"
            backend.save(str(out / file))
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


def export_loaded(target: Target, out: Path, options: ExportOptions, observer: Observer) -> Artifact:
    """Writes the artifact of a model of any family that can be traced; errors as `export_artifact`."""
    options.check()
    source = LoadedSource.load(target)
    own = source.sampling.resolution
    if options.resolutions not in (None, (own,)):
        raise UsageError(
            f"Graphs of '{source.facts.name}' have one size, here {own} px, not {options.resolutions}",
            "Set model.resolution in the recipe, and export one artifact for each size.",
        )
    check_space(out, sum(_bytes(source, options)))
    with atomic_folder(out) as folder:
        manifest = _write(source, folder, options, observer)
        if options.fused:
            manifest = add_sampler(folder, manifest)
        write_manifest(folder, manifest)
    return Artifact(out, manifest)


def _bytes(source: LoadedSource, options: ExportOptions) -> Iterator[int]:
    """Bytes of the weight files to be written, at most."""
    for graph, tensors in source.tensors.items():
        # 8-bit weights with the quantiser's temporary copies, and what is kept of the base
        more = 10 * options.int8 if graph == TRANSFORMER else 0
        yield sum((4 + more + 4 * (name in source.changed)) * x.numel() for name, x in tensors.items())


def _write(source: LoadedSource, folder: Path, options: ExportOptions, observer: Observer) -> Manifest:
    """Writes every file but the manifest, which it returns."""
    tokenizers = source.write_tokenizers(folder)
    files = {facts.file: file_entry(folder / facts.file) for facts in tokenizers.values()}
    graphs: dict[str, Graph] = {}
    base, sampling = source.base, source.sampling
    planned = plans(source.model, DTYPES[options.precision])
    for number, plan in enumerate(planned):
        observer(StageProgress("tracing", number, len(planned)))
        traced = trace(plan)
        made: TracedGraph | Fp8Graph = traced
        if plan.name == TRANSFORMER:
            if changed := sorted(source.changed & traced.parameters.keys()):
                base = replace(base, weights=BASE_WEIGHTS)
                files[BASE_WEIGHTS] = write_base(folder / BASE_WEIGHTS, TensorReader(source.stored.files), changed)
            if options.precision == "fp8":
                shapes, recipe = {sampling.resolution: sampling.latent_shape()}, source.target.recipe
                made, files[CALIBRATION] = calibrated(folder, traced, source.model, recipe, shapes, observer)
        graphs[plan.name], written = write_graph(folder, made, partial(source.read, plan.name), observer)
        files |= written
    observer(StageProgress("tracing", len(planned), len(planned)))
    if options.int8:
        observer(StageProgress("8-bit weights", 0, 1))
        graphs[TRANSFORMER_INT8], written = add_int8(folder, graphs[TRANSFORMER])
        files |= written
        observer(StageProgress("8-bit weights", 1, 1))
    rewards, prompts = recipe_facts(source.target.recipe)
    large = bool(source.model.spec.gpu_memory_gb)
    return Manifest(
        schema=LATENT,
        files=dict(sorted(files.items())),
        model=source.facts,
        sampling=sampling,
        precision=options.precision,
        opset=OPSET,
        axes={BATCH: AxisRange(*(options.batch or (LARGE_BATCH if large else SMALL_BATCH)))},
        graphs=graphs,
        tokenizers=tokenizers,
        base=base,
        adapter=source.adapter,
        rewards=rewards,
        prompts=prompts,
        libraries=library_versions(),
        checks=(),
    )
