"""GenEval 2 (Kamath et al., arXiv 2512.16853) as a reward: Soft-TIFA over the questions that come with each prompt.

A vision-language model is asked every question. The score is the probability that the first token of the answer is the
expected one, in any of the spellings of the authors' `evaluation.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from fmg.core.errors import UsageError
from fmg.core.hub import check_digest, locate
from fmg.core.json_io import read_objects
from fmg.core.types import RewardOutput
from fmg.rewards.configs import GenEval2Config
from fmg.rewards.network import Files, NetworkReward, Score
from fmg.rewards.qwen_vl import MARKER, QwenVL, load_qwen_vl

_NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_COUNTING = "How many"


@dataclass(frozen=True)
class Question:
    """A question about an image and its right answer: a number word from one to ten, or `Yes`."""

    text: str
    answer: str

    def asked(self) -> str:
        """The text that the model reads."""
        return f"{self.text} Answer in one word."

    def spellings(self) -> tuple[str, ...]:
        """How the right answer may begin."""
        if not self.text.startswith(_COUNTING):
            return ("Yes", "yes", " yes", " Yes")
        digits = str(_NUMBERS.index(self.answer) + 1)
        words = (self.answer, self.answer.capitalize(), digits)
        return (*words, *(f" {word}" for word in words))


class GenEval2(NetworkReward):
    """The mean over the questions about a prompt; parts `geometric` and `arithmetic` are both means.

    The benchmark's own figure is the mean of `geometric` over its prompts, times 100.
    """

    def __init__(self, config: GenEval2Config) -> None:
        super().__init__("geneval2", config, partial(_load, config, self._questions_about))
        self._files = config

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Raises a `UsageError` for the first prompt without questions."""
        for prompt in prompts:
            self._questions_about(prompt)

    def example_prompt(self) -> str:
        """A prompt that has questions."""
        return next(iter(self._questions))

    def _questions_about(self, prompt: str) -> tuple[Question, ...]:
        if (found := self._questions.get(prompt)) is None:
            raise UsageError(
                f"GenEval 2 has no questions about '{prompt:.80}'",
                "Use its prompts, or set the option 'metadata' to a .jsonl file with prompt and vqa_list on each line.",
            )
        return found

    @cached_property
    def _questions(self) -> Mapping[str, tuple[Question, ...]]:
        asset = next(asset for asset in self._files.assets() if asset.what == "questions")
        located = locate(asset, "reward", self.name)
        check_digest(located)
        more = {} if self._files.metadata is None else read_questions(Path(self._files.metadata))
        return {**read_questions(located.path), **more}


def read_questions(path: Path) -> dict[str, tuple[Question, ...]]:
    """Questions by prompt from a file in the format of `geneval2_data.jsonl`: `prompt` and `vqa_list` on each line.

    Raises:
        UsageError: naming file and line.
    """
    found: dict[str, tuple[Question, ...]] = {}
    for number, entry in read_objects(path):
        try:
            prompt, questions = _entry(entry)
        except ValueError as error:
            raise UsageError(
                f"{path}:{number}: {error}",
                'Write {"prompt": "...", "vqa_list": [["How many dogs are in the image?", "two"], ...]}.',
            ) from None
        if found.setdefault(prompt, questions) != questions:
            what = f"{path}:{number}: '{prompt:.80}' has different questions on an earlier line"
            raise UsageError(what, "Keep one of the two.")
    if not found:
        raise UsageError(f"'{path}' has no questions", "Give a file in the format of geneval2_data.jsonl.")
    return found


def _entry(entry: Mapping[str, object]) -> tuple[str, tuple[Question, ...]]:
    prompt, pairs = entry.get("prompt"), entry.get("vqa_list")
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError("'prompt' must be non-empty text")
    if not isinstance(pairs, list) or not pairs:
        raise ValueError("'vqa_list' must be a list of questions with their answers")
    return prompt.strip(), tuple(_checked(pairs))


def _checked(pairs: Sequence[object]) -> Iterator[Question]:
    for pair in pairs:
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise ValueError("'vqa_list' must have pairs of a question and an answer")
        question = Question(*pair)
        if not question.text.strip():
            raise ValueError("'vqa_list' has an empty question")
        if marker := MARKER.search(question.text):
            raise ValueError(
                f"the question '{question.text:.80}' contains {marker[0]}, which the model reads as a special token"
            )
        if question.text.startswith(_COUNTING):
            if question.answer not in _NUMBERS:
                raise ValueError(f"the answer to '{question.text}' must be a number word from one to ten")
        elif question.answer != "Yes":
            # the published code takes any answer for Yes
            raise ValueError(f"the answer to '{question.text}' must be Yes; only How many questions have others")
        yield question


def _load(
    config: GenEval2Config,
    questions_about: Callable[[str], tuple[Question, ...]],
    files: Files,
    device: torch.device,
    dtype: torch.dtype,
) -> Score:
    model = load_qwen_vl(files["weights"], device, dtype)

    def score(images: Float[Tensor, "b 3 h w"], prompts: Sequence[str]) -> RewardOutput:
        logs = [
            soft_scores(model, image, questions_about(prompt), config.batch_size)
            for image, prompt in zip(images, prompts, strict=True)
        ]
        parts = {
            "geometric": torch.stack([x.mean().exp() for x in logs]),
            "arithmetic": torch.stack([x.exp().mean() for x in logs]),
        }
        return RewardOutput(parts[config.mean], parts)

    return score


def soft_scores(
    model: QwenVL, image: Float[Tensor, "3 h w"], questions: Sequence[Question], rows: int
) -> Float[Tensor, " q"]:
    """Log-probability of the right answer to each question, `rows` questions at a time."""
    log_probabilities = model.next_token(image, [question.asked() for question in questions], rows)
    right = []
    for row, question in zip(log_probabilities, questions, strict=True):
        tokens = {model.first_token(spelling) for spelling in question.spellings()}
        right.append(row[sorted(tokens)].logsumexp(0))
    return torch.stack(right)
