"""Models with published weights: located on this computer, never on the network. Imports no torch."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from fmg.core.errors import CheckpointError, FmgWarning
from fmg.core.files import from_home
from fmg.core.hub import Asset, HubSource, Located, locate, parse_source, problem
from fmg.core.model_folder import stated_config
from fmg.core.specs import Kernel, MapSpec, ModelGeometry
from fmg.models.common.checkpoint_files import DIFFUSERS_FILE, EXTRA_FILE, PEFT_CONFIG_FILE, PEFT_FILE
from fmg.models.common.size import TransformerSize, stored_names
from fmg.models.conventions import FlowMapConventions, Worded
from fmg.registry.config import ComponentConfig, ModelConfig

if TYPE_CHECKING:
    import torch

    from fmg.core.protocols import Model

BYTES = 2
"""Bytes of a bf16 weight, the dtype that plans assume for published weights."""

PAPER_ANCHOR = ("asfmc", (("gap", 0.0147),))
"""The local anchor of the Flow-Map GRPO paper (epsilon 0.03, strength 0.7) in its exact form."""
EULER_ANCHORS = (
    "A jump to an anchor is one Euler step. The weights were distilled for their own Euler steps, not for new noise: "
    "samples of a stochasticizer may leave their distribution. `fmg eval --path-check` measures by how much."
)
"""`anchor_note` of a velocity network that was distilled by distribution matching."""
EULER_KERNEL = PAPER_ANCHOR
"""Its default stochasticizer: the anchor just below the target time adds the least noise it was not distilled for."""

# Models this large are refused on a machine without a GPU, unless the CPU is requested by name.
_LARGE = 500_000_000


class PublishedConfig(ModelConfig):
    """Options of a model with published weights, which have to be fetched first."""

    work_space: ClassVar[float] = 1.4
    """GPU memory at the default resolution in micro-batches, relative to the transformer's weights."""

    gradient_checkpointing: bool = Field(
        default=True, description="Recompute each block in the backward pass instead of keeping its activations."
    )
    text_device: Literal["model", "cpu", "offload"] = Field(
        default="offload",
        description="Where the text encoders are kept: beside the model, on the CPU, or in host memory except "
        "while they encode.",
    )
    text_cache: bool = Field(
        default=True,
        description="Keep prompt embeddings on disk, so that each prompt is encoded only once across runs.",
    )

    @abstractmethod
    def conventions(self) -> FlowMapConventions:
        """How the weights are sampled."""

    def facts(self) -> Mapping[str, str]:
        """The transformer's class and its times, besides the kind of map and the grid."""
        stated = self.conventions()
        second, scale = stated.second_time, f"x {stated.time_scale:g}"
        joined = "added" if second.gate is None else f"mixed with gate {second.gate:g}"
        takes = f"{second.takes}, {joined}, x {second.scale or stated.time_scale:g}" if second else "none"
        return {"transformer": self.transformer_class, **super().facts(), "time": scale, "second time": takes}

    @abstractmethod
    def load(self, device: torch.device, dtype: torch.dtype) -> Model:
        """Reads the model from files on this computer. Imports the libraries of its family, which takes seconds.

        Raises:
            MissingDependencyError: files that have not been fetched, or an attention backend that is not installed.
            CheckpointError: a file that is damaged, of the wrong kind, or does not fit the others.
        """

    def card_facts(self) -> Mapping[str, str]:
        """The repository of the trained weights, with a link to their terms."""
        source = self.assets()[0].place
        if not isinstance(source, HubSource):
            return {}
        return {
            "base_model": source.repository,
            "license": "other",
            "license_name": "terms-of-the-base-model",
            "license_link": f"https://huggingface.co/{source.repository}",
        }

    interior_kernel: ClassVar[Kernel | None] = None
    """Default stochasticizer of a map that takes any anchor; None: the usual one."""
    transformer_class: ClassVar[str]
    """Name of the transformer's class in diffusers."""
    published: ClassVar[Mapping[str, object]]
    """The transformer's config if it is not on this computer yet."""
    size_class: ClassVar[type[TransformerSize] | None] = None
    """Sizes by the transformer's config; None: `parameters` is overridden, and the plan counts calls only."""

    @abstractmethod
    def architecture(self) -> Asset:
        """The asset whose folder has the transformer's `config.json`."""

    def assets(self) -> tuple[Asset, ...]:
        """The one folder, unless the family reads more."""
        return (self.architecture(),)

    def check_complete(self) -> None:
        """Checks that options and files agree, without reading a weight. All files must be present.

        Raises:
            CheckpointError: they do not make a model.
        """
        return

    def transformer(self) -> Mapping[str, object]:
        """The transformer's `config.json` in a local folder, else the published one."""
        place = self.architecture().place
        stated = stated_config(place / "transformer") if isinstance(place, Path) else None
        return stated or self.published_config()

    def published_config(self) -> Mapping[str, object]:
        """The published config: `published`, unless the source selects one of several sizes."""
        return self.published

    def parameters(self) -> int:
        """Parameters of the transformer, from `config.json` in a local folder, otherwise from the published one."""
        assert self.size_class is not None
        return self.size_class(self.transformer()).parameters

    @property
    def registered_name(self) -> str:
        """Name of the model, which its default recipe has as well, wherever the file is."""
        assert self.recipe is not None
        return Path(self.recipe).stem

    def usual(self) -> ComponentConfig:
        """The model with the options of its default recipe, which states all of them."""
        from fmg.recipe import Recipe

        return Recipe.default(self.registered_name).model.config

    def folder_here(self) -> Path | None:
        """The folder of `architecture` if it is on this computer, fetched or local."""
        asset = self.architecture()
        return None if problem(asset) else locate(asset, "model", self.registered_name).path

    def spec(self) -> MapSpec:
        """Declared properties, available without fetching anything or reading a weight."""
        assert self.recipe is not None
        parameters = self.parameters()
        memory = self.work_space * BYTES * parameters / 1e9 if parameters >= _LARGE else 0.0
        spec = replace(self.conventions().spec(self.recipe), gpu_memory_gb=memory)
        if self.interior_kernel is None or spec.anchors != "any":
            return spec
        return replace(spec, default_stochasticizer=self.interior_kernel)

    def sizes(self) -> ModelGeometry | None:
        """The geometry of the folder or the published one, apart from the options that `geometry` adds.

        None: the plan counts calls only.
        """
        if self.size_class is None:
            return None
        return self.size_class.geometry(self.folder_here(), self.published_config(), self.conventions())

    def geometry(self) -> ModelGeometry | None:
        """Sizes from the JSON files and safetensors headers of the folder, or the published ones."""
        sizes, resident = self.sizes(), self.text_device == "model"
        if sizes is None:
            return None
        return replace(sizes, checkpointing=self.gradient_checkpointing, encoders_resident=resident)


