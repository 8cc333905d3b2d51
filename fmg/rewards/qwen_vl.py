"""Vision-language models of the Qwen families as rewards use them: one image, one text, and what the model answers.

Patches and chats are built here, because the processor of a checkpoint needs torchvision and its chat template is a
program that comes with the weights. Both agree with the published ones (tests/parity/test_rewards_qwen_vl.py).
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any, TypeGuard

import torch
import transformers
from jaxtyping import Float, Int
from torch import Tensor
from transformers import AutoTokenizer, GenerationConfig

from fmg.core.errors import CheckpointError, UsageError
from fmg.core.hub import Located
from fmg.core.model_folder import CONFIG, read_config
from fmg.rewards.images import CLIP_MEAN, CLIP_STD, check_drawable, normalize, pillow_bicubic
from fmg.rewards.network import load_folder, load_pretrained, read_json

IMAGE_TOKEN = "<|image_pad|>"
ASSISTANT = "You are a helpful assistant."
"""The system message that the templates of Qwen2-VL and Qwen2.5-VL add to a chat without one."""

_CLASSES: dict[str, tuple[str, str | None]] = {
    "qwen2_vl": ("Qwen2VLForConditionalGeneration", ASSISTANT),
    "qwen2_5_vl": ("Qwen2_5_VLForConditionalGeneration", ASSISTANT),
    "qwen3_vl": ("Qwen3VLForConditionalGeneration", None),
}
"""Class and system message of each `model_type`."""
_ENDS = ("<|im_end|>", "<|endoftext|>")
MARKER = re.compile(r"<\|\w+\|>")
"""What the models read as part of the chat."""
_PREPROCESSORS = ("preprocessor_config.json", "processor_config.json")
"""Where the image processor is described; transformers 5 writes the second, with all parts of the processor."""


def check_no_markers(prompts: Sequence[str], reader: str) -> None:
    """Refuses prompts that would be read as part of the chat.

    Raises:
        UsageError: for the first prompt that contains one of the model's markers.
    """
    for prompt in prompts:
        if marker := MARKER.search(prompt):
            raise UsageError(
                f"The prompt '{prompt[:80]}' contains {marker[0]}, which {reader} reads as a special token",
                "Remove it.",
            )


def opening(slots: int, system: str | None) -> str:
    """A chat up to and including an image, which occupies `slots` tokens."""
    before = "" if system is None else f"<|im_start|>system\n{system}<|im_end|>\n"
    return f"{before}<|im_start|>user\n<|vision_start|>{IMAGE_TOKEN * slots}<|vision_end|>"


def closing(text: str) -> str:
    """The rest of a chat: the text about the image, and the start of the answer."""
    return f"{text}<|im_end|>\n<|im_start|>assistant\n"


def scaled_size(height: int, width: int, unit: int, least: int, most: int) -> tuple[int, int]:
    """Height and width in whole `unit`s, near the aspect ratio, with `least` to `most` pixels as the authors round."""
    rows, columns = (max(unit, round(n / unit) * unit) for n in (height, width))
    if rows * columns > most:
        shrink = math.sqrt((height * width) / most)
        rows, columns = (max(unit, math.floor(n / shrink / unit) * unit) for n in (height, width))
    elif rows * columns < least:
        grow = math.sqrt(least / (height * width))
        rows, columns = (math.ceil(n * grow / unit) * unit for n in (height, width))
    return rows, columns


@dataclass(frozen=True)
class Patches:
    """How images become patches.

    Attributes:
        side: side of a patch in pixels.
        merge: patches merged into one token, along each side.
        frames: video frames in one patch; a still image is repeated.
        least: minimum pixels of an image after resizing; `most` is the maximum.
        mean: mean of each channel, subtracted before the division by `std`.
    """

    side: int
    merge: int
    frames: int
    least: int
    most: int
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD

    def of(self, images: Float[Tensor, "b 3 h w"]) -> tuple[Float[Tensor, "n d"], Int[Tensor, " 3"]]:
        """Normalised patches of a batch in the models' order, and (frames, rows, columns) of one image.

        Images are rounded to 8 bits and resized by Pillow's bicubic filter. Patches that will be merged are neighbours.
        """
        check_drawable(images)
        height, width = scaled_size(images.shape[-2], images.shape[-1], self.side * self.merge, self.least, self.most)
        pixels = normalize(pillow_bicubic(images, (height, width)), self.mean, self.std)
        rows, columns, merge, side = height // self.side, width // self.side, self.merge, self.side
        blocks = pixels.reshape(len(images), 3, rows // merge, merge, side, columns // merge, merge, side)
        ordered = blocks.permute(0, 2, 5, 3, 6, 1, 4, 7)
        repeated = ordered.unsqueeze(6).expand(*ordered.shape[:6], self.frames, side, side)
        return repeated.reshape(-1, 3 * self.frames * side * side), torch.tensor([1, rows, columns])

    def slots(self, grid: Int[Tensor, " 3"]) -> int:
        """Number of tokens of an image with this grid."""
        return int(grid.prod()) // self.merge**2


@dataclass(frozen=True)
class Answer:
    """The answer of a model, and whether it ended within the limit."""

    text: str
    ended: bool


class QwenVL:
    """One of the models with its tokenizer, without gradients.

    Args:
        model: a `...ForConditionalGeneration` of `_CLASSES`.
        tokenizer: tokenizer with the chat markers.
        patches: how images are prepared.
        system: the system message, if its chats start with one.
    """

    def __init__(self, model: Any, tokenizer: Any, patches: Patches, system: str | None) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._patches = patches
        self._system = system
        self._ends = [tokenizer.convert_tokens_to_ids(end) for end in _ENDS]
        # the published settings sample and penalise repetitions, and `generate` mixes them with those of a call
        model.generation_config = _settings()
        # `generate` keeps positions in the model
        self._lock = Lock()

    def answers(self, images: Float[Tensor, "b 3 h w"], texts: Sequence[str], limit: int) -> list[Answer]:
        """The likeliest answer (greedy decoding) about each image, at most `limit` tokens long."""
        pixels, grid = self._image(images)
        begin = opening(self._patches.slots(grid), self._system)
        tokens = self._tokens([begin + closing(text) for text in texts], padding_side="left")
        settings = _settings(
            max_new_tokens=limit, do_sample=False, eos_token_id=self._ends, pad_token_id=self._ends[-1]
        )
        with self._lock:
            written: Tensor = self._model.generate(
                input_ids=tokens.input_ids,
                attention_mask=tokens.attention_mask,
                mm_token_type_ids=self._is_image(tokens.input_ids),
                pixel_values=pixels,
                image_grid_thw=grid.expand(len(texts), 3),
                generation_config=settings,
            )[:, tokens.input_ids.shape[1] :]
        ended = torch.isin(written, written.new_tensor(self._ends)).any(1).tolist()
        decoded = self._tokenizer.batch_decode(written, skip_special_tokens=True)
        return [Answer(text, end) for text, end in zip(decoded, ended, strict=True)]

    def next_token(self, image: Float[Tensor, "3 h w"], texts: Sequence[str], rows: int) -> Float[Tensor, "t v"]:
        """Log-probabilities of the first token of the answer to each text about one image, fp32.

        The image is read once; its cached keys and values are copied for `rows` texts at a time.
        """
        pixels, grid = self._image(image[None])
        before = self._tokens([opening(self._patches.slots(grid), self._system)]).input_ids
        kind, grids = self._is_image(before), grid[None]
        network = self._model.model
        positions, offset = network.get_rope_index(before, mm_token_type_ids=kind, image_grid_thw=grids)
        image_cache = network(
            input_ids=before,
            position_ids=positions,
            mm_token_type_ids=kind,
            pixel_values=pixels,
            image_grid_thw=grids,
            use_cache=True,
        ).past_key_values
        start = before.shape[1] + int(offset)
        found = []
        for first in range(0, len(texts), rows):
            cache = copy.deepcopy(image_cache)
            some = self._tokens([closing(text) for text in texts[first : first + rows]], padding_side="right")
            count, length = some.input_ids.shape
            cache.batch_repeat_interleave(count)
            # attention looks back only, so nothing depends on the padding at the end
            states = network(
                input_ids=some.input_ids,
                position_ids=torch.arange(start, start + length, device=pixels.device).expand(3, count, length),
                past_key_values=cache,
            ).last_hidden_state
            last = some.attention_mask.sum(1) - 1
            logits = self._model.lm_head(states[torch.arange(count, device=last.device), last])
            found.append(logits.float().log_softmax(-1))
        return torch.cat(found)

    def first_token(self, text: str) -> int:
        """Id of the first token of a text."""
        return int(self._tokenizer(text).input_ids[0])

    def _image(self, images: Float[Tensor, "b 3 h w"]) -> tuple[Float[Tensor, "n d"], Int[Tensor, " 3"]]:
        pixels, grid = self._patches.of(images)
        return pixels.to(self._model.device, self._model.dtype), grid.to(self._model.device)

    def _tokens(self, texts: Sequence[str], padding_side: str = "right") -> Any:
        tokens = self._tokenizer(list(texts), padding=True, padding_side=padding_side, return_tensors="pt")
        return tokens.to(self._model.device)

    def _is_image(self, tokens: Int[Tensor, "b n"]) -> Int[Tensor, "b n"]:
        found: Tensor = tokens == self._model.config.image_token_id
        return found.int()


def _settings(**values: object) -> Any:
    """Settings of `generate`; transformers leaves the class without types."""
    cls: Any = GenerationConfig
    return cls(**values)


def load_qwen_vl(files: Located, device: torch.device, dtype: torch.dtype) -> QwenVL:
    """The model in a folder of transformers, with its tokenizer and the settings of its image processor.

    Raises:
        CheckpointError: it cannot be loaded, or belongs to none of the families in `_CLASSES`.
    """
    folder, what = files.folder, files.asset.what
    kind = read_config(folder).get("model_type")
    if not isinstance(kind, str) or kind not in _CLASSES:
        raise CheckpointError(
            f"The {what} in {folder} have the model_type {kind!r:.60} in {CONFIG}",
            f"Use one of {', '.join(_CLASSES)}.",
        )
    name, system = _CLASSES[kind]
    cls = getattr(transformers, name)
    config = load_pretrained(cls.config_class.from_pretrained, folder, what)
    model = load_folder(cls, folder, what, config, dtype).to(device)
    tokenizer = load_pretrained(AutoTokenizer.from_pretrained, folder, "tokenizer")
    lacking = [marker for marker in (IMAGE_TOKEN, *_ENDS) if marker not in tokenizer.get_vocab()]
    if lacking:
        raise CheckpointError(f"The tokenizer in {folder} lacks {lacking[0]}", "Use the tokenizer of the model.")
    return QwenVL(model, tokenizer, read_patches(folder, config.vision_config), system)


def read_patches(folder: Path, vision: Any) -> Patches:
    """The settings of a model's images: sides from its config, sizes and normalisation from its image processor.

    Raises:
        CheckpointError: they are missing or out of range.
    """
    file = next((folder / name for name in _PREPROCESSORS if (folder / name).exists()), folder / _PREPROCESSORS[0])
    stated = read_json(file)
    stated = _object(stated.get("image_processor")) or stated
    size = _object(stated.get("size"))
    # the older form goes first, as in transformers
    least = stated.get("min_pixels") or size.get("shortest_edge")
    most = stated.get("max_pixels") or size.get("longest_edge")
    mean, std = stated.get("image_mean"), stated.get("image_std")
    if not (type(least) is int and type(most) is int and 0 < least <= most and _is_color(mean) and _is_color(std)):
        raise CheckpointError(
            f"{file} lacks image_mean, image_std or the minimum and maximum number of pixels",
            f"Use the {_PREPROCESSORS[0]} of the model.",
        )
    return Patches(
        vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size, least, most, tuple(mean), tuple(std)
    )


def _object(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _is_color(value: object) -> TypeGuard[list[float]]:
    return isinstance(value, list) and len(value) == 3 and all(isinstance(x, float | int) for x in value)
