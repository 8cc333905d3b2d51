"""What an image costs each reward that runs offline, and how that falls with the size of the batch.

All rewards and batch sizes take turns in one process, round by round, so ratios hold when the machine's speed drifts:
each is the median over rounds of the ratio within a round. Milliseconds depend on the machine, ratios less so.

    python benchmarks/rewards.py [--rounds 7] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from fmg.core.errors import FmgError
from fmg.core.protocols import Reward
from fmg.data.prompt_sets import load_prompts
from fmg.eval.set_metrics import DrawsTruth
from fmg.registry import rewards

BATCHES = (1, 4, 16)
BASE = "jpeg-compressibility"
WORDS = ("HELLO", "BREAD", "NORTH", "RIVER")


@dataclass(frozen=True)
class Case:
    """A reward on pictures of one size; `options` are those it runs with here."""

    reward: str
    size: str
    images: Tensor
    prompts: Sequence[str]
    options: dict[str, object]


def lettering(width: int, height: int, font: int, count: int) -> tuple[Tensor, list[str]]:
    """Black words on white, and prompts that quote them."""
    pictures, prompts = [], []
    for number in range(count):
        word = WORDS[number % len(WORDS)]
        picture = Image.new("RGB", (width, height), "white")
        draw = ImageDraw.Draw(picture)
        draw.text((width / 2, height / 2), word, "black", ImageFont.load_default(font), anchor="mm")
        pictures.append(torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1).float() / 255)
        prompts.append(f'a sign that says "{word}"')
    return torch.stack(pictures), prompts


def cases() -> list[Case]:
    count = max(BATCHES)
    shapes = load_prompts("shapes-heldout")
    assert isinstance(shapes, DrawsTruth)
    texts = [shapes[i % len(shapes)].text for i in range(count)]
    drawn = shapes.true_images(texts, 0)
    noise = torch.rand(count, 3, 512, 512, generator=torch.Generator().manual_seed(0))
    # as smooth as a photograph: pure noise is the worst case of JPEG
    photo = torch.nn.functional.avg_pool2d(noise, 9, stride=1, padding=4).clamp(0, 1)
    strips, strip_prompts = lettering(64, 32, 18, count)
    signs, sign_prompts = lettering(256, 256, 40, count)
    jpeg = [Case(name, "512 x 512", photo, texts, {}) for name in (BASE, "jpeg-incompressibility")]
    return [
        *jpeg,
        Case("shapes", "32 x 32", drawn, texts, {}),
        Case("shapes-quality", "32 x 32", drawn, texts, {}),
        Case("ocr-logp", "64 x 32", strips, strip_prompts, {}),
        Case("ocr", "256 x 256", signs, sign_prompts, {}),
    ]


def ms_per_image(reward: Reward, case: Case, batch: int) -> float:
    start = time.perf_counter()
    reward(case.images[:batch], case.prompts[:batch])
    return (time.perf_counter() - start) * 1e3 / batch


def measure(rounds: int) -> list[dict[str, object]]:
    built: list[tuple[Case, Reward]] = []
    for case in cases():
        try:
            reward = rewards.build(case.reward, case.options)
            reward(case.images, case.prompts)
        except FmgError as error:
            print(f"{case.reward}: left out. {error}")
            continue
        built.append((case, reward))
    taken: dict[tuple[str, int], list[float]] = {}
    for _ in range(rounds):
        for case, reward in built:
            for batch in BATCHES:
                taken.setdefault((case.reward, batch), []).append(ms_per_image(reward, case, batch))
    largest = max(BATCHES)

    def ratio(above: tuple[str, int], below: tuple[str, int]) -> float:
        return statistics.median(a / b for a, b in zip(taken[above], taken[below], strict=True))

    return [
        {
            "reward": case.reward,
            "size": case.size,
            "ms_per_image": {str(b): round(statistics.median(taken[case.reward, b]), 3) for b in BATCHES},
            f"one_image_over_batch_of_{largest}": round(ratio((case.reward, 1), (case.reward, largest)), 2),
            f"times_{BASE.replace('-', '_')}": round(ratio((case.reward, largest), (BASE, largest)), 2),
        }
        for case, _ in built
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    result = {
        "benchmark": "rewards",
        "batches": list(BATCHES),
        "rounds": args.rounds,
        "rewards": measure(args.rounds),
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "torch": torch.__version__,
    }
    print(json.dumps(result, indent=2))
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
