"""GenEval as a reward: a Mask2Former finds the objects, CLIP names their colours, `geneval_rules` judges."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation
from transformers.models.mask2former.image_processing_pil_mask2former import Mask2FormerImageProcessorPil

from fmg.core.errors import CheckpointError, UsageError
from fmg.core.hub import Located
from fmg.core.types import RewardOutput
from fmg.rewards.clip import ClipEncoder, load_clip
from fmg.rewards.configs import GenEvalConfig
from fmg.rewards.geneval_rules import (
    COLORS,
    OBJECT_NAMES,
    ColorsOf,
    Detections,
    Specification,
    Thresholds,
    judge,
    parse_prompt,
    read_metadata,
)
from fmg.rewards.images import MAX_ASPECT, resize_and_crop, to_bytes
from fmg.rewards.network import Files, NetworkReward, Score, load_folder, load_pretrained

_BACKGROUND = 0x99 / 0xFF
# Tensors that are not used: indices that newer versions compute, and a weight of the training loss.
_NOT_USED = ("relative_position_index", "criterion.empty_weight")
_TEMPLATES = ("a photo of a {color} {name}", "a photo of a {color}-colored {name}", "a photo of a {color} object")


class Mask2FormerDetector:
    """Instances of the 80 COCO classes (Cheng et al., arXiv 2112.01527, section 3.3 and instance inference).

    A query and a class score `p(class) * mean p(mask)` over the pixels where the mask's probability is above 1/2; the
    box is that of these pixels. The 100 best pairs count, as in the authors' code and mmdet. Images are resized and
    normalised as the checkpoint's `preprocessor_config.json` says.

    GenEval used mmdet's weights of the same architecture; those published for transformers are the authors' own, so
    verdicts agree in kind, not image by image.

    Args:
        model: a `Mask2FormerForUniversalSegmentation` without gradients.
        processor: its image processor, the one that uses Pillow.
        least_score: pairs that do not score above this are left out.
    """

    _MOST = 100

    def __init__(self, model: Any, processor: Any, least_score: float) -> None:
        self._model = model
        self._processor = processor
        self._least_score = least_score

    def __call__(self, images: Float[Tensor, "b 3 h w"]) -> list[Detections]:
        inputs = self._processor(images=list(to_bytes(images)), return_tensors="pt").pixel_values
        outputs = self._model(pixel_values=inputs.to(self._model.device, self._model.dtype))
        size = (int(images.shape[2]), int(images.shape[3]))
        logits = zip(outputs.class_queries_logits.float(), outputs.masks_queries_logits.float(), strict=True)
        return [self._instances(classes, masks, size) for classes, masks in logits]

    def _instances(
        self, class_logits: Float[Tensor, "q c"], mask_logits: Float[Tensor, "q h w"], size: tuple[int, int]
    ) -> Detections:
        # the last class is "no object"
        probabilities = class_logits.softmax(-1)[:, :-1]
        scores, order = probabilities.flatten().sort(descending=True)
        # a mask can only lower the score
        count = min(self._MOST, int((scores > self._least_score).sum()))
        queries, labels = order[:count] // probabilities.shape[1], order[:count] % probabilities.shape[1]
        rows = []
        for score, query, label in zip(scores.tolist(), queries.tolist(), labels.tolist(), strict=False):
            mask = F.interpolate(mask_logits[None, query][None], size, mode="bilinear", align_corners=False)[0, 0]
            inside = mask > 0
            if bool(inside.any()):
                rows.append((score * float(mask.sigmoid()[inside].mean()), label, inside.cpu().numpy()))
        return Detections(
            boxes=np.array([_box(mask) for _, _, mask in rows], dtype=np.float32).reshape(-1, 4),
            labels=np.array([label for _, label, _ in rows], dtype=np.int64),
            scores=np.array([score for score, _, _ in rows], dtype=np.float32),
            masks=np.array([mask for _, _, mask in rows], dtype=bool).reshape(-1, *size),
        )


class ColorNamer:
    """Zero-shot colours of objects (GenEval): the object on grey #999, cropped to its box, against ten colour words.

    Each colour is the mean of three unit-length text embeddings, itself scaled to unit length.

    Args:
        encoder: a CLIP encoder that takes squares of `side` pixels unchanged.
        side: what the vision tower reads.
    """

    def __init__(self, encoder: ClipEncoder, side: int) -> None:
        self._encoder = encoder
        self._side = side
        self._classifiers: dict[str, Float[Tensor, "colors d"]] = {}

    def __call__(self, image: Float[Tensor, "3 h w"], found: Detections, name: str, rows: Sequence[int]) -> list[str]:
        squares = torch.cat([self._square(image, found.boxes[row], found.masks[row]) for row in rows])
        similarity = self._encoder(squares) @ self._classifier(name).T
        return [COLORS[index] for index in similarity.argmax(1).tolist()]

    def _square(
        self, image: Float[Tensor, "3 h w"], box: NDArray[np.float32], mask: NDArray[np.bool_]
    ) -> Float[Tensor, "1 3 side side"]:
        shown = torch.where(torch.from_numpy(mask).to(image.device), image, _BACKGROUND)
        left, top, right, bottom = (round(float(edge)) for edge in box)
        return resize_and_crop(_without_ends(shown[None, :, top:bottom, left:right]), self._side)

    def _classifier(self, name: str) -> Float[Tensor, "colors d"]:
        if name not in self._classifiers:
            texts = [template.format(color=color, name=name) for color in COLORS for template in _TEMPLATES]
            embeddings = self._encoder.texts(texts).view(len(COLORS), len(_TEMPLATES), -1)
            self._classifiers[name] = F.normalize(embeddings.mean(1), dim=-1)
        return self._classifiers[name]


class GenEval(NetworkReward):
    """The verdict named by `score`; parts `correct`, `strict` and `dense` (`fmg.rewards.geneval_rules.Verdict`).

    GenEval reports the mean of `correct` for each of the six tags, and the mean of those.

    Raises:
        UsageError: when `metadata` cannot be read.
    """

    def __init__(self, config: GenEvalConfig) -> None:
        metadata = None if config.metadata is None else read_metadata(Path(config.metadata))
        self._specification = partial(_specification, metadata)
        super().__init__("geneval", config, partial(_load, config, self._specification))

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Raises a `UsageError` for the first prompt that the metadata lack or, without metadata, no template fits."""
        for prompt in prompts:
            self._specification(prompt)


