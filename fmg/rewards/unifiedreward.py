"""UnifiedReward (Wang et al., arXiv 2503.05236) as a judge of single images: a Qwen-VL that writes ratings.

The question is worded as in its authors' scripts, and answers are decoded greedily, as the authors serve the model. A
missing rating is a failure; users of these models commonly count it as 0.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from fmg.core.errors import CheckpointError, reason
from fmg.core.types import RewardOutput
from fmg.rewards.calls import CallError, FailurePolicy
from fmg.rewards.configs import UnifiedRewardConfig
from fmg.rewards.images import check_finite
from fmg.rewards.network import Files, LazyNetwork, read_python
from fmg.rewards.qwen_vl import Answer, QwenVL, check_no_markers, load_qwen_vl
from fmg.rewards.vlm_judge import BEST_RATING, stated_rating

PROMPT = "{prompt}"
AXES = ("alignment", "coherence", "style")
_CPU = torch.device("cpu")
_FIX = "Use the authors' script, or a text file with {prompt} in it."


class UnifiedReward:
    """The mean of the ratings divided by 5, from 0.2 to 1; parts are the ratings, from 1 to 5.

    Parts are `alignment`, `coherence` and `style`, or `rating` with `form: final-score`.
    """

    def __init__(self, config: UnifiedRewardConfig) -> None:
        self._config = config
        self._network: LazyNetwork[tuple[QwenVL, str]] = LazyNetwork("reward", "unifiedreward", config, _load)
        advice = "Use weights that were tuned for this form, or set on_failure to drop-group."
        self._policy = FailurePolicy("unifiedreward", config.on_failure, config.patience, advice)

    def load(self, device: torch.device = _CPU) -> None:
        """Loads the network unless it is loaded already; `device` and errors as in `LazyNetwork.get`."""
        self._network.get(device)

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Raises a `UsageError` for the first prompt that contains one of the model's markers."""
        check_no_markers(prompts, "UnifiedReward")

    @torch.no_grad()
    def __call__(self, images: Float[Tensor, "b 3 h w"], prompts: Sequence[str]) -> RewardOutput:
        """Scores of images in [0, 1]; a `PartialRewardOutput` only with `on_failure: drop-group`.

        Raises:
            RewardError: an answer has no rating and the policy is to stop, or patience has run out.
        """
        self.check_prompts(prompts)
        check_finite("unifiedreward", images)
        model, wording = self._network.get(images.device)
        size = self._config.batch_size
        results: list[tuple[slice, RewardOutput | CallError]] = []
        for start in range(0, len(prompts), size):
            texts = [wording.replace(PROMPT, prompt) for prompt in prompts[start : start + size]]
            for answer in model.answers(images[start : start + size], texts, self._config.max_tokens):
                results.append((slice(len(results), len(results) + 1), self._score(answer)))
        return self._policy.join(results, prompts)

    def _score(self, answer: Answer) -> RewardOutput | CallError:
        ratings = ratings_of(answer.text, self._config.form) if answer.ended else None
        if ratings is None:
            what = "has no rating from 1 to 5" if answer.ended else f"exceeds {self._config.max_tokens} tokens"
            return CallError(f"the answer {' '.join(answer.text.split())[:80]!r} {what}", passing=True)
        mean = sum(ratings.values()) / len(ratings)
        parts = {name: torch.tensor([rating]) for name, rating in ratings.items()}
        return RewardOutput(torch.tensor([mean / BEST_RATING]), parts)


def ratings_of(text: str, form: str) -> dict[str, float] | None:
    """The ratings in an answer by name; None unless all are present and from 1 to 5.

    Args:
        text: the answer, with `Alignment Score (1-5): X` and the like, or with `Final Score: X`.
        form: `axes` or `final-score`.
    """
    if form == "final-score":
        rating = stated_rating(text)
        return None if rating is None else {"rating": rating}
    ratings = {}
    for axis in AXES:
        # the asterisks of bold type do not matter, as in a final score
        found = re.findall(rf"{axis} score(?: \(1-5\))?\**:\s*\**\s*(\d+(?:\.\d+)?)", text, re.IGNORECASE)
        if not found or not 1 <= float(found[-1]) <= BEST_RATING:
            return None
        ratings[axis] = float(found[-1])
    return ratings


def read_wording(file: Path) -> str:
    """The question for the model, with `{prompt}` where the prompt goes.

    From a Python file it takes the one f-string with `{prompt}` as its only field; the file is parsed, never run.

    Raises:
        CheckpointError: there is no such text.
    """
    if file.suffix == ".py":
        texts = [text for node in ast.walk(read_python(file, _FIX)) if (text := _template(node)) is not None]
    else:
        try:
            texts = [file.read_text(encoding="utf-8").strip()]
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{file} cannot be read: {reason(error)}", _FIX) from error
    if len(texts) != 1 or texts[0].count(PROMPT) != 1:
        raise CheckpointError(f"{file} does not have one text with {PROMPT}", _FIX)
    return texts[0]


def _template(node: ast.AST) -> str | None:
    """The text of an f-string with `{prompt}` as its only field; None for anything else."""
    if not isinstance(node, ast.JoinedStr):
        return None
    text = ""
    for part in node.values:
        if isinstance(part, ast.Constant):
            text += str(part.value)
        elif isinstance(part, ast.FormattedValue) and isinstance(part.value, ast.Name):
            text += f"{{{part.value.id}}}"
        else:
            return None
    return text if PROMPT in text else None


def _load(files: Files, device: torch.device, dtype: torch.dtype) -> tuple[QwenVL, str]:
    wording = read_wording(files["instruction"].path)
    return load_qwen_vl(files["weights"], device, dtype), wording
