"""Checks rewards on this computer: installed, weights as published, known scores reproduced, speed, memory."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from fmg.core.errors import FmgError, MissingDependencyError
from fmg.core.events import Observer, StageProgress, ignore
from fmg.core.hub import check_digest, locate
from fmg.core.machine import peak_rss
from fmg.registry import rewards
from fmg.registry.config import ComponentConfig
from fmg.rewards.base import Checked, checked, probe_prompt
from fmg.rewards.service.wire import probe_image

Picture = Float[Tensor, "3 h w"]

_MADE_HERE = "computed by fmg 0.1 with rapidocr 3.10.0, onnxruntime 1.32, Pillow 13.0 on x86-64"


@dataclass(frozen=True)
class KnownAnswer:
    """A score that a reward must reproduce.

    Attributes:
        picture: name in `PICTURES`.
        prompt: the prompt that it is scored against.
        value: the expected score.
        tolerance: largest deviation: rounding, and differences between versions of the libraries in `origin`.
        origin: source of the value.
        part: which score: `total` or the name of a part.
        options: options of the reward; the defaults if empty.
    """

    picture: str
    prompt: str
    value: float
    tolerance: float
    origin: str
    part: str = "total"
    options: Mapping[str, object] = field(default_factory=dict)


def gradient() -> Picture:
    """Ramps in red and green and a blue square, 32 x 32."""
    return probe_image()[0]


def white() -> Picture:
    """A blank image, 64 x 128."""
    return torch.ones(3, 64, 128)


def sign() -> Picture:
    """HELLO in black on white, 64 x 128, in the font that comes with Pillow."""
    picture = Image.new("RGB", (128, 64), "white")
    ImageDraw.Draw(picture).text((64, 32), "HELLO", "black", ImageFont.load_default(36), anchor="mm")
    return _tensor(picture)


def disc() -> Picture:
    """A red disc at the left of a light 32 x 32 image, as the shapes world renders it."""
    scale = 8
    picture = Image.new("RGB", (32 * scale, 32 * scale), (240, 240, 235))
    ImageDraw.Draw(picture).ellipse([3 * scale, 10 * scale, 15 * scale, 22 * scale], fill=(215, 40, 40))
    return _tensor(picture.resize((32, 32), Image.Resampling.BOX))


def tag() -> Picture:
    """CAT in the dark ink of the text world on white, 24 x 24, each letter in its slot."""
    picture = Image.new("RGB", (24, 24), "white")
    for x, letter in zip((4, 12, 20), "CAT", strict=True):
        ImageDraw.Draw(picture).text((x, 12), letter, (20, 20, 30), ImageFont.load_default(12), anchor="mm")
    return _tensor(picture)


def blank_tag() -> Picture:
    """A blank image, 24 x 24."""
    return torch.ones(3, 24, 24)


PICTURES: Mapping[str, Callable[[], Picture]] = MappingProxyType(
    {"gradient": gradient, "white": white, "sign": sign, "disc": disc, "tag": tag, "blank tag": blank_tag}
)

KNOWN_ANSWERS: Mapping[str, tuple[KnownAnswer, ...]] = MappingProxyType(
    {
        "ocr": (
            KnownAnswer("sign", 'a sign that says "Hello"', 1.0, 1e-6, "the rule: the text is there, ignoring case"),
            KnownAnswer("sign", 'a sign that says "JELLO"', 0.8, 1e-6, "the rule: one of five letters is wrong"),
            KnownAnswer("white", 'a sign that says "HELLO"', 0.0, 1e-6, "the rule: nothing can be read"),
        ),
        "ocr-logp": (
            KnownAnswer("sign", 'a sign that says "HELLO"', 0.0, 0.05, _MADE_HERE),
            KnownAnswer("sign", 'a sign that says "HELLO"', 1.0, 1e-6, _MADE_HERE, part="exact"),
            KnownAnswer("white", 'a sign that says "HELLO"', -11.840, 0.5, _MADE_HERE),
        ),
        "jpeg-incompressibility": (KnownAnswer("gradient", "anything", 1.028, 0.05, _MADE_HERE),),
        "jpeg-compressibility": (KnownAnswer("gradient", "anything", -0.002056, 0.0001, _MADE_HERE),),
        "shapes": (
            KnownAnswer("disc", "a red circle", 1.0, 1e-6, "the rule: it is what the prompt says", part="strict"),
            KnownAnswer("disc", "a blue circle", 0.0, 1e-6, "the rule: the colour is wrong", part="strict"),
        ),
        "shapes-quality": (
            KnownAnswer("disc", "a red circle", 1.0, 1e-6, "the rule: one object", part="recognisable"),
        ),
        "text-fidelity": (
            KnownAnswer("tag", "anything", 1.0, 0.01, "the rule: a printed sign and nothing else"),
            KnownAnswer("blank tag", "anything", 0.0, 1e-6, "the rule: without ink there is no contrast"),
        ),
    }
)


def _tensor(picture: Image.Image) -> Picture:
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255


Outcome = Literal["ok", "not verified", "failed"]

_BATCH = 4
_TIMED_S = 0.3
_TIMED_CALLS = 10
_MIB = 1 << 20


@dataclass(frozen=True)
class Diagnosis:
    """The findings on one reward.

    Attributes:
        reward: registered name.
        outcome: `ok`: it runs and reproduces its known scores. `not verified`: nothing is wrong, but something that
            the check needs is missing. `failed`: it does not run, or its weights or scores are not the published ones.
        installed: `yes`, or what is missing.
        weights: `none needed`, `present` with how many files have a published hash and match it, or what is wrong.
        known_scores: how many were reproduced, or what differs.
        ms_per_image: time of one image in a batch of four small images, after a first call.
        memory_mib: growth of the process's peak memory, or on CUDA of the allocated memory, in the first calls; None
            where the system does not report it.
        advice: what to do; empty when there is nothing to do.
    """

    reward: str
    outcome: Outcome
    installed: str = "-"
    weights: str = "-"
    known_scores: str = "-"
    ms_per_image: float | None = None
    memory_mib: float | None = None
    advice: str = ""


def diagnose(
    names: Sequence[str] = (),
    options: Mapping[str, Mapping[str, object]] | None = None,
    device: torch.device | None = None,
    observer: Observer = ignore,
) -> list[Diagnosis]:
    """Examines rewards one after the other; progress arrives as `StageProgress("doctor", done, total)`.

    Args:
        names: rewards to examine; one that lacks something is `failed`. None: all registered rewards; one that is not
            installed or fetched is `not verified`.
        options: options by name, in place of the defaults.
        device: device of the images, and so of the networks.

    Raises:
        UsageError: for an unknown name or option.
    """
    wanted = list(names) or rewards.names()
    given = options or {}
    for name in (*wanted, *given):
        rewards.row(name)
    found = []
    for number, name in enumerate(wanted):
        observer(StageProgress("doctor", number, len(wanted)))
        found.append(_examine(name, given.get(name, {}), device or torch.device("cpu"), needed=bool(names)))
    observer(StageProgress("doctor", len(wanted), len(wanted)))
    return found


def _examine(name: str, options: Mapping[str, object], device: torch.device, *, needed: bool) -> Diagnosis:
    lacking: Outcome = "failed" if needed else "not verified"
    required = [field.name for field in rewards.describe(name).fields if field.required and field.name not in options]
    if required:
        missing = ", ".join(required)
        return Diagnosis(name, lacking, known_scores=f"needs the option {missing}", advice=f"Give {missing}.")
    config = rewards.config(name, options)
    try:
        weights = _weights(name, config)
    except MissingDependencyError as error:
        return Diagnosis(name, lacking, weights="missing", advice=str(error))
    except FmgError as error:
        return Diagnosis(name, "failed", weights="not usable", advice=str(error))
    try:
        before = _memory(device)
        reward = checked(name, rewards.build_config(name, config))
        return _try(name, reward, device, weights, before, default=not options)
    except MissingDependencyError as error:
        return Diagnosis(name, lacking, installed="no", weights=weights, advice=str(error))
    except FmgError as error:
        return Diagnosis(name, "failed", installed="yes", weights=weights, known_scores="fails", advice=str(error))


def _weights(name: str, config: ComponentConfig) -> str:
    """Looks for the files of a network and compares their digests with the published ones, if there are any."""
    assets = config.assets()
    if not assets:
        return "none needed"
    for asset in assets:
        check_digest(locate(asset, "reward", name))
    pinned = sum(asset.sha256 is not None for asset in assets)
    return f"present, {pinned} of {len(assets)} with the published hash" if pinned else "present"


def _try(
    name: str, reward: Checked, device: torch.device, weights: str, before: float | None, *, default: bool
) -> Diagnosis:
    answers = KNOWN_ANSWERS.get(name, ()) if default else ()
    prompt = answers[0].prompt if answers else probe_prompt(reward)
    picture = PICTURES[answers[0].picture if answers else "gradient"]()
    batch = picture.expand(_BATCH, -1, -1, -1).to(device)
    reward(batch, [prompt] * _BATCH)
    milliseconds = _milliseconds(reward, batch, prompt)
    wrong = [problem for answer in answers if (problem := _difference(reward, answer, device))]
    after = _memory(device)
    growth = None if before is None or after is None else max(0.0, after - before) / _MIB
    known = f"{len(answers) - len(wrong)} of {len(answers)}" if answers else "none recorded"
    outcome: Outcome = "failed" if wrong else "ok" if answers else "not verified"
    return Diagnosis(name, outcome, "yes", weights, known, milliseconds, growth, " ".join(wrong))


def _difference(reward: Checked, answer: KnownAnswer, device: torch.device) -> str:
    """What is wrong with one score; empty if nothing is."""
    output = reward(PICTURES[answer.picture]()[None].to(device), [answer.prompt])
    score = float((output.total if answer.part == "total" else output.parts[answer.part])[0])
    if abs(score - answer.value) <= answer.tolerance:
        return ""
    return (
        f"{answer.part} of the image '{answer.picture}' is {score:.6g}, not {answer.value:.6g} ± {answer.tolerance:g}"
        f" ({answer.origin})."
    )


def _milliseconds(reward: Checked, batch: torch.Tensor, prompt: str) -> float:
    started, calls = time.perf_counter(), 0
    while calls < _TIMED_CALLS and time.perf_counter() - started < _TIMED_S:
        reward(batch, [prompt] * _BATCH)
        calls += 1
    return (time.perf_counter() - started) / (calls * _BATCH) * 1000


def _memory(device: torch.device) -> float | None:
    """Bytes: the peak of this process, or on CUDA what torch has allocated; None where unknown."""
    if device.type == "cuda":
        return float(torch.cuda.memory_allocated(device))
    if sys.platform == "win32":
        return None
    return float(peak_rss())