def _specification(metadata: Mapping[str, Specification] | None, prompt: str) -> Specification:
    if metadata is None:
        return parse_prompt(prompt)
    if prompt not in metadata:
        raise UsageError(f"'{prompt}' is not in the GenEval metadata", "Add it, or leave out the option 'metadata'.")
    return metadata[prompt]


def _load(
    config: GenEvalConfig,
    specification: Callable[[str], Specification],
    files: Files,
    device: torch.device,
    dtype: torch.dtype,
) -> Score:
    thresholds = Thresholds(config.threshold, config.counting_threshold, config.position_threshold, config.max_objects)
    least_score = min(config.threshold, config.counting_threshold)
    detector = load_detector(files["detector"], device, dtype, least_score)
    clip, tokenizer = load_clip(files["model"], files["tokenizer"], device, dtype)
    namer = ColorNamer(ClipEncoder(clip, tokenizer, lambda squares, _: squares), clip.config.vision_config.image_size)

    def score(images: Float[Tensor, "b 3 h w"], prompts: Sequence[str]) -> RewardOutput:
        wanted = [specification(prompt) for prompt in prompts]
        verdicts = []
        for image, found, asked in zip(images, detector(images), wanted, strict=True):
            colors_of: ColorsOf = partial(namer, image, found)
            verdicts.append(judge(found, OBJECT_NAMES, asked, colors_of, thresholds))
        kinds = ("correct", "strict", "dense")
        parts = {kind: torch.tensor([float(getattr(verdict, kind)) for verdict in verdicts]) for kind in kinds}
        return RewardOutput(parts[config.score], parts)

    return score


def load_detector(files: Located, device: torch.device, dtype: torch.dtype, least_score: float) -> Mask2FormerDetector:
    """The detector in a folder of transformers.

    Raises:
        CheckpointError: weights that do not fit, or a number of classes other than 80.
    """
    config = load_pretrained(Mask2FormerConfig.from_pretrained, files.folder, "config")
    if config.num_labels != len(OBJECT_NAMES):
        raise CheckpointError(
            f"The detector in {files.folder} has {config.num_labels} classes, not the {len(OBJECT_NAMES)} of COCO",
            "Set detector to a Mask2Former trained on COCO instances.",
        )
    model = load_folder(
        Mask2FormerForUniversalSegmentation, files.folder, "detector", config, dtype, not_used=_NOT_USED
    ).to(device)
    processor = load_pretrained(Mask2FormerImageProcessorPil.from_pretrained, files.folder, "image processor")
    return Mask2FormerDetector(model, processor, least_score)


def _box(mask: NDArray[np.bool_]) -> tuple[int, int, int, int]:
    """The smallest box around the pixels: first column and row, and one past the last."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _without_ends(crop: Float[Tensor, "1 3 h w"]) -> Float[Tensor, "1 3 h2 w2"]:
    """The middle of a very long crop: its ends would be cut off by the centre square anyway."""
    height, width = crop.shape[2:]
    tall, wide = min(height, MAX_ASPECT * width), min(width, MAX_ASPECT * height)
    top, left = (height - tall) // 2, (width - wide) // 2
    return crop[:, :, top : top + tall, left : left + wide]
