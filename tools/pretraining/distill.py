"""Stages 3 to 5: solved trajectories of a teacher, and the two maps that are regressed on them.

A flow map sends any point of an ODE trajectory to a later point of the same trajectory. The teacher is cheap here: a
trained flow, or the exact flow of a world with finitely many images. So its trajectories are solved once, and the
student sees exact targets instead of its own estimates: no bootstrapping, no Jacobian-vector products.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import torch
from diffusers import AutoencoderTiny
from jaxtyping import Float, Int
from torch import Tensor, nn

from fmg.training.update import Ema
from pretraining.flow import ConditionalNet
from pretraining.networks import PromptTable, encode
from pretraining.optim import HybridOptimizer, load_average
from pretraining.settings import DistillSettings, TrajectorySettings
from pretraining.world import Support


class ExactTeacher:
    """Probability-flow velocity of a finite data set on the linear path `x_t = (1 - t) data + t noise`.

    The velocity `E[noise - data | x_t] = (x_t - m) / t` needs only the posterior mean `m` of the data, a softmax over
    all latents of log-likelihood plus log-prior (Karras et al., 2022, eq. 57). The prior of a caption is the
    probability that an image was given this caption, so wrong captions make it spread over what they may mean.
    """

    def __init__(self, support: Support, autoencoder: AutoencoderTiny) -> None:
        self._latents = encode(autoencoder, torch.from_numpy(support.images))
        self._log_likelihood = support.log_likelihood

    def noise(self, count: int, generator: torch.Generator) -> Float[Tensor, "b tokens channels"]:
        """Standard normal latents."""
        return torch.randn(count, *self._latents.shape[1:], generator=generator)

    def encode(self, table: PromptTable, index: Int[Tensor, " b"]) -> Float[Tensor, "b n"]:
        """Log-prior of each latent given the captions, up to a constant."""
        captions = [table.prompts[row] for row in index.tolist()]
        return torch.from_numpy(np.asarray(self._log_likelihood(captions), dtype=np.float32))

    def __call__(
        self,
        x: Float[Tensor, "b tokens channels"],
        t: Float[Tensor, " b"],
        s: None,
        condition: Float[Tensor, "b n"],
    ) -> Float[Tensor, "b tokens channels"]:
        """The velocity at times `t` in (0, 1]."""
        data = self._latents.flatten(1)
        points, time = x.flatten(1), t[:, None]
        # |x - (1 - t) data|^2 without the term that all data share
        distance = (1 - time) ** 2 * data.square().sum(1) - 2 * (1 - time) * points @ data.T
        mean = torch.softmax(condition - distance / (2 * time**2), dim=1) @ data
        return ((points - mean) / time).view_as(x)


QUARTERS = 4
"""Every time grid contains 1, 3/4, 1/2, 1/4 and 0, the times of the uniform 1-, 2- and 4-step samplers."""


class Teacher(Protocol):
    """What trajectories are solved with: a trained `ConditionalNet`, or an `ExactTeacher`."""

    def noise(self, count: int, generator: torch.Generator) -> Float[Tensor, "b tokens channels"]:
        """Standard normal latents."""
        ...

    def encode(self, table: PromptTable, index: Int[Tensor, " b"]) -> Any:
        """What the velocity is conditioned on, for prompts by their row in the table."""
        ...

    def __call__(
        self, x: Float[Tensor, "b tokens channels"], t: Float[Tensor, " b"], s: None, condition: Any
    ) -> Float[Tensor, "b tokens channels"]:
        """The velocity."""
        ...


@dataclass(frozen=True)
class Trajectories:
    """States and velocities of solved trajectories; each row has its own caption, each batch its own times.

    Attributes:
        states: fp16 states at the row's times, from noise to data.
        velocities: fp16 teacher velocities at the same points (the last, at time 0, is not used).
        times: times of each row, falling from 1 to 0.
        caption: row of the caption in the prompt table.
    """

    states: Float[Tensor, "n k tokens channels"]
    velocities: Float[Tensor, "n k tokens channels"]
    times: Float[Tensor, "n k"]
    caption: Int[Tensor, " n"]


def random_times(subdivisions: int, generator: torch.Generator) -> list[float]:
    """A falling grid from 1 to 0 that contains the quarters, with `subdivisions` jittered intervals in each."""
    times: list[float] = []
    for quarter in range(QUARTERS, 0, -1):
        jitter = torch.rand(subdivisions, generator=generator)
        inner = (torch.arange(subdivisions) + 0.8 * (jitter - 0.5)) / subdivisions
        times += [(quarter - max(0.0, value) * (index > 0)) / QUARTERS for index, value in enumerate(inner.tolist())]
    return [*times, 0.0]


@torch.no_grad()
def solve_trajectories(
    teacher: Teacher,
    table: PromptTable,
    captions: Int[Tensor, " pool"],
    settings: TrajectorySettings,
    seed: int,
    progress: Callable[[int, int], None],
) -> Trajectories:
    """Solve the teacher's probability-flow ODE with the midpoint rule for captions drawn from `captions`."""
    generator = torch.Generator().manual_seed(seed + 3)
    chunks: list[Trajectories] = []
    batches = settings.count // settings.batch
    for batch in range(batches):
        caption = captions[torch.randint(len(captions), (settings.batch,), generator=generator)]
        x = teacher.noise(settings.batch, generator)
        times = random_times(settings.subdivisions, generator)
        condition = teacher.encode(table, caption)
        states, velocities = [x], []
        for t, s in pairwise(times):
            velocity = teacher(x, torch.full((len(x),), t), None, condition)
            half = x - 0.5 * (t - s) * velocity
            x = x - (t - s) * teacher(half, torch.full((len(x),), 0.5 * (t + s)), None, condition)
            states.append(x)
            velocities.append(velocity)
        velocities.append(torch.zeros_like(x))
        grid = torch.tensor(times).expand(len(x), -1)
        chunks.append(Trajectories(torch.stack(states, 1).half(), torch.stack(velocities, 1).half(), grid, caption))
        progress(batch + 1, batches)
    return Trajectories(
        torch.cat([c.states for c in chunks]),
        torch.cat([c.velocities for c in chunks]),
        torch.cat([c.times for c in chunks]),
        torch.cat([c.caption for c in chunks]),
    )


