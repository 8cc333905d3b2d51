"""The input of an export: the files of a model and the changes of a run, read without loading the model.

Weights are read one tensor at a time, with the changes of a run merged in fp32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import CLIPTokenizer, T5Tokenizer

from fmg.core.errors import CheckpointError, UsageError
from fmg.core.hub import locate
from fmg.core.model_folder import read_config, whole
from fmg.core.specs import expand_targets, is_target
from fmg.export.fp8 import Read
from fmg.export.graphs import DTYPES, GraphPlan, clip_plan, decoder_plan, t5_plan, transformer_plan
from fmg.export.options import ExportOptions, plain_config
from fmg.export.weights import TensorType, lay_out, write_weights
from fmg.inference.artifact.layout import TOKENIZER_FILE, TOKENIZERS
from fmg.inference.artifact.manifest import (
    HEIGHT,
    IMAGE,
    PACKED,
    PIXEL_HEIGHT,
    PIXEL_WIDTH,
    TEXT,
    TEXT_ENCODER,
    TEXT_ENCODER_2,
    TRANSFORMER,
    WIDTH,
    Adapter,
    AdapterPart,
    AxisRange,
    Base,
    FileEntry,
    ModelFacts,
    Sampling,
    TokenizerFacts,
)
from fmg.inference.target import Target, load_model
from fmg.models.common.adapter import add_low_rank
from fmg.models.common.checkpoint_files import COMPONENT, adapter_digest, is_full
from fmg.models.common.model import AdaptedModel
from fmg.models.common.pipeline_parts import load_tokenizer, quiet
from fmg.models.common.saved_weights import (
    LORA_A,
    LORA_B,
    AdapterManifest,
    extra_shapes,
    read_adapter_manifest,
    read_adapter_tensors,
    read_transformer_manifest,
)
from fmg.models.common.size import latent_scale
from fmg.models.common.weights import (
    Shapes,
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
from fmg.models.flux.latents import PATCH
from fmg.models.flux.loading import FLUX, TransformerSource, check_student, transformer_source
from fmg.models.flux.transformer import FlowMapFluxTransformer2DModel
from fmg.models.published import DiffusersConfig, LocatedAdapter, StackedConfig, located_adapters
from fmg.recipe import Recipe
from fmg.registry.config import ModelConfig

_TOKENIZER_CLASSES = {TEXT_ENCODER: CLIPTokenizer, TEXT_ENCODER_2: T5Tokenizer}
# T5 exceeds the range of fp16, so encoders stay fp32 beside an fp16 transformer
_TEXT_DTYPES: Mapping[str, torch.dtype] = {**DTYPES, "fp16": torch.float32}


@dataclass(frozen=True)
class ExportSource:
    """A model of the FLUX.1 family on this computer, with what a run trained; an `fmg.export.artifact.ArtifactSource`.

    Attributes:
        label: the name that the user gave.
        name: registered name of the model.
        recipe: how it is sampled and scored.
        folder: its pipeline folder; a student's is that of its teacher.
        conventions: how the transformer is sampled.
        transformer: config and files of the transformer; after a full fine-tune, those of the run.
        checkpoint: folder of what was trained, or None.
        merged: what that adapter was added up from, if it was.
    """

    schema: ClassVar[Literal[1]] = PACKED

    label: str
    name: str
    recipe: Recipe
    folder: Path
    conventions: FlowMapConventions
    transformer: TransformerSource
    checkpoint: Path | None
    merged: tuple[AdapterPart, ...] = ()

    @property
    def tuned_whole(self) -> bool:
        """Whether a full fine-tune trained every weight of the transformer, so that there is nothing to merge."""
        return self.checkpoint is not None and is_full(self.checkpoint)

    @cached_property
    def reader(self) -> TensorReader:
        return TensorReader(self.transformer.weights.files)

    @cached_property
    def stored(self) -> Mapping[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Dtype and shape of every stored weight of the transformer, checked against its config.

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
        shapes = {name: shape for name, (_, shape) in self.stored.items()}
        delta = read_delta(self.checkpoint, shapes, self.label, self.merged)
        check_base(delta, self.digest, str(self.transformer.weights.origin))
        return delta

    @cached_property
    def _vae(self) -> dict[str, object]:
        return read_config(self.folder / "vae")

    @property
    def facts(self) -> ModelFacts:
        return ModelFacts(self.name, plain_config(self.transformer.config), plain_config(self._vae))

    @property
    def base(self) -> Base:
        name = self.label if self.tuned_whole else self.name
        options = None if self.tuned_whole else base_options(self.recipe.model.config)
        return Base(name, self.digest, base_dtypes(self.stored), None, options)

    @property
    def adapter(self) -> Adapter | None:
        return None if self.delta is None else self.delta.adapter

    @property
    def summed(self) -> frozenset[str]:
        return frozenset() if self.delta is None else frozenset(self.delta.lora)

    @property
    def changed(self) -> frozenset[str]:
        return frozenset() if self.delta is None else self.delta.changed

    @property
    def model(self) -> AdaptedModel[Any]:
        target = Target(self.label, self.recipe, self.checkpoint)
        return cast("AdaptedModel[Any]", load_model(target, dtype="fp32"))

    def sampling(self, resolutions: Sequence[int] | None) -> Sampling:
        conventions, rollout = self.conventions, self.recipe.rollout
        scale = latent_scale(self._vae)
        sizes = tuple(sorted(set(resolutions or (conventions.resolution,))))
        token = scale * PATCH
        for size in sizes:
            if size < token or size % token:
                raise UsageError(
                    f"The resolution {size} is not a multiple of {token}, the side of a token of '{self.name}'",
                    f"Use multiples of {token}.",
                )
        return Sampling(
            map=conventions.map,
            path=conventions.path,
            time_scale=conventions.time_scale,
            second_time=conventions.second_time.takes,
            guidance=conventions.guidance,
            latent_channels=whole(self._vae, "latent_channels"),
            latent_scale=scale,
            resolution=default_resolution(conventions.resolution, sizes),
            resolutions=sizes,
            grid=rollout.grid,
            steps=rollout.steps,
        )

    def axes(self, sampling: Sampling, tokenizers: Mapping[str, TokenizerFacts]) -> dict[str, AxisRange]:
        length = tokenizers[TEXT_ENCODER_2].length
        return {TEXT: AxisRange(length, length, length), **image_axes(sampling)}

    def plans(self, precision: str, tokenizers: Mapping[str, TokenizerFacts]) -> tuple[GraphPlan, ...]:
        folder, text = self.folder, _TEXT_DTYPES[precision]
        for name in ("text_encoder", "text_encoder_2"):
            FLUX.class_of(folder / name, name)
        return (
            clip_plan(read_config(folder / "text_encoder"), tokenizers[TEXT_ENCODER].length, text),
            t5_plan(read_config(folder / "text_encoder_2"), text),
            transformer_plan(self.transformer.config, DTYPES[precision]),
            decoder_plan(FLUX.class_of(folder / "vae", "vae"), self._vae),
        )

    def graph_reader(self, graph: str, names: Sequence[str]) -> Read:
        @cache
        def reader(dtype: torch.dtype) -> Callable[[str], Tensor]:
            if graph == TRANSFORMER:
                return merged(self.reader, self.delta, dtype)
            component = graph if graph in (TEXT_ENCODER, TEXT_ENCODER_2) else "vae"
            return component_reader(self.folder / component, names, dtype)

        return lambda name, dtype: reader(dtype)(name)

    def write_tokenizers(self, out: Path) -> dict[str, TokenizerFacts]:
        return {graph: self._write_tokenizer(graph, out) for graph in _TOKENIZER_CLASSES}

    def _write_tokenizer(self, graph: str, out: Path) -> TokenizerFacts:
        folder = TOKENIZERS[graph]
        with quiet():
            loaded: Any = load_tokenizer(self.folder / folder, _TOKENIZER_CLASSES[graph])
        if (loaded.padding_side, loaded.truncation_side) != ("right", "right"):
            raise CheckpointError(
                f"The tokenizer in {self.folder / folder} does not pad and truncate on the right",
                "Give a FLUX pipeline folder.",
            )
        length = self.conventions.max_sequence_length if graph == TEXT_ENCODER_2 else int(loaded.model_max_length)
        name = save_tokenizer(loaded, out, folder)
        return TokenizerFacts(name, length, int(loaded.pad_token_id), str(loaded.pad_token))

    def sizes(self, options: ExportOptions) -> Iterator[int]:
        elements = {name: math.prod(shape) for name, (_, shape) in self.stored.items()}
        total = sum(elements.values())
        yield total * DTYPES[options.precision].itemsize
        for name in ("text_encoder", "text_encoder_2"):
            yield stored_elements(self.folder / name) * _TEXT_DTYPES[options.precision].itemsize
        yield stored_elements(self.folder / "vae") * torch.float32.itemsize
        for name in self.changed:
            yield elements[name] * self.stored[name][0].itemsize
        if options.int8:
            # with the quantiser's temporary copies
            yield total * (2 * torch.float32.itemsize + 2)


def default_resolution(own: int, sizes: Sequence[int]) -> int:
    """The default side in pixels: the model's own, or else the largest of `sizes` (in increasing order)."""
    return own if own in sizes else sizes[-1]


