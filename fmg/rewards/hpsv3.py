"""HPSv3 (Ma et al., arXiv 2508.03789): a Qwen2-VL that was tuned to predict the distribution of a human rating.

The details follow the package `hpsv3` 1.0.0 under transformers 4.45, with which the checkpoint was made. One of
them is easily missed: that code calls the language model with embeddings and no positions, so the rotary positions
of text and image patches alike are 0, 1, 2, ... on all three axes, not the grid positions that Qwen2-VL uses by
default.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Formatter
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AutoTokenizer, Qwen2VLConfig, Qwen2VLModel

from fmg.core.display import some
from fmg.core.errors import CheckpointError
from fmg.core.hub import Located
from fmg.core.types import RewardOutput
from fmg.rewards.configs import Hpsv3Config
from fmg.rewards.network import (
    Files,
    NetworkReward,
    Score,
    Tensors,
    check_entries,
    load_module,
    load_pretrained,
    read_json,
    read_python,
    read_renamed,
    under,
    with_prefixes,
)
from fmg.rewards.published import HPSV3_PACKAGE
from fmg.rewards.qwen_vl import ASSISTANT, Patches, check_no_markers, closing, opening

LAYOUT = "hpsv3-1"
PIXELS = 256 * 28 * 28
"""Pixels that every image is scaled to, as near as whole patches allow."""

REWARD_TOKEN = "<|Reward|>"
INSTRUCTION_SHA256 = "f6ee57479d4e9eee76b49c00dc962e1e696a5a2b3cc32cebd9b1fa76fe27502c"
"""Sha256 of `INSTRUCTION + prompt_with_special_token` in hpsv3 1.0.0."""

HEAD_LAYERS = (0, 3, 5)


def from_hpsv3(tensors: Tensors) -> dict[str, Tensor]:
    """The names of `Qwen2VLModel` under `base.` and of the head under `head.`; the output embedding is dropped.

    Raises:
        CheckpointError: naming unexpected keys.
    """
    parts = {"visual.": "base.visual.", "model.": "base.language_model.", "rm_head.": "head."}
    return with_prefixes(tensors, parts, ("lm_head.",), "HPSv3.safetensors")


@dataclass(frozen=True)
class Instruction:
    """The wording that the model was tuned with; `{text_prompt}` marks the place of the prompt."""

    before: str
    after: str

    def about(self, prompt: str) -> str:
        """The text that the model reads about an image."""
        return self.before.format(text_prompt=prompt) + self.after


class Hpsv3Reward(NetworkReward):
    """`mu` of the predicted rating; part `log_sigma`."""

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Raises a `UsageError` for the first prompt that contains one of the model's markers."""
        check_no_markers(prompts, "HPSv3")

    def __call__(self, images: Float[Tensor, "b 3 h w"], prompts: Sequence[str]) -> RewardOutput:
        self.check_prompts(prompts)
        return super().__call__(images, prompts)


def hpsv3(config: Hpsv3Config) -> Hpsv3Reward:
    """The first number of the head at the reward token, `mu`. The second, `log_sigma`, is a part.

    Images are rounded to 8 bits and resized by Pillow's bicubic filter. The head runs in fp32. Prompts are not
    truncated.
    """
    return Hpsv3Reward("hpsv3", config, _load)


class RatingModel:
    """`(mu, log sigma)` of the rating of each image.

    Args:
        base: a `Qwen2VLModel`.
        head: the network on the hidden state of the reward token, fp32.
        tokenizer: the base's tokenizer with the reward token added.
        instruction: the wording around a prompt.
    """

    def __init__(self, base: Any, head: nn.Module, tokenizer: Any, instruction: Instruction) -> None:
        self._base = base
        self._head = head
        self._tokenizer = tokenizer
        self._instruction = instruction
        self._reward_id = tokenizer.convert_tokens_to_ids(REWARD_TOKEN)

    def __call__(self, images: Float[Tensor, "b 3 h w"], prompts: Sequence[str]) -> Float[Tensor, "b 2"]:
        vision, device = self._base.config.vision_config, self._base.device
        scaling = Patches(
            vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size, least=PIXELS, most=PIXELS
        )
        patches, grid = scaling.of(images)
        # the chat of Qwen2-VL
        begin = opening(scaling.slots(grid), ASSISTANT)
        tokens = self._tokenizer(
            [begin + closing(self._instruction.about(prompt)) for prompt in prompts],
            padding=True,
            padding_side="right",
            return_tensors="pt",
        ).to(device)
        length = tokens.input_ids.shape[1]
        states = self._base(
            input_ids=tokens.input_ids,
            attention_mask=tokens.attention_mask,
            position_ids=torch.arange(length, device=device).expand(3, len(prompts), length),
            pixel_values=patches.to(device, self._base.dtype),
            image_grid_thw=grid.expand(len(prompts), 3).to(device),
            use_cache=False,
        ).last_hidden_state
        at_token = states[tokens.input_ids == self._reward_id]
        ratings: Tensor = self._head(at_token.float())
        return ratings


