from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import CLIPTokenizer, T5Tokenizer

from fmg.training.update import Ema
from fmg.worlds.shapes.prompts import SPLITS, parse_prompt, prompt_set, vocabulary
from fmg.worlds.shapes.scene import ANCHORS
from pretraining.distill import Trajectories, draw_pairs, random_times, solve_trajectories
from pretraining.flow import build_transformer, flow_times
from pretraining.networks import PromptTable, Tokenizers, build_tokenizers
from pretraining.optim import Fp32Muon, HybridOptimizer, cosine, load_average, orthogonalised
from pretraining.settings import TextSettings, TrajectorySettings, TransformerSettings
from pretraining.shapes import ShapesWorld, captioned_pictures


def test_every_word_is_one_token_and_the_tokenizers_survive_saving(tmp_path: Path) -> None:
    tokenizers = build_tokenizers(ShapesWorld(), TextSettings())
    for word in vocabulary():
        assert len(tokenizers.clip(word, add_special_tokens=False).input_ids) == 1
        assert len(tokenizers.t5(word, add_special_tokens=False).input_ids) == 1
    tokenizers.clip.save_pretrained(tmp_path / "clip")
    tokenizers.t5.save_pretrained(tmp_path / "t5")
    loaded = Tokenizers(CLIPTokenizer.from_pretrained(tmp_path / "clip"), T5Tokenizer.from_pretrained(tmp_path / "t5"))
    prompts = [item.prompt for split in SPLITS for item in prompt_set(split)]
    for ours, theirs in zip(tokenizers.ids(prompts), loaded.ids(prompts), strict=True):
        assert torch.equal(ours, theirs)
        assert len(ours.unique(dim=0)) == len(prompts)


def test_captions_keep_the_kind_and_err_in_colour_and_position_as_often_as_asked() -> None:
    pictures = captioned_pictures(4000, np.random.default_rng(0), hard_share=0.0, wrong_share=0.55)
    said = [parse_prompt(picture.caption).include[0] for picture in pictures]
    drawn = [picture.objects[0] for picture in pictures]
    assert all(clause.kind == shape.kind for clause, shape in zip(said, drawn, strict=True))
    expected = 0.45 + 0.55 / 5
    error = 4 * math.sqrt(expected * (1 - expected) / len(pictures))
    colors = np.mean([clause.color == shape.color for clause, shape in zip(said, drawn, strict=True)])
    placed = np.mean(
        [
            math.dist(ANCHORS[clause.position], (shape.x, shape.y)) < 2
            for clause, shape in zip(said, drawn, strict=True)
            if clause.position is not None
        ]
    )
    assert abs(colors - expected) < error
    assert abs(placed - expected) < error


def test_times_of_a_trajectory_fall_through_every_quarter() -> None:
    for seed in range(20):
        times = random_times(3, torch.Generator().manual_seed(seed))
        assert len(times) == 13
        assert times[::3] == [1.0, 0.75, 0.5, 0.25, 0.0]
        assert all(later < earlier for earlier, later in pairwise(times))


class ExponentialTeacher(nn.Module):
    """dx/dt = x, so x(t) = exp(t - 1) x(1)."""

    def encode(self, table: PromptTable, index: Tensor) -> None:
        return None

    def noise(self, count: int, generator: torch.Generator) -> Tensor:
        return torch.randn(count, 16, 16, generator=generator)

    def forward(self, x: Tensor, t: Tensor, s: None, condition: None) -> Tensor:
        return x


@pytest.fixture(scope="module")
def bank() -> Trajectories:
    settings = TrajectorySettings(count=64, batch=16)
    table = PromptTable(("a",), torch.zeros(1, 1, dtype=torch.long), torch.zeros(1, 1, dtype=torch.long))
    return solve_trajectories(ExponentialTeacher(), table, torch.zeros(8, dtype=torch.long), settings, 0, _ignore)


def _ignore(done: int, total: int) -> None:
    pass


def test_trajectories_follow_the_ode(bank: Trajectories) -> None:
    exact = bank.states[:, :1].float() * torch.exp(bank.times - 1)[:, :, None, None]
    torch.testing.assert_close(bank.states.float(), exact, rtol=3e-3, atol=3e-3)