def image_axes(sampling: Sampling) -> dict[str, AxisRange]:
    """The axes that follow from the resolutions of an artifact, with the default resolution as optimum."""
    latent = _range(sampling, lambda size: sampling.latent_shape(size)[1])
    pixels = _range(sampling, lambda size: size)
    return {
        IMAGE: _range(sampling, sampling.image_tokens),
        HEIGHT: latent,
        WIDTH: latent,
        PIXEL_HEIGHT: pixels,
        PIXEL_WIDTH: pixels,
    }


def _range(sampling: Sampling, measure: Callable[[int], int]) -> AxisRange:
    values = [measure(size) for size in sampling.resolutions]
    return AxisRange(min(values), measure(sampling.resolution), max(values))


def conventions_of(recipe: Recipe) -> FlowMapConventions:
    """How the model of a recipe is sampled; its weights need not be there.

    Raises:
        UsageError: models of this family cannot be exported.
        CheckpointError: a local folder does not state it.
    """
    config, name = recipe.model.config, recipe.model.name
    if isinstance(config, EmbeddedConfig):
        return read_conventions(config.directory())
    if isinstance(config, FluxConfig):
        return config.conventions()
    raise UsageError(
        f"The model '{name}' is not of the FLUX.1 family, the only one that this export supports",
        "Export an artifact without options, or load the adapter of the run with `pipe.load_lora_weights`.",
    )


