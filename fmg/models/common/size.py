"""Sizes of a pipeline folder of any family, from its JSON files and safetensors headers. Imports no torch."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Literal

from fmg.core.errors import CheckpointError, reason
from fmg.core.json_io import read_safetensors_header
from fmg.core.model_folder import RESTORE, absent_weights, stated_config, weight_files, whole, wholes
from fmg.core.specs import ActivationBytes, Blocks, LinearModule, ModelGeometry
from fmg.models.conventions import FlowMapConventions

FLUX_VAE: Mapping[str, object] = MappingProxyType(
    {"_class_name": "AutoencoderKL", "latent_channels": 16, "block_out_channels": [128, 256, 512, 512]}
)
FLUX_DECODER = 83_819_683
"""Parameters of FLUX's autoencoder."""
TOKEN = 2
"""Latent pixels along the side of a token, in families that patch 2 x 2."""

_MAX_RATIO = 100
_SINUSOID = 256
_FLOATS = ("F64", "F32", "F16", "BF16")
# Feature maps at full resolution that are alive at once while the last blocks of an autoencoder run, measured.
_KL_WIDE, _KL_NARROW, _TINY = 3, 5, 2


@dataclass(frozen=True)
class TransformerSize(ABC):
    """The sizes of a transformer of diffusers, from its config, and of what a pipeline has beside it.

    Args:
        config: as in `transformer/config.json` of a diffusers folder; missing keys have `defaults`.
    """

    defaults: ClassVar[Mapping[str, object]]
    origin: ClassVar[str] = "the published config"
    """Where sizes come from before a folder is fetched."""
    stream: ClassVar[Literal["image", "both"]] = "both"
    vae: ClassVar[Mapping[str, object]] = FLUX_VAE
    """Config of the autoencoder before a folder is fetched."""
    decoder_parameters: ClassVar[int] = FLUX_DECODER
    encoders: ClassVar[tuple[str, ...]] = ("text_encoder",)
    more_text: ClassVar[int] = 0
    """Text tokens beside the `max_sequence_length` of the conventions."""
    second_embedder: ClassVar[str] = ""

    config: Mapping[str, object]

    @classmethod
    def geometry(
        cls, folder: Path | None, published: Mapping[str, object], conventions: FlowMapConventions
    ) -> ModelGeometry:
        """The geometry of a pipeline folder; missing values are the published ones.

        Args:
            folder: a diffusers pipeline folder, or None when it has not been fetched.
            published: the transformer's config if the folder has none.
            conventions: resolution and text length.
        """
        stated = None if folder is None else stated_config(folder / "transformer")
        return cls(stated or published).within(folder, conventions, cls.origin if stated is None else "its files")

    def within(self, folder: Path | None, conventions: FlowMapConventions, origin: str) -> ModelGeometry:
        """The geometry of a folder with this transformer. Arguments as for `geometry` and `ModelGeometry`."""
        vae = (None if folder is None else stated_config(folder / "vae")) or self.vae
        side = conventions.resolution // latent_scale(vae)
        image, text = (side // self.patch) ** 2, self.more_text + conventions.max_sequence_length
        return ModelGeometry(
            origin=origin,
            linears=tuple(self.linears()),
            parameters=self.parameters,
            width=self.width,
            stream=self.stream,
            blocks=tuple(kind for kind in self.blocks if kind.count),
            other_flops=self.other_flops(image, text),
            image_tokens=image,
            text_tokens=text,
            conditioning=self.conditioning(text),
            latent=whole(vae, "latent_channels") * side**2,
            resolution=conventions.resolution,
            encoder_parameters=stored_parameters(folder, *self.encoders) or self.encoder_parameters,
            decoder_parameters=stored_parameters(folder, "vae") or self.decoder_parameters,
            decoder=self.decoder(vae),
            tables=self.tables,
            second_embedder=self.second_embedder,
        )

    @property
    @abstractmethod
    def parameters(self) -> int:
        """Number of parameters of the transformer."""

    @property
    @abstractmethod
    def blocks(self) -> tuple[Blocks, ...]:
        """The kinds of its blocks, in the order in which they run."""

    @property
    @abstractmethod
    def encoder_parameters(self) -> int:
        """Parameters of all published text encoders together."""

    @abstractmethod
    def linears(self) -> Iterator[LinearModule]:
        """Every linear layer, by its name in the state dict."""

    @abstractmethod
    def other_flops(self, image: int, text: int) -> float:
        """Operations of one call outside linear layers (attention, convolutions), for these numbers of tokens."""

    def conditioning(self, text: int) -> int:
        """Numbers that condition one sample."""
        return text * self.number("joint_attention_dim")

    def decoder(self, vae: Mapping[str, object]) -> ActivationBytes:
        """Peak memory of decoding per pixel of the image."""
        return ActivationBytes(_decoder_values(vae))

    @property
    def width(self) -> int:
        """Width of the token streams."""
        return self.number("num_attention_heads") * self.number("attention_head_dim")

    @property
    def hidden(self) -> int:
        """Width of each half of a block's gated feed-forward."""
        ratio = self.known["mlp_ratio"]
        if not isinstance(ratio, int | float) or not 0 < ratio <= _MAX_RATIO:
            raise CheckpointError(f"The config of the model has {ratio!r:.60} for mlp_ratio", RESTORE)
        return int(ratio * self.width)

    @property
    def patch(self) -> int:
        """Latent pixels along the side of a token."""
        return TOKEN

    @property
    def tables(self) -> int:
        """Numbers that are stored with the transformer but are not parameters."""
        return 0

    @property
    def known(self) -> Mapping[str, object]:
        """The config with its defaults."""
        return {**self.defaults, **self.config}

    def number(self, key: str, least: int = 1) -> int:
        """A whole number from the config."""
        return whole(self.known, key, least)


def latent_scale(vae: Mapping[str, object]) -> int:
    """Image pixels along the side of one latent pixel."""
    return int(2 ** (len(_channels(vae)) - 1))


def _decoder_values(vae: Mapping[str, object]) -> int:
    """Peak number of values that an `AutoencoderKL` or `AutoencoderTiny` keeps per pixel of the image."""
    channels = _channels(vae)
    if vae.get("_class_name") == "AutoencoderTiny":
        return _TINY * channels[0]
    return max(_KL_WIDE * channels[min(1, len(channels) - 1)], _KL_NARROW * channels[0])


def _channels(vae: Mapping[str, object]) -> list[int]:
    stated = wholes(vae, "block_out_channels") or wholes(vae, "decoder_block_out_channels")
    return stated or [128, 256, 512, 512]


def stored_parameters(folder: Path | None, *components: str) -> int:
    """Parameters in the safetensors files of some components, from their headers; 0 if one has no file.

    Raises:
        CheckpointError: a file is damaged.
    """
    if folder is None or any(absent_weights(folder / name) for name in components):
        return 0
    return sum(_parameters(file) for file in {file for name in components for file in weight_files(folder / name)})


def stored_names(folder: Path) -> Collection[str]:
    """Names of the tensors of a component folder, from the headers of its files.

    Raises:
        CheckpointError: there is no such file, or one is damaged.
    """
    try:
        return {name for file in weight_files(folder) for name in read_safetensors_header(file)[0]}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"The weights in {folder} cannot be read: {reason(error)}", RESTORE) from None


