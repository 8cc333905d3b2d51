"""Trains the reward `shapes-clip` on renders: a two-tower scorer with SigLIP's loss (Zhai et al., arXiv 2303.15343)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

import fmg
from fmg.core.events import Observer, StageProgress, ignore
from fmg.core.files import atomic_file
from fmg.worlds.shapes.clip import WEIGHTS, ShapesClipNetwork, load_network, word_ids
from fmg.worlds.shapes.prompts import parse_prompt, phrasings, prompt_set
from fmg.worlds.shapes.scene import Scene, place, render
from fmg.worlds.shapes.verifier import verify
from pretraining.folder import load_model, sample_images
from pretraining.optim import cosine
from pretraining.shapes import random_scene

BASE = "meanflow-shapes"


@dataclass(frozen=True)
class ScorerSettings:
    """The numbers of the training.

    Attributes:
        steps, batch: optimizer steps, and images of each; as many prompts.
        lr: peak rate of AdamW under a half cosine.
        hard_share: share of scenes with two or three objects.
        stray_share: share of images with one more object than their scene, and of blank ones, which match no prompt.
        noise: largest std of the noise on an image; half of the images are noisy, and half are blurred.
        evaluation_images: images of each figure on the card.
    """

    steps: int = 800
    batch: int = 128
    lr: float = 2e-3
    hard_share: float = 0.15
    stray_share: float = 0.08
    noise: float = 0.06
    evaluation_images: int = 2000


@dataclass(frozen=True)
class Agreement:
    """How a scorer agrees with the strict verifier on pairs of an image and a prompt.

    Attributes:
        auc: probability that a pair which the verifier accepts scores higher than one that it rejects.
        accuracy: share of pairs on which `match` above one half agrees with the verdict.
        accepted: share of pairs that the verifier accepts.
    """

    auc: float
    accuracy: float
    accepted: float


def train_scorer(
    settings: ScorerSettings, folder: Path, seed: int = 0, progress: Observer = ignore
) -> dict[str, Agreement]:
    """Trains the scorer from random weights and writes it with its card into `folder`.

    Returns:
        The agreement with the strict verifier, measured on the stored weights: on renders with random prompts, and on
        samples of the base with their own prompts.
    """
    torch.manual_seed(seed)
    network, rng = ShapesClipNetwork(), np.random.default_rng([seed, 7])
    optimizer = torch.optim.AdamW(network.parameters(), lr=settings.lr, betas=(0.9, 0.98), weight_decay=1e-3)
    for step in range(settings.steps):
        images, prompts, matches = _batch(settings, rng)
        logits = network.logit(network.images(images) @ network.prompts(word_ids(prompts)).T)
        # each image against every prompt: as many positives as negatives count
        weight = torch.where(matches, 0.5 / matches.sum(), 0.5 / (~matches).sum())
        loss = F.binary_cross_entropy_with_logits(logits, matches.float(), weight, reduction="sum")
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = settings.lr * cosine(step, settings.steps, warmup=50)
        optimizer.step()
        progress(StageProgress("shapes-clip", step + 1, settings.steps))
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_file(folder / WEIGHTS) as partial:
        save_file({name: tensor.half().contiguous() for name, tensor in network.state_dict().items()}, partial)
    stored = load_network(folder / WEIGHTS)
    figures = agreements(stored, settings.evaluation_images, seed + 1)
    parameters = sum(p.numel() for p in stored.parameters())
    (folder / "README.md").write_text(_card(settings, seed, parameters, figures), encoding="utf-8")
    return figures


def agreements(network: ShapesClipNetwork, count: int, seed: int) -> dict[str, Agreement]:
    """Agreement on `renders`, clean images of random scenes, and on `samples` of the base in four steps."""
    rng = np.random.default_rng([seed, 8])
    scenes = [random_scene(rng, 0.0) for _ in range(count)]
    images = render([place(scene, rng) for scene in scenes])
    # half of the prompts are right, the others those of other images
    asked = [scene if rng.random() < 0.5 else scenes[rng.integers(count)] for scene in scenes]
    prompts = [_said(scene, rng) for scene in asked]
    model = load_model(Path(fmg.__file__).parent / "assets" / BASE)
    every = [item.prompt for split in ("train", "heldout") for item in prompt_set(split)]
    drawn = [every[i] for i in rng.integers(len(every), size=count)]
    samples = sample_images(model.net, model.autoencoder, model.tokenizers, drawn, 4, seed)
    return {
        "renders": agreement(network, torch.from_numpy(images), prompts),
        "samples": agreement(network, samples, drawn),
    }


@torch.no_grad()
def agreement(network: ShapesClipNetwork, images: Float[Tensor, "b 3 32 32"], prompts: Sequence[str]) -> Agreement:
    """Agreement of the network with the strict verifier on these pairs."""
    scores = (network.images(images) * network.prompts(word_ids(prompts))).sum(-1)
    accepted = torch.from_numpy(verify(images.numpy(), [parse_prompt(p) for p in prompts]).strict) > 0
    good, bad = scores[accepted], scores[~accepted]
    below = (good[:, None] > bad[None, :]).double() + 0.5 * (good[:, None] == bad[None, :]).double()
    agree = (network.logit(scores) > 0) == accepted
    return Agreement(float(below.mean()), float(agree.double().mean()), float(accepted.double().mean()))


def _batch(
    settings: ScorerSettings, rng: np.random.Generator
) -> tuple[Float[Tensor, "b 3 32 32"], list[str], Bool[Tensor, "b b"]]:
    """Images, prompts, and which of them match: where they describe the same scene."""
    scenes = [random_scene(rng, settings.hard_share) for _ in range(settings.batch)]
    pictures = [place(scene, rng) for scene in scenes]
    clean = np.ones(settings.batch, dtype=bool)
    for row in range(settings.batch):
        draw = rng.random()
        if draw < settings.stray_share:
            pictures[row] = (*pictures[row], *place(random_scene(rng, 0.0), rng))
            clean[row] = False
        elif draw < 2 * settings.stray_share:
            pictures[row] = ()
            clean[row] = False
    images = torch.from_numpy(render(pictures))
    images = _degraded(images, settings.noise, rng)
    matches = [[a == b and whole for b in scenes] for a, whole in zip(scenes, clean.tolist(), strict=True)]
    return images, [_said(scene, rng) for scene in scenes], torch.tensor(matches)


def _degraded(images: Float[Tensor, "b 3 32 32"], noise: float, rng: np.random.Generator) -> Float[Tensor, "b 3 32 32"]:
    """Half of the images blurred and noisy, since those of a model are never as clean as renders."""
    count = len(images)

    def chosen(low: float, high: float) -> Tensor:
        values = rng.uniform(low, high, size=(count, 1, 1, 1)) * (rng.random((count, 1, 1, 1)) < 0.5)
        return torch.from_numpy(values).float()

    blurred = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    grain = torch.from_numpy(rng.standard_normal(images.shape, dtype=np.float32))
    return (torch.lerp(images, blurred, chosen(0.0, 0.7)) + chosen(0.0, noise) * grain).clamp(0, 1)


def _said(scene: Scene, rng: np.random.Generator) -> str:
    options = phrasings(scene)
    return options[rng.integers(len(options))]


def _card(settings: ScorerSettings, seed: int, parameters: int, figures: dict[str, Agreement]) -> str:
    rows = "\n".join(f"| {name} | {a.accepted:.3f} | {a.auc:.4f} | {a.accuracy:.3f} |" for name, a in figures.items())
    return _CARD.format(
        parameters=parameters / 1e6,
        seed=seed,
        steps=settings.steps,
        batch=settings.batch,
        hard=settings.hard_share,
        stray=settings.stray_share,
        images=settings.evaluation_images,
        table=rows,
    )


_CARD = """---
license: apache-2.0
---
# shapes-clip

A small CLIP of the shapes world: the cosine of an image (32 x 32) and a prompt, differentiable in the image. It is the
reward `shapes-clip`. Like published CLIPs, and unlike the verifier, it is a trained network that an optimiser can
exploit.

{parameters:.2f} million parameters, stored in fp16: four convolutions for the image; word embeddings and two layers for
the prompt. Every operation is smooth.

Training: `fmg pretrain shapes-clip --seed {seed}` trains it from random weights on a CPU in about two minutes:
{steps} steps with {batch} renders and as many prompts, each image against every prompt (SigLIP's loss, arXiv
2303.15343); a pair matches if both describe the same scene. A share of {hard} of the scenes has two or three objects.
A share of {stray} of the images has a stray object, and the same share is blank; they match no prompt. Half of the
images are blurred and half are noisy. It has never seen a sample of a model or a verdict of the verifier.

## Figures

Agreement with the strict verifier on {images} images each: of renders of one object with right and wrong prompts, and
of samples of `meanflow-shapes` in four steps with their own prompts. `accuracy` is that of a match above one half.

| images | accepted | AUC | accuracy |
|---|---|---|---|
{table}

Licence: Apache-2.0. Training data: generated procedurally by this project.
"""