def graph_options(config: ModelConfig) -> dict[str, object]:
    """The options of a model that its graphs depend on.

    Left out are those of every family, which say where and how it is computed, those that say how it is sampled, and
    those that name files: the digest of the base covers these.
    """
    shared = {*DiffusersConfig.model_fields, *StackedConfig.model_fields, *config.sampling_options}
    files = {asset.option.removeprefix("model.") for asset in config.assets()}
    return config.model_dump(mode="json", include=type(config).model_fields.keys() - shared - files)


def exported_options(options: Mapping[str, object], config: ModelConfig) -> dict[str, object]:
    """The options in a manifest that correspond to `graph_options`: earlier versions wrote those of sampling, too."""
    return {name: value for name, value in options.items() if name not in config.sampling_options}


def base_options(config: ModelConfig) -> dict[str, object] | None:
    """The options by which a model is found again; None for its default recipe's.

    Left out are those of every family, which say where and how it is computed.
    """
    usual, plain = config.usual(), config.model_dump(mode="json")
    stated = plain.keys() - DiffusersConfig.model_fields.keys()
    others = {name: plain[name] for name in plain if name in stated and getattr(config, name) != getattr(usual, name)}
    return others or None


def packs_latents(recipe: Recipe) -> bool:
    """Whether the model of a recipe is of the FLUX.1 family, whose artifacts have schema 1."""
    return isinstance(recipe.model.config, (EmbeddedConfig, FluxConfig))


def check_exportable(recipe: Recipe) -> None:
    """Checks that the network of a recipe's model can be traced.

    Raises:
        UsageError: it cannot.
    """
    if not recipe.model.config.exportable:
        raise UsageError(
            f"The network of '{recipe.model.name}' cannot be traced as a graph",
            "Load the adapter of the run with `pipe.load_lora_weights` instead.",
        )