def _parameters(file: Path) -> int:
    """Number of values in the tensors listed in a safetensors header."""
    try:
        header, _ = read_safetensors_header(file)
        entries: list[Any] = [entry for name, entry in header.items() if name != "__metadata__"]
        return sum(math.prod(map(int, entry["shape"])) for entry in entries if entry["dtype"] in _FLOATS)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file} is not a safetensors file: {reason(error)}", RESTORE) from None


def conditioning_linears(config: Mapping[str, object], width: int, *embedders: str) -> Iterator[LinearModule]:
    """The linear layers before the blocks of FLUX and SD3: text projection, and embedders of times and guidance."""
    yield LinearModule("context_embedder", whole(config, "joint_attention_dim"), width, "text", "tokens")
    pooled = "time_text_embed.text_embedder"
    inputs = {**dict.fromkeys(embedders, _SINUSOID), pooled: whole(config, "pooled_projection_dim")}
    for name, features in inputs.items():
        yield LinearModule(f"{name}.linear_1", features, width, "row", name)
        yield LinearModule(f"{name}.linear_2", width, width, "row", f"{name} hidden")


def joint_block(block: str, width: int, *, dual: bool = False, last: bool = False) -> Iterator[LinearModule]:
    """The linear layers of a block with a stream of image tokens and one of text tokens, which attend together.

    Args:
        block: its name in the state dict.
        width: width of both streams.
        dual: whether the image tokens also attend among themselves, as in blocks of SD3.5-Medium.
        last: whether the text stream ends here, as in the last block of SD3.
    """
    streams: tuple[tuple[Literal["image", "text"], str, tuple[str, ...], str, str, int], ...] = (
        ("image", "norm1", ("to_q", "to_k", "to_v"), "to_out.0", "ff", 9 if dual else 6),
        (
            "text",
            "norm1_context",
            ("add_q_proj", "add_k_proj", "add_v_proj"),
            "to_add_out",
            "ff_context",
            2 if last else 6,
        ),
    )
    for tokens, norm, projections, out, feed_forward, modulated in streams:
        yield LinearModule(f"{block}.{norm}.linear", width, modulated * width, "row", "time")
        for name in projections:
            yield LinearModule(f"{block}.attn.{name}", width, width, tokens, f"{block} {tokens} norm1")
        if last and tokens == "text":
            return
        yield LinearModule(f"{block}.attn.{out}", width, width, tokens, f"{block} {tokens} attention")
        if dual and tokens == "image":
            for name in projections:
                yield LinearModule(f"{block}.attn2.{name}", width, width, tokens, f"{block} dual norm1")
            yield LinearModule(f"{block}.attn2.{out}", width, width, tokens, f"{block} dual attention")
        first, second = f"{block}.{feed_forward}.net.0.proj", f"{block}.{feed_forward}.net.2"
        yield LinearModule(first, width, 4 * width, tokens, f"{block} {tokens} norm2")
        yield LinearModule(second, 4 * width, width, tokens, f"{block} {tokens} hidden")
