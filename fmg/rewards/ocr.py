"""Does the picture show the text that the prompt quotes? The whole picture is read by RapidOCR (PP-OCR networks)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from fmg.core.types import RewardOutput
from fmg.registry import rewards
from fmg.rewards.images import check_drawable, to_bytes
from fmg.rewards.ocr_text import missing_ocr, normalised, quoted_texts, similarity
from fmg.rewards.service_configs import OcrConfig

# Small pictures are read as well at the detector's smaller side, several times faster.
_SMALL_PICTURE, _SMALL_SIDE, _SIDE = 256, 192, 736


@rewards.register("ocr", OcrConfig)
class Ocr:
    """Edit-distance similarity of all text in the picture to the quoted text (Flow-GRPO, arXiv 2505.05470).

    Lines are joined in reading order. Parts: `exact` (the reading is the target and nothing else, spaces and case
    aside), `found` (the target is part of the reading).

    Departs from the published code: curly quotes count as quotes; a prompt that quotes nothing is an error; a failure
    of the reader is an error, where the original scores 0.

    Raises:
        MissingDependencyError: without the packages of `flow-map-grpo[ocr]`.
    """

    def __init__(self, config: OcrConfig) -> None:
        self._config = config
        if find_spec("rapidocr") is None or find_spec("onnxruntime") is None:
            raise missing_ocr("The reward 'ocr'")
        self._readers: dict[int, Callable[..., Any]] = {}

    def __call__(self, images: Float[Tensor, "b 3 h w"], prompts: Sequence[str]) -> RewardOutput:
        """Similarities in [0, 1].

        Raises:
            UsageError: for a prompt that quotes no text.
            RewardError: for images without pixels, or far longer than wide.
        """
        check_drawable(images)
        targets = quoted_texts(prompts)
        side = self._config.limit_side_len
        if side is None:
            side = _SMALL_SIDE if max(images.shape[2:]) <= _SMALL_PICTURE else _SIDE
        # the networks were trained on BGR
        pictures = np.ascontiguousarray(to_bytes(images)[..., ::-1])
        readings = [self._read(picture, side) for picture in pictures]
        pairs = list(zip(map(normalised, readings), map(normalised, targets), strict=True))
        return RewardOutput(
            torch.tensor([similarity(read, wanted) for read, wanted in pairs], dtype=torch.float32),
            {
                "exact": torch.tensor([float(read == wanted) for read, wanted in pairs]),
                "found": torch.tensor([float(wanted in read) for read, wanted in pairs]),
            },
        )

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Looks for the quoted text of every prompt.

        Raises:
            UsageError: naming the first prompt without one.
        """
        quoted_texts(prompts)

    def _read(self, picture: NDArray[np.uint8], side: int) -> str:
        # RapidOCR remembers the stages of its last call, so all three are named every time
        result = self._reader(side)(picture, use_det=True, use_cls=False, use_rec=True)
        return "".join(result.txts or ())

    def _reader(self, side: int) -> Callable[..., Any]:
        if side not in self._readers:
            from rapidocr import RapidOCR

            self._readers[side] = cast(
                "Callable[..., Any]",
                RapidOCR(
                    params={
                        "Global.log_level": "critical",
                        "Global.text_score": self._config.min_confidence,
                        "Det.limit_type": "min",
                        "Det.limit_side_len": side,
                        "EngineConfig.onnxruntime.intra_op_num_threads": self._config.threads,
                        "EngineConfig.onnxruntime.inter_op_num_threads": 1,
                    }
                ),
            )
        return self._readers[side]