class DiffusersConfig(PublishedConfig):
    """Options of a model whose attention and autoencoder have diffusers' options."""

    attention: Literal["native", "flash", "sage", "xformers"] = Field(
        default="native", description="Attention backend of diffusers; native is PyTorch's own."
    )
    vae_tile: int | None = Field(
        default=None,
        ge=128,
        multiple_of=16,
        description="Side in pixels of the tiles that larger images are decoded in, blended at the seams; null: whole.",
    )
    vae_slicing: bool = Field(
        default=False, description="Decode one image at a time, even if several would fit in a call."
    )

    def geometry(self) -> ModelGeometry | None:
        """As `PublishedConfig.geometry`, with the tiles that images are decoded in."""
        geometry = super().geometry()
        return None if geometry is None else replace(geometry, decoder_tile=self.vae_tile)


class AdapterFile(Worded):
    """A published adapter of the base: a LoRA, with or without the second-time embedder trained with it."""

    word: ClassVar[str] = "source"

    source: str = Field(
        min_length=1,
        description="Hub file owner/name@revision:file, or a local .pt, .safetensors or PEFT folder.",
    )
    alpha: float | None = Field(
        default=None, gt=0, description="Alpha of its LoRA; null: as the file or the config beside it states."
    )
    scale: float = Field(default=1.0, description="Additional factor on its LoRA.")

    def asset(self, number: int) -> Asset:
        """The file and, in a PEFT folder, its config."""
        place = parse_source(self.source)
        named = place.file if isinstance(place, HubSource) else self.source
        if named is not None and from_home(named).is_dir():
            named = None
        return Asset(
            f"adapter {number}",
            "model.adapters",
            self.source,
            files=(f"{PEFT_FILE}|{DIFFUSERS_FILE}" if named is None else PurePosixPath(named).name,),
            optional=(PEFT_CONFIG_FILE, EXTRA_FILE),
            licence="as its authors state",
        )


@dataclass(frozen=True)
class LocatedAdapter:
    """An `AdapterFile` on this computer.

    Attributes:
        files: its weight file, and that of weights trained with the LoRA if they are in a separate file.
        config: its PEFT config, if it has one.
        stated: its entry in the recipe.
    """

    files: tuple[Path, ...]
    config: Path | None
    stated: AdapterFile


