"""Log-probability that a text recogniser reads the quoted text: dense where edit distance is flat.

The recogniser is the PP-OCR network that the rapidocr wheel carries; only onnxruntime is imported.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from fmg.core.errors import CheckpointError, UsageError
from fmg.core.files import from_home
from fmg.core.types import RewardOutput
from fmg.registry import rewards
from fmg.rewards.images import check_drawable, to_bytes
from fmg.rewards.ocr_text import missing_ocr, quoted_texts
from fmg.rewards.service_configs import OcrLogpConfig

_SHIPPED = Path("models") / "PP-OCRv6_rec_small.onnx"
_HEIGHT = 48
_NAME = "The reward 'ocr-logp'"
BLANK = 0
# Probabilities come in fp32; below its smallest normal number they are 0.
_TINY = float(np.finfo(np.float32).tiny)


def ctc_log_prob(probabilities: Float[NDArray[np.float32], "t c"], labels: Int[NDArray[np.int64], " n"]) -> float:
    """`log p(labels | frames)` summed over all alignments (Graves et al., ICML 2006, eq. 3 and 6–8).

    Args:
        probabilities: of every class in every frame; class 0 is the blank.
        labels: classes of the text, none of them blank, at least one.

    Returns:
        The log-probability; `-inf` when there are fewer frames than labels, counting a blank between equal neighbours.
    """
    extended = np.zeros(2 * len(labels) + 1, dtype=np.int64)
    extended[1::2] = labels
    # a blank may be skipped between two labels that differ
    skippable = np.zeros(len(extended), dtype=bool)
    skippable[3::2] = labels[1:] != labels[:-1]
    frames = np.log(np.clip(probabilities[:, extended].astype(np.float64), _TINY, None))
    alpha = np.full(len(extended), -np.inf)
    alpha[:2] = frames[0, :2]
    for frame in frames[1:]:
        stepped = np.concatenate([[-np.inf], alpha[:-1]])
        skipped = np.where(skippable, np.concatenate([[-np.inf, -np.inf], alpha[:-2]]), -np.inf)
        alpha = np.logaddexp(np.logaddexp(alpha, stepped), skipped) + frame
    return float(np.logaddexp(alpha[-1], alpha[-2]))


def greedy_labels(probabilities: Float[NDArray[np.float32], "t c"]) -> list[int]:
    """The best class of each frame, repeats merged and blanks removed."""
    best = probabilities.argmax(1)
    merged = best[np.concatenate([[True], best[1:] != best[:-1]])]
    return [int(label) for label in merged if label != BLANK]


class Recogniser:
    """A PP-OCR text-line recogniser in ONNX, with its alphabet in the metadata key `character`.

    Raises:
        CheckpointError: when the file is missing or is not such a network.
    """

    def __init__(self, path: Path, threads: int) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.log_severity_level = 3
        try:
            self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
            alphabet = self._session.get_modelmeta().custom_metadata_map["character"].split("\n")
        except Exception:
            raise CheckpointError(
                f"'{path}' is not a text recogniser in ONNX with its alphabet inside",
                "Name a PP-OCR recognition model, or leave out the option 'model'.",
            ) from None
        self._input = self._session.get_inputs()[0].name
        self._label_of = {character: label for label, character in enumerate([*alphabet, " "], start=1)}

    def labels(self, text: str) -> NDArray[np.int64]:
        """Classes of the characters of `text`.

        Raises:
            UsageError: for a character that the network does not know.
        """
        unknown = next((character for character in text if character not in self._label_of), None)
        if unknown is not None:
            raise UsageError(
                f"The recogniser does not know the character '{unknown}' of '{text}'", "Leave it out of the prompts."
            )
        return np.array([self._label_of[character] for character in text], dtype=np.int64)

    def probabilities(self, images: Float[Tensor, "b 3 h w"]) -> Float[NDArray[np.float32], "b t c"]:
        """Probability of each class, one frame for every 8 pixels of width once the height is 48."""
        check_drawable(images)
        # the network was trained on BGR
        pixels = torch.from_numpy(to_bytes(images)).flip(3).permute(0, 3, 1, 2).float() / 127.5 - 1
        height, width = images.shape[2:]
        size = (_HEIGHT, max(1, -(-_HEIGHT * width // height)))
        scaled = torch.nn.functional.interpolate(pixels, size, mode="bilinear", align_corners=False)
        (probabilities,) = self._session.run(None, {self._input: scaled.numpy()})
        return np.asarray(probabilities, dtype=np.float32)


@rewards.register("ocr-logp", OcrLogpConfig)
class OcrLogp:
    """`max(log p(text | picture) / length, floor)`, in nats per character, at most 0.

    For pictures that hold one line of text and little else; case and inner spaces count. Parts: `exact` (the greedy
    reading is the text), `probability` (`exp(log p / length)`, in [0, 1]).

    It saturates at faint text: pair it with a reward for fidelity, or with a KL term.

    Raises:
        MissingDependencyError: without the packages of `flow-map-grpo[ocr]`.
        CheckpointError: when `model` is not a recogniser.
    """

    def __init__(self, config: OcrLogpConfig) -> None:
        self._config = config
        if find_spec("onnxruntime") is None:
            raise missing_ocr(_NAME)
        path = shipped_model(_NAME) if config.model is None else from_home(config.model)
        self._recogniser = Recogniser(path, config.threads)

    def __call__(self, images: Float[Tensor, "b 3 h w"], prompts: Sequence[str]) -> RewardOutput:
        """Scores in [floor, 0].

        Raises:
            UsageError: for a prompt that quotes no text, or one with a character that the recogniser does not know.
        """
        targets = [self._recogniser.labels(text) for text in quoted_texts(prompts)]
        scores, exact = torch.empty(len(prompts)), torch.empty(len(prompts))
        for start in range(0, len(prompts), self._config.batch_size):
            rows = range(start, min(start + self._config.batch_size, len(prompts)))
            probabilities = self._recogniser.probabilities(images[rows.start : rows.stop])
            for row, frames in zip(rows, probabilities, strict=True):
                labels = targets[row]
                scores[row] = ctc_log_prob(frames, labels) / len(labels)
                exact[row] = float(greedy_labels(frames) == labels.tolist())
        # fp32 probabilities of a frame may add up to a little more than 1
        return RewardOutput(
            scores.clamp(self._config.floor, 0), {"exact": exact, "probability": scores.clamp(max=0).exp()}
        )

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Looks up every character of the quoted texts.

        Raises:
            UsageError: naming the first prompt that cannot be scored.
        """
        for text in quoted_texts(prompts):
            self._recogniser.labels(text)


def shipped_model(user: str) -> Path:
    """The recogniser that the rapidocr wheel carries, for `user`; nothing of the package is imported.

    Raises:
        MissingDependencyError: without the packages of `flow-map-grpo[ocr]`.
    """
    package = find_spec("rapidocr")
    if find_spec("onnxruntime") is None or package is None or not package.submodule_search_locations:
        raise missing_ocr(user)
    return Path(package.submodule_search_locations[0]) / _SHIPPED
