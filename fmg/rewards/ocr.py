"""Rewards that read text in images: edit distance over the whole image, and the log-probability of a line."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from fmg.core.errors import CheckpointError, UsageError
from fmg.core.files import from_home
from fmg.core.runtime import require
from fmg.core.types import RewardOutput
from fmg.rewards.configs import OcrConfig, OcrLogpConfig
from fmg.rewards.images import check_drawable, to_bytes

_PACKAGES, _EXTRA = ("rapidocr", "onnxruntime"), "ocr"
_ANY_PAIR = re.compile('["“”„]([^"“”„]*)["“”„]')
# A straight quote after a digit opens nothing: it is an inch mark. The first quote that opens decides which form it is.
_QUOTED = re.compile(
    r"""
      “([^“”]*)”                                     # may hold straight quotes
    | „([^„“”]*)[“”]
    | (?<!\d)""+(?=[^\s"“”„])([^"“”„]+)""+           # doubled
    | (?<!\d)"((?:[^"“”„]|“[^"“”„]*”)*)"             # may hold curly pairs
    | (?:(?<!\d)"|[“”„])([^"“”„]*)["“”„]             # two of different kinds
    """,
    re.VERBOSE,
)


def quoted_text(prompt: str) -> str:
    """The text between the first pair of double quotes, straight or curly, without surrounding blanks.

    Quotes inside a pair of the other kind belong to the text (`“say "HI"”`), unless they enclose all of it. A straight
    quote right after a digit is an inch mark (`a 5" disk labelled "DATA"`), unless it opens the only pair there is.
    Prompts with one kind of quotes and no inch marks are read as Flow-GRPO reads them.

    Raises:
        UsageError: when the prompt quotes nothing, or only blanks.
    """
    found = _QUOTED.search(prompt) or _ANY_PAIR.search(prompt)
    if found is None:
        raise UsageError(f"The prompt '{prompt}' quotes no text", 'Write the text to render in double quotes: "HELLO".')
    text = str(found[found.lastindex or 0]).strip()
    while len(text) > 1 and text[0] + text[-1] in ('""', "“”"):
        text = text[1:-1].strip()
    if not text:
        raise UsageError(f"The prompt '{prompt}' quotes an empty text", 'Write the text to render: "HELLO".')
    return text


def quoted_texts(prompts: Sequence[str]) -> list[str]:
    """`quoted_text` of each prompt."""
    return [quoted_text(prompt) for prompt in prompts]


def normalised(text: str) -> str:
    """`text` in lower case without spaces, the form in which Flow-GRPO compares (arXiv 2505.05470, appendix)."""
    return text.replace(" ", "").lower()


def similarity(reading: str, target: str) -> float:
    """1 when the normalised target is part of the reading, else `1 - min(d, n) / n` in [0, 1].

    `d` is the edit distance of the normalised texts and `n` the length of the target (Flow-GRPO, arXiv 2505.05470,
    OCR reward).
    """
    read, wanted = normalised(reading), normalised(target)
    if wanted in read:
        return 1.0
    return 1 - min(edit_distance(read, wanted), len(wanted)) / len(wanted)


def edit_distance(a: str, b: str) -> int:
    """Levenshtein distance: the minimum number of insertions, deletions and replacements of characters."""
    row = list(range(len(b) + 1))
    for i, left in enumerate(a, start=1):
        diagonal, row[0] = row[0], i
        for j, right in enumerate(b, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (left != right))
    return row[-1]


_SHIPPED = Path("models") / "PP-OCRv6_rec_small.onnx"
_HEIGHT = 48
_NAME = "The reward 'ocr-logp'"
BLANK = 0
# Probabilities come in fp32; below its smallest normal number they are 0.
_TINY = float(np.finfo(np.float32).tiny)


def ctc_log_prob(probabilities: Float[NDArray[np.float32], "t c"], labels: Int[NDArray[np.int64], " n"]) -> float:
    """`log p(labels | frames)` summed over all alignments (Graves et al., ICML 2006, eq. 3 and 6–8).

    Args:
        probabilities: probability of every class in every frame; class 0 is the blank.
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
                "Use a PP-OCR recognition model, or leave out the option 'model'.",
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


class OcrLogp:
    """`max(log p(text | image) / length, floor)`, in nats per character, at most 0.

    For images with one line of text and little else; case and inner spaces count. Parts: `exact` (the greedy
    reading is the text), `probability` (`exp(log p / length)`, in [0, 1]).

    It saturates even for faint text, so combine it with a reward for fidelity or with a KL term.

    Raises:
        MissingDependencyError: without the packages of `flow-map-grpo[ocr]`.
        CheckpointError: when `model` is not a recogniser.
    """

    def __init__(self, config: OcrLogpConfig) -> None:
        self._config = config
        require(_NAME, "onnxruntime", extra=_EXTRA)
        path = shipped_model(_NAME) if config.model is None else from_home(config.model)
        self._recogniser = Recogniser(path, config.threads)

    def __call__(self, images: Float[Tensor, "b 3 h w"], prompts: Sequence[str]) -> RewardOutput:
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
        """Raises a `UsageError` for the first prompt with a character that the recogniser does not know."""
        for text in quoted_texts(prompts):
            self._recogniser.labels(text)


def shipped_model(user: str) -> Path:
    """The recogniser in the rapidocr wheel, for `user`; the package is not imported.

    Raises:
        MissingDependencyError: without the packages of `flow-map-grpo[ocr]`.
    """
    require(user, *_PACKAGES, extra=_EXTRA)
    package = find_spec("rapidocr")
    assert package is not None
    return Path(str(package.origin)).parent / _SHIPPED


# Small images are read just as well, and several times faster, at a smaller side of the detector.
_SMALL_IMAGE, _SMALL_SIDE, _SIDE = 256, 192, 736


class Ocr:
    """Edit-distance similarity of all text in the image to the quoted text (Flow-GRPO, arXiv 2505.05470).

    Lines are joined in reading order. Parts: `exact` (the reading is the target and nothing else, spaces and case
    aside), `found` (the target is part of the reading).

    Departs from the published code: curly quotes count as quotes; a prompt that quotes nothing is an error; a failure
    of the reader is an error, where the original scores 0.

    Raises:
        MissingDependencyError: without the packages of `flow-map-grpo[ocr]`.
    """

    def __init__(self, config: OcrConfig) -> None:
        self._config = config
        require("The reward 'ocr'", *_PACKAGES, extra=_EXTRA)
        self._readers: dict[int, Callable[..., Any]] = {}

    def __call__(self, images: Float[Tensor, "b 3 h w"], prompts: Sequence[str]) -> RewardOutput:
        check_drawable(images)
        targets = quoted_texts(prompts)
        side = self._config.limit_side_len
        if side is None:
            side = _SMALL_SIDE if max(images.shape[2:]) <= _SMALL_IMAGE else _SIDE
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
        """Raises a `UsageError` for the first prompt that quotes no text."""
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