def find_source(target: Target) -> ExportSource:
    """The files behind a target.

    Raises:
        UsageError: models of this family cannot be exported.
        MissingDependencyError: published files have not been fetched.
        CheckpointError: a local source does not exist or is incomplete.
    """
    config, name = target.recipe.model.config, target.recipe.model.name
    conventions = conventions_of(target.recipe)
    student, adapters = None, tuple[LocatedAdapter, ...]()
    if isinstance(config, FluxConfig):
        folder = locate(config.architecture(), "model", name, config.source_options).path
        if isinstance(config, FluxStudentConfig):
            student = locate(config.assets()[0], "model", name, config.source_options).path
        adapters = located_adapters(config)
    else:
        assert isinstance(config, EmbeddedConfig)
        folder = config.directory()
    source = transformer_source(folder, conventions, student, adapters)
    if target.adapter is not None and is_full(target.adapter):
        read_transformer_manifest(target.adapter)
        source = replace(source, weights=folder_weights(target.adapter / COMPONENT))
    return ExportSource(target.label, name, target.recipe, folder, conventions, source, target.adapter, target.merged)


def recipe_facts(recipe: Recipe) -> tuple[tuple[Mapping[str, object], ...], Mapping[str, object]]:
    """The facts of a recipe in a manifest, to verify equal rewards again: its rewards and prompt sets."""
    plain: Any = recipe.plain()
    return tuple(plain["rewards"]), {"train": plain["prompts"], "eval": plain["eval"]["prompts"]}


@dataclass(frozen=True)
class Delta:
    """The changes of a run to the weights of its base, by name: low-rank terms, and tensors that it trained in full.

    Attributes:
        lora: A (rank, inputs) and B (outputs, rank) for a matrix (outputs, inputs).
        replaced: tensors that replace those of the base.
        adapter: its entry in the manifest.
        base_name: registered name of the model that it belongs to.
        base_digest: sha256 of that model's stored weights.
    """

    lora: Mapping[str, tuple[Tensor, Tensor]]
    replaced: Mapping[str, Tensor]
    adapter: Adapter
    base_name: str
    base_digest: str

    @property
    def changed(self) -> frozenset[str]:
        """Names of the weights that differ from the base."""
        return frozenset(self.lora) | frozenset(self.replaced)

    def apply(self, name: str, base: Tensor, dtype: torch.dtype) -> Tensor:
        """The weight called `name` in `dtype`: W + scale B A (`add_low_rank`)."""
        if name in self.replaced:
            return self.replaced[name].to(dtype)
        if name not in self.lora:
            return base.to(dtype)
        return add_low_rank(base, *self.lora[name], self.adapter.scale, dtype)


def read_delta(folder: Path, shapes: Shapes, run: str, merged: Sequence[AdapterPart] = ()) -> Delta:
    """The changes of a saved adapter.

    Args:
        folder: what `save_adapter` wrote.
        shapes: shapes of the base's weights by name.
        run: name of the run in the manifest.
        merged: what the adapter was added up from, if it was.

    Raises:
        CheckpointError: the folder is damaged or does not fit weights of these names and shapes.
    """
    manifest = read_adapter_manifest(folder)
    extra = extra_shapes(folder, manifest, shapes)
    tensors = read_adapter_tensors(folder, {**_adapter_shapes(shapes, manifest), **extra})
    modules = [name.removesuffix(LORA_A) for name in tensors if name.endswith(LORA_A)]
    lora = {f"{module}.weight": (tensors[module + LORA_A], tensors[module + LORA_B]) for module in sorted(modules)}
    facts = adapter_facts(folder, manifest, run, merged)
    replaced = {name: tensors[name] for name in extra}
    return Delta(lora, replaced, facts, manifest.base.name, manifest.base.digest)


def adapter_facts(folder: Path, saved: AdapterManifest, run: str, merged: Sequence[AdapterPart]) -> Adapter:
    """The entry of an adapter in the manifest of an artifact; arguments as in `read_delta`."""
    return Adapter(
        digest=adapter_digest(folder),
        rank=saved.rank,
        alpha=saved.alpha,
        scale=saved.alpha / saved.rank,
        targets=saved.targets,
        run=run,
        parts=tuple(merged),
    )