def read_instruction(file: Path, *, published: bool) -> Instruction:
    """The two literals of the authors' `data_collator_qwen.py`. The file is parsed, never run.

    Args:
        file: the Python file.
        published: whether it must be that of hpsv3 1.0.0, byte for byte.

    Raises:
        CheckpointError: the literals are missing, or are not the published ones.
    """
    tree = read_python(file, "Install hpsv3==1.0.0 again.")
    literals = {
        target.id: node.value.value
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    before, after = literals.get("INSTRUCTION"), literals.get("prompt_with_special_token")
    if not isinstance(before, str) or not isinstance(after, str) or not _is_wording(before, after):
        raise CheckpointError(
            f"{file} lacks INSTRUCTION with {{text_prompt}}, or prompt_with_special_token with {REWARD_TOKEN}",
            "Use the data_collator_qwen.py of hpsv3.",
        )
    if published and hashlib.sha256((before + after).encode()).hexdigest() != INSTRUCTION_SHA256:
        raise CheckpointError(
            f"The wording in {file} is not that of hpsv3 1.0.0", "Install it with `pip install --no-deps hpsv3==1.0.0`."
        )
    return Instruction(before, after)


def _is_wording(before: str, after: str) -> bool:
    fields = {name for _, name, _, _ in Formatter().parse(before) if name is not None}
    return fields == {"text_prompt"} and after.count(REWARD_TOKEN) == 1


def _load(files: Files, device: torch.device, dtype: torch.dtype) -> Score:
    base, instruction = files["base"], files["instruction"]
    wording = read_instruction(instruction.path, published=instruction.asset.source == HPSV3_PACKAGE)
    tensors = read_renamed(files["checkpoint"].path, LAYOUT, from_hpsv3)
    origin = files["checkpoint"].path
    network = under("base.", tensors)
    config = _config(base, network, origin)
    tokenizer = load_pretrained(AutoTokenizer.from_pretrained, base.folder, base.asset.what)
    tokenizer.add_tokens([REWARD_TOKEN], special_tokens=True)
    fix = "Set base to the tokenizer of Qwen2-VL-7B-Instruct."
    check_entries(tokenizer, base.folder, config.text_config.vocab_size, fix)
    head = _head(under("head.", tensors), device)
    module = load_module(Qwen2VLModel, config, network, origin, device, dtype)
    model = RatingModel(module, head, tokenizer, wording)

    def score(images: Float[Tensor, "b 3 h w"], prompts: Sequence[str]) -> RewardOutput:
        mu, log_sigma = model(images, prompts).unbind(-1)
        return RewardOutput(mu, {"log_sigma": log_sigma})

    return score


def _config(base: Located, tensors: Tensors, origin: Path) -> Any:
    """The base's config with as many embeddings as the checkpoint has: one row per added token."""
    embeddings = tensors.get("language_model.embed_tokens.weight")
    if embeddings is None:
        raise CheckpointError(f"{origin} has no token embeddings", "Use HPSv3.safetensors.")
    config: Any = Qwen2VLConfig(**read_json(base.files["config.json"]))
    config.text_config.vocab_size = len(embeddings)
    return config


def _head(tensors: Tensors, device: torch.device) -> nn.Module:
    """Linear, ReLU, dropout, linear, ReLU, linear, in fp32."""
    wanted = {f"{layer}.{kind}" for layer in HEAD_LAYERS for kind in ("weight", "bias")}
    if wrong := wanted ^ set(tensors):
        raise CheckpointError(f"The head has missing or unexpected tensors: {some(wrong)}", "Use HPSv3.safetensors.")
    first, second, third = (nn.Linear(*tensors[f"{layer}.weight"].T.shape) for layer in HEAD_LAYERS)
    head = nn.Sequential(first, nn.ReLU(), nn.Dropout(0.05), second, nn.ReLU(), third)
    head.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    return head.eval().requires_grad_(False).to(device)
