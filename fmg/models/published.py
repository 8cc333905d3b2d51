"""What the models of published weights have in common. Imports no torch."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field

from fmg.core.specs import MapSpec
from fmg.models.conventions import FlowMapConventions
from fmg.models.sources import HubSource, Part, locate, missing, parse_source
from fmg.registry.config import ModelConfig

BYTES = 2
"""Of a weight in bf16, the dtype that published weights are planned for."""

# From here on a model is refused on a machine without a GPU, unless the CPU is asked for by name.
_LARGE = 500_000_000


class PublishedConfig(ModelConfig):
    """Options of a model whose weights somebody published, and that has to be fetched."""

    work_space: ClassVar[float] = 1.4
    """GPU memory over that of the transformer's weights, at the default resolution in micro-batches."""

    gradient_checkpointing: bool = Field(
        default=True, description="Recompute each block in the backward pass instead of keeping its activations."
    )
    text_device: Literal["model", "cpu", "offload"] = Field(
        default="offload",
        description="Where the text encoders live: beside the model, on the CPU, or in host memory except while they "
        "encode.",
    )
    text_cache: bool = Field(
        default=True, description="Keep prompt embeddings on disk, so that a prompt is encoded once for all runs."
    )

    @abstractmethod
    def conventions(self) -> FlowMapConventions:
        """How the weights want to be sampled."""

    @abstractmethod
    def parts(self) -> tuple[Part, ...]:
        """The files that the model reads."""

    def card_facts(self) -> Mapping[str, str]:
        """The repository of the weights that are trained; their terms are in the card itself."""
        source = parse_source(self.parts()[0].source)
        if not isinstance(source, HubSource):
            return {}
        return {"base_model": source.repository, "license": "other", "license_name": "terms-of-the-base-model"}

    @abstractmethod
    def architecture(self) -> Part:
        """The part whose folder has the transformer's `config.json`."""

    @abstractmethod
    def parameters(self) -> int:
        """Parameters of the transformer, by its `config.json` in a local folder, else by the published one."""

    def folder_here(self) -> Path | None:
        """The folder of `architecture` where it is on this computer, fetched or local."""
        part = self.architecture()
        return None if missing(part) else locate(part, self.recipe or "")

    def spec(self) -> MapSpec:
        """Declared properties, known without reading a weight or having fetched anything."""
        assert self.recipe is not None
        parameters = self.parameters()
        memory = self.work_space * BYTES * parameters / 1e9 if parameters >= _LARGE else 0.0
        return replace(self.conventions().spec(self.recipe), gpu_memory_gb=memory)