class StackedConfig(PublishedConfig):
    """Options of a model whose base is merged from a folder and published adapters."""

    second_embedder: ClassVar[str]
    """Path of the second-time embedder in the transformer."""

    adapters: tuple[AdapterFile, ...] = Field(
        default=(),
        description="Adapters to merge into the base before anything else, in this order: LoRAs add up, and the last"
        " second-time embedder replaces the others.",
    )

    def adapter_assets(self) -> tuple[Asset, ...]:
        """The files of the adapters."""
        return tuple(adapter.asset(number) for number, adapter in enumerate(self.adapters, start=1))

    def assets(self) -> tuple[Asset, ...]:
        """The folder, then the adapters."""
        return (*super().assets(), *self.adapter_assets())

    def check_complete(self) -> None:
        """Refuses a base without the second-time embedder, which an adapter has to bring."""
        folder = self.folder_here()
        if self.adapters or not self.conventions().second_time or folder is None:
            return
        if not any(name.startswith(f"{self.second_embedder}.") for name in stored_names(folder / "transformer")):
            raise CheckpointError(
                f"The transformer in {folder} has no second-time embedder, which a two-time map needs",
                "Name the files of its authors in their order: --set 'model.adapters=[{source: FILE, alpha: ALPHA}]'.",
            )


def located_adapters(config: PublishedConfig) -> tuple[LocatedAdapter, ...]:
    """The adapters of a model on this computer; empty for a model without adapters.

    Raises:
        MissingDependencyError: a published file that has not been fetched.
        CheckpointError: a local file that does not exist.
    """
    if not isinstance(config, StackedConfig):
        return ()
    located = (locate(asset, "model", config.registered_name) for asset in config.adapter_assets())
    return tuple(_adapter(found, stated) for found, stated in zip(located, config.adapters, strict=True))


def _adapter(found: Located, stated: AdapterFile) -> LocatedAdapter:
    # only a file with the name that PEFT or fmg gave it belongs to what is beside it
    config = found.files.get(PEFT_CONFIG_FILE) if found.path.name == PEFT_FILE else None
    extra = found.files.get(EXTRA_FILE) if found.path.name == DIFFUSERS_FILE else None
    return LocatedAdapter((found.path, *((extra,) if extra else ())), config, stated)


# without the variants, such as fp16, that some repositories have beside the weights
_MAIN = ("model", "diffusion_pytorch_model")
_MAIN_FILES = ("*.json", *(f"{name}{end}" for name in _MAIN for end in (".safetensors", "-*.safetensors")))


def pipeline_folder(
    source: str, components: Sequence[str], tokenizers: Sequence[str], size_gb: float, licence: str
) -> Asset:
    """The asset of a pipeline folder under the option `model.folder`: its weights, configs and tokenizers."""
    files = (f"{name}/{kind}" for name in components for kind in _MAIN_FILES)
    patterns = ("model_index.json", *(f"{name}/*" for name in tokenizers), *files)
    folders = tuple(components)
    return Asset(
        "pipeline", "model.folder", source, folders=folders, patterns=patterns, size_gb=size_gb, licence=licence
    )


@dataclass(frozen=True)
class PublishedSource:
    """A model that has not been loaded yet."""

    config: PublishedConfig

    @property
    def name(self) -> str:
        """Registered name of the model."""
        return self.config.registered_name

    @property
    def spec(self) -> MapSpec:
        """Declared properties, known without reading a weight."""
        return self.config.spec()

    def check(self) -> None:
        """Checks that every file is on this computer, without reading a weight.

        Raises:
            MissingDependencyError: published files that have not been fetched; names the command that does.
            CheckpointError: a local source that does not exist or is incomplete.
        """
        for asset in self.config.assets():
            locate(asset, "model", self.name, self.config.source_options)
        self.config.check_complete()

    def load(self, device: torch.device, dtype: torch.dtype) -> Model:
        """Loads the weights to `device` in `dtype`; warns when they do not fit the stated time scale.

        Raises:
            MissingDependencyError: files that have not been fetched, or an attention backend that is not installed.
            CheckpointError: a file that is damaged, of the wrong kind, or does not fit the others.
        """
        self.check()
        if device.type == "cpu" and self.spec.gpu_memory_gb:
            warnings.warn(f"'{self.name}' runs on the CPU, which takes minutes per image.", FmgWarning, stacklevel=2)
        return self.config.load(device, dtype)
