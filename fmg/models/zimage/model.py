"""Z-Image as a model: its reversed time, the sign of its output, and its lists of samples."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from diffusers import ZImagePipeline
from torch import Tensor

from fmg.core.hub import locate
from fmg.core.types import Conditioning
from fmg.models.common.model import AdaptedModel
from fmg.models.common.network import LatentNetwork
from fmg.models.common.qwen import QwenText
from fmg.models.zimage.loading import Z_IMAGE_FAMILY, ZImageComponents, load_parts

if TYPE_CHECKING:
    from fmg.models.zimage.configs import ZImageTurboConfig


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
    """A Z-Image model.

    Args:
        components: a loaded folder.
        name: registered name of the model, written into saved adapters.
        text: encoder of prompts; None takes the folder's own, beside the transformer.
    """

    pipeline: ClassVar[Any] = ZImagePipeline
    network_class: ClassVar[type[LatentNetwork]] = ZImageNetwork
    text_folders: ClassVar[tuple[str, ...]] = Z_IMAGE_FAMILY.text_folders

    @classmethod
    def read(
        cls, config: ZImageTurboConfig, device: torch.device, dtype: torch.dtype, text_device: torch.device
    ) -> ZImageComponents:
        """The parts that `config` describes, from files on this computer."""
        folder = locate(config.architecture(), "model", config.registered_name).path
        return load_parts(folder, config.conventions(), device, dtype, text_device)

    @staticmethod
    def text_facts(components: ZImageComponents) -> tuple[str, ...]:
        """Which states of Qwen are taken."""
        return components.text.facts
