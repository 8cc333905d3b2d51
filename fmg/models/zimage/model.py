"""Z-Image as a model: a transformer of constant length, its reversed time, the sign of its output, its lists."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

import diffusers
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, ZImagePipeline

# diffusers looks for this base class in a component's module to decide how to load it
from diffusers.models.modeling_utils import ModelMixin  # noqa: F401
from diffusers.models.transformers import transformer_z_image
from torch import Tensor
from transformers import Qwen2Tokenizer, Qwen3ForCausalLM, Qwen3Model

from fmg.core.errors import CheckpointError
from fmg.core.hub import locate
from fmg.core.model_folder import read_config
from fmg.core.types import Conditioning
from fmg.models.common.model import AdaptedModel
from fmg.models.common.network import LatentNetwork
from fmg.models.common.pipeline_parts import Components, Family, check_same, load_components
from fmg.models.common.qwen import QwenText
from fmg.models.common.size import TOKEN

if TYPE_CHECKING:
    from fmg.models.zimage.configs import ZImageTurboConfig

MULTIPLE: int = transformer_z_image.SEQ_MULTI_OF
"""The class pads the tokens of a prompt to a multiple of this, and the transformer sees this padding."""


class ZImageTransformer2DModel(diffusers.ZImageTransformer2DModel):  # type: ignore[misc]
    """The stock class under its own name, with sequences of one length whatever the prompts of a batch are.

    The stock class pads the sequences of a batch to its longest prompt. In another batch, the same sample would pass
    through matrix products of another shape, and in bf16 its log-prob would not replay exactly. The added tokens are
    masked, so the result differs only by rounding.
    """

    text_tokens: int | None = None
    """Tokens of a prompt that sequences are padded to; None: as in the stock class."""

    def _prepare_sequence(self, feats: Any, pos_ids: Any, inner_pad_mask: Any, pad_token: Any, *rest: Any) -> Any:
        x, freqs, mask, lengths, noise = super()._prepare_sequence(feats, pos_ids, inner_pad_mask, pad_token, *rest)
        if pad_token is self.cap_pad_token and self.text_tokens is not None:
            x, freqs, mask = _padded(x, freqs, lengths, self.text_tokens)
        return x, freqs, mask, lengths, noise

    def _build_unified_sequence(self, x: Tensor, x_freqs: Any, x_seqlens: list[int], *rest: Any, **options: Any) -> Any:
        unified, freqs, mask, noise = super()._build_unified_sequence(x, x_freqs, x_seqlens, *rest, **options)
        if self.text_tokens is not None:
            cap_seqlens = rest[3]
            lengths = [image + text for image, text in zip(x_seqlens, cap_seqlens, strict=True)]
            unified, freqs, mask = _padded(unified, freqs, lengths, x_seqlens[0] + self.text_tokens)
        return unified, freqs, mask, noise


def _padded(x: Tensor, freqs: Tensor, lengths: list[int], length: int) -> tuple[Tensor, Tensor, Tensor]:
    more = (0, 0, 0, length - x.shape[1])
    places = torch.arange(length, device=x.device)
    mask = places < torch.tensor(lengths, device=x.device)[:, None]
    return F.pad(x, more), F.pad(freqs, more), mask


Z_IMAGE_FAMILY = Family(
    "Z-Image",
    MappingProxyType(
        {
            "transformer": {"ZImageTransformer2DModel": ZImageTransformer2DModel},
            "vae": {"AutoencoderKL": AutoencoderKL},
            "text_encoder": {"Qwen3Model": Qwen3Model, "Qwen3ForCausalLM": Qwen3ForCausalLM},
        }
    ),
    MappingProxyType({"tokenizer": Qwen2Tokenizer}),
)

# hidden_states[-2] of the chat with an open thinking block, as in ZImagePipeline
_text = partial(QwenText, layers=(-2,), thinking=True, masked=True)


class ZImageNetwork(LatentNetwork):
    """A `ZImageTransformer2DModel`, whose time is 0 at the noise and whose output points to the data."""

    def _call(self, x: Tensor, t: Tensor, s: Tensor | None, cond: Conditioning) -> Tensor:
        tokens, mask = cond.tensors["tokens"].to(self._dtype), cond.tensors["mask"].bool()
        output: list[Tensor] = self._transformer(
            x=list(x.to(self._dtype)[:, :, None]),
            t=1 - t,
            cap_feats=[row[seen] for row, seen in zip(tokens, mask, strict=True)],
            return_dict=False,
        )[0]
        return -torch.stack(list(output))[:, :, 0]


class ZImageModel(AdaptedModel[QwenText]):
    """A Z-Image model."""

    pipeline: ClassVar[Any] = ZImagePipeline
    network_class: ClassVar[type[LatentNetwork]] = ZImageNetwork
    text_folders: ClassVar[tuple[str, ...]] = Z_IMAGE_FAMILY.text_folders

    @classmethod
    def read(
        cls, config: ZImageTurboConfig, device: torch.device, dtype: torch.dtype, text_device: torch.device
    ) -> Components[QwenText]:
        folder, conventions = locate(config.architecture(), "model", config.registered_name).path, config.conventions()
        _check_config(folder)
        parts = load_components(Z_IMAGE_FAMILY, folder, conventions, None, _text, device, dtype, text_device)
        parts.transformer.text_tokens = -(-conventions.max_sequence_length // MULTIPLE) * MULTIPLE
        text, network = parts.text, parts.transformer.config
        text.check_layers(folder / "text_encoder")
        check_same("text_encoder", "hidden_size", text.width, "cap_feat_dim", network.cap_feat_dim)
        check_same("vae", "latent_channels", parts.vae.config.latent_channels, "in_channels", network.in_channels)
        return parts


def _check_config(folder: Path) -> None:
    config = read_config(folder / "transformer")
    for key, wanted in (("all_patch_size", [TOKEN]), ("all_f_patch_size", [1]), ("siglip_feat_dim", None)):
        if config.get(key, wanted) != wanted:
            raise CheckpointError(
                f"The transformer in {folder} has {key} {config[key]!r:.60}, unlike Z-Image-Turbo",
                "Give a folder of Z-Image-Turbo or of a model that was tuned from it.",
            )