@pytest.mark.parametrize("endpoint_only", [False, True])
def test_pairs_are_exact_evaluations_of_the_flow_map(bank: Trajectories, endpoint_only: bool) -> None:
    pairs = draw_pairs(bank, 512, torch.Generator().manual_seed(0), endpoint_only)
    assert (pairs.s <= pairs.t).all()
    assert (pairs.t > 0).all()
    if endpoint_only:
        assert (pairs.s == 0).all()
    else:
        stayed, ended = (pairs.s == pairs.t).float().mean(), (pairs.s == 0).float().mean()
        assert 0.08 < stayed < 0.25
        assert 0.35 < ended < 0.7
    duration = (pairs.t - pairs.s)[:, None, None]
    ratio = torch.where(duration > 0, (1 - torch.exp(-duration)) / duration.clamp(min=1e-6), torch.ones(()))
    torch.testing.assert_close(pairs.velocity, ratio * pairs.x, rtol=0.05, atol=0.05)


def test_flow_times_are_inside_the_interval_and_centred() -> None:
    times = flow_times(4096, torch.Generator().manual_seed(0))
    assert 0 < times.min() < times.max() < 1
    assert times.mean().item() == pytest.approx(0.5, abs=0.01)
    assert times.std().item() < 0.26


def test_a_fresh_transformer_predicts_zero_and_ignores_the_second_time() -> None:
    model = build_transformer(TransformerSettings(), TextSettings(), 16, "duration")
    assert sum(p.numel() for p in model.parameters()) < 1.8e6
    assert not model.proj_out.weight.any()
    assert not model.timestep_embedder2.linear_2.weight.any()


def test_block_matrices_go_to_muon_and_the_rest_to_adamw() -> None:
    model = build_transformer(TransformerSettings(), TextSettings(), 16, "none")
    optimizer = HybridOptimizer([model], 1e-3, 1e-2, steps=10)
    adamw, muon = (o.param_groups[0]["params"] for o, _ in optimizer.optimizers)
    block = model.single_transformer_blocks[0]
    assert any(p is block.attn.to_q.weight for p in muon)
    assert any(p is block.norm.linear.weight for p in adamw)
    assert len(adamw) + len(muon) == len(list(model.parameters()))


def test_fp32_muon_takes_the_steps_of_torch_muon() -> None:
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=generator) for shape in ((8, 24), (8, 24), (24, 8))]
    ours, theirs = ([nn.Parameter(matrix.clone()) for matrix in start] for _ in range(2))
    muons = (
        Fp32Muon(ours, lr=0.1, momentum=0.95, weight_decay=0.01),
        torch.optim.Muon(theirs, lr=0.1, momentum=0.95, weight_decay=0.01),
    )
    for _ in range(4):
        gradients = [torch.randn(matrix.shape, generator=generator) for matrix in start]
        for parameters, muon in zip((ours, theirs), muons, strict=True):
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient.clone()
            muon.step()
    for a, b, first in zip(ours, theirs, start, strict=True):
        assert (a - first).norm() > 0.5
        assert (a - b).norm() < 0.02 * (a - first).norm()


def test_orthogonalised_matrices_keep_directions_and_lose_scales() -> None:
    matrices = (
        torch.randn(3, 6, 20, generator=torch.Generator().manual_seed(0)) * torch.tensor([1e-3, 1, 1e3])[:, None, None]
    )
    values = torch.linalg.svdvals(orthogonalised(matrices))
    assert 0.6 < values.min() <= values.max() < 1.3
    u, _, vh = torch.linalg.svd(matrices, full_matrices=False)
    assert (torch.linalg.diagonal(u.mT @ orthogonalised(matrices) @ vh.mT) > 0.6).all()


def test_the_schedule_warms_up_and_falls() -> None:
    factors = [cosine(step, 100, warmup=10) for step in range(101)]
    assert factors[0] == pytest.approx(0.1)
    assert max(factors) == factors[10] == 1.0
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert factors[100] == pytest.approx(0.02)


def test_the_average_tends_to_constant_weights_and_replaces_them() -> None:
    module = nn.Linear(2, 2)
    ema = Ema(list(module.parameters()), decay=0.9)
    with torch.no_grad():
        module.weight.fill_(3.0)
    for _ in range(200):
        ema.update()
    with torch.no_grad():
        module.weight.zero_()
    load_average(module, ema)
    torch.testing.assert_close(module.weight, torch.full((2, 2), 3.0), rtol=1e-4, atol=1e-4)