@dataclass(frozen=True)
class Pairs:
    """A batch of exact map evaluations: `x` at `t`, and the average velocity from `t` to `s`."""

    x: Float[Tensor, "b tokens channels"]
    t: Float[Tensor, " b"]
    s: Float[Tensor, " b"]
    velocity: Float[Tensor, "b tokens channels"]
    caption: Int[Tensor, " b"]


def draw_pairs(bank: Trajectories, batch: int, generator: torch.Generator, endpoint_only: bool) -> Pairs:
    """Random pairs of times on random trajectories.

    Of a two-time batch .35 go to time 0, .35 to any later time, .15 from one quarter to another, .15 stay (`s = t`,
    the teacher's velocity). With `endpoint_only` all go to time 0; half of the starts are quarters.
    """
    last = bank.times.shape[1] - 1
    quarter = last // QUARTERS
    row = torch.randint(len(bank.times), (batch,), generator=generator)
    u, v, choice = torch.rand(3, batch, generator=generator)
    start = (u * last).long()
    quarter_start = (u * QUARTERS).long() * quarter
    if endpoint_only:
        start = torch.where(choice < 0.5, quarter_start, start)
        stop = torch.full_like(start, last)
    else:
        later = start + 1 + (v * (last - start)).long().clamp(max=last - 1)
        quarter_later = quarter_start + quarter * (1 + (v * (QUARTERS - quarter_start // quarter)).long())
        stop = torch.where(choice < 0.35, last, torch.where(choice < 0.7, later, start))
        on_quarters = (choice >= 0.7) & (choice < 0.85)
        start = torch.where(on_quarters, quarter_start, start)
        stop = torch.where(on_quarters, quarter_later, stop).clamp(max=last)
    t, s = bank.times[row, start], bank.times[row, stop]
    x, y = bank.states[row, start].float(), bank.states[row, stop].float()
    duration = (t - s)[:, None, None]
    average = (x - y) / duration.clamp(min=1e-6)
    velocity = torch.where(duration > 0, average, bank.velocities[row, start].float())
    return Pairs(x, t, s, velocity, bank.caption[row])


def distill(
    student: ConditionalNet,
    table: PromptTable,
    bank: Trajectories,
    settings: DistillSettings,
    seed: int,
    progress: Callable[[int, int], None],
) -> None:
    """Regress the student on the bank; it ends with its averaged weights.

    A student that starts from its teacher keeps the text encoders as they are; one from random weights (`from_scratch`)
    trains them too.

    A single-time student (`second_time` "none") learns the consistency function, `x_0 = x_t - t net(x_t, t)` at every
    point of a trajectory (Song et al., 2023); a two-time student learns every pair of times (CTM, Kim et al., 2023;
    MeanFlow, Geng et al., 2025). The loss is pseudo-Huber on the sample's root mean square error.
    """
    single_time = student.transformer.config.second_time == "none"
    trained: nn.Module = student if settings.from_scratch else student.transformer
    generator = torch.Generator().manual_seed(seed + (5 if single_time else 4))
    optimizer = HybridOptimizer([trained], settings.lr, settings.muon_lr, settings.steps, fp32=settings.muon_fp32)
    ema = Ema(list(trained.parameters()), settings.ema)
    pooled, states = _encoded(student, table)
    for step in range(settings.steps):
        pairs = draw_pairs(bank, settings.batch, generator, endpoint_only=single_time)
        if settings.from_scratch:
            condition = student.encode(table, pairs.caption)
        else:
            condition = (pooled[pairs.caption], states[pairs.caption])
        predicted = student(pairs.x, pairs.t, None if single_time else pairs.s, condition)
        error = (predicted - pairs.velocity).square().mean((1, 2))
        optimizer.step(((error + settings.huber**2).sqrt() - settings.huber).mean())
        ema.update()
        progress(step + 1, settings.steps)
    load_average(trained, ema)


@torch.no_grad()
def _encoded(net: ConditionalNet, table: PromptTable) -> tuple[Tensor, Tensor]:
    """Pooled and token states of the whole table."""
    pooled, states = net.encode(table, torch.arange(len(table.prompts)))
    return pooled, states