def check_base(delta: Delta, digest: str, where: str) -> None:
    """Checks that the changes belong to weights with this digest.

    Raises:
        CheckpointError: they were trained on other weights.
    """
    if delta.base_digest != digest:
        raise CheckpointError(
            f"The adapter of {delta.adapter.run} was trained on different weights of '{delta.base_name}' than those in"
            f" {where}",
            f"Give the folder it was trained on (sha256 {delta.base_digest[:12]}).",
        )


def _adapter_shapes(shapes: Shapes, manifest: AdapterManifest) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the adapter's tensors for these weights."""
    suffixes = expand_targets(manifest.targets)
    expected: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        module = name.removesuffix(".weight")
        if len(shape) == 2 and module != name and is_target(module, suffixes):
            outputs, inputs = shape
            expected[module + LORA_A] = (manifest.rank, inputs)
            expected[module + LORA_B] = (outputs, manifest.rank)
    return expected


def merged(base: TensorReader, delta: Delta | None, dtype: torch.dtype) -> Callable[[str], Tensor]:
    """Reads weights with the changes of a run, in `dtype`; sums are computed in fp32."""
    if delta is None:
        return lambda name: base.read(name).to(dtype)
    return lambda name: delta.apply(name, base.read(name), dtype)


def write_base(file: Path, base: TensorReader, names: Iterable[str], dtype: torch.dtype | None = None) -> FileEntry:
    """Writes some weights of the base, in `dtype` or (None) as `base` stores them."""
    layout = lay_out({name: (dtype or stored, shape) for name in names for stored, shape in [base.describe(name)]})
    return write_weights(file, layout, lambda name: base.read(name).to(dtype) if dtype else base.read(name))


def base_dtypes(stored: Mapping[str, TensorType]) -> tuple[str, ...]:
    """Names of the dtypes that weights are stored in, sorted."""
    return tuple(sorted({str(dtype).removeprefix("torch.") for dtype, _ in stored.values()}))


def component_reader(folder: Path, names: Iterable[str], dtype: torch.dtype) -> Callable[[str], Tensor]:
    """Reads the tensors called `names` of a component folder, in `dtype`.

    They are streamed if the files have these names or a known older form of them. If not, the library that wrote the
    folder loads and renames them.

    Raises:
        CheckpointError: a file is missing or damaged, or lacks a tensor.
    """
    files = folder_weights(folder).files
    aliases = {name: alias for name in names if (alias := _stored_name(name, files.keys())) is not None}
    if set(names) <= aliases.keys():
        reader = TensorReader({name: files[alias] for name, alias in aliases.items()}, aliases)
        return lambda name: reader.read(name).to(dtype)
    with quiet():
        tensors = FLUX.module(folder, dtype).state_dict()
    return lambda name: tensors[name]


def stored_elements(folder: Path) -> int:
    """Numbers in the weight files of a component folder.

    Raises:
        CheckpointError: there is no weight file, or one cannot be read.
    """
    files = folder_weights(folder).files
    reader = TensorReader(files)
    return sum(math.prod(reader.describe(name)[1]) for name in files)


def save_tokenizer(loaded: Any, out: Path, folder: str) -> str:
    """Writes a tokenizer of transformers as `folder/tokenizer.json` under `out`; returns that name.

    Lengths are in the manifest, not in the file, so that a prompt's own length can still be counted.
    """
    backend = Tokenizer.from_str(loaded.backend_tokenizer.to_str())
    backend.no_padding()
    backend.no_truncation()
    (out / folder).mkdir()
    name = f"{folder}/{TOKENIZER_FILE}"
    backend.save(str(out / name))
    return name


def _stored_name(name: str, stored: Iterable[str]) -> str | None:
    """The name in the files: T5's embedding is tied, and CLIP's text model used to be one level deeper."""
    candidates = [name, f"text_model.{name}"]
    candidates += ["shared.weight"] if name == "encoder.embed_tokens.weight" else []
    candidates += ["encoder.embed_tokens.weight"] if name == "shared.weight" else []
    return next((candidate for candidate in candidates if candidate in stored), None)
