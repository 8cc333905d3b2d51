"""The numpy sampler of artifacts against its torch counterparts."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from numpy.typing import NDArray
from torch import Tensor

from fmg.core.errors import UsageError
from fmg.core.types import Conditioning
from fmg.flow import SingleTimeMap, TrigFlowMap, TwoTimeMap, path_by_name
from fmg.flow.grids import make_grid
from fmg.flow.sampling import native_sample
from fmg.inference.artifact.backend import few_step, kernel_from_data
from fmg.models.flux.latents import image_ids, pack, unpack

SHAPE = (4, 6, 8)
ROWS = 3


def noise(seed: int) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal((ROWS, *SHAPE), np.float32)


def two_time(x: Tensor, t: Tensor, s: Tensor, cond: Conditioning) -> Tensor:
    return torch.sin(3 * x + t[:, None, None, None]) * (1 + s[:, None, None, None])


def single_time(x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
    return torch.sin(3 * x + t[:, None, None, None])


@pytest.mark.parametrize("path", ["linear", "trig"])
@pytest.mark.parametrize("kind", ["two-time", "single-time"])
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_it_equals_the_torch_sampler(kind: str, path: str, steps: int) -> None:
    grid = make_grid("scm", steps)
    single = kind == "single-time"
    # the map that `fmg.models.common.network.map_of` makes of a network
    one = TrigFlowMap(single_time) if path == "trig" else SingleTimeMap(single_time, path_by_name(path))
    flow_map = one if single else TwoTimeMap(two_time, path_by_name(path))
    expected = native_sample(
        flow_map,
        Conditioning(("",) * ROWS, {}),
        torch.from_numpy(noise(0)),
        grid,
        lambda k: torch.from_numpy(noise(k + 1)),
    )

    def velocity(x: NDArray[np.float32], t: float, s: float) -> NDArray[np.float32]:
        assert x.dtype == np.float32
        time, target = (torch.full((ROWS,), value) for value in (t, s))
        state, cond = torch.from_numpy(x), Conditioning((), {})
        return (single_time(state, time, cond) if single else two_time(state, time, target, cond)).numpy()

    drawn = few_step(
        velocity, noise(0), grid, lambda k: noise(k + 1), kind="single-time" if single else "two-time", path=path
    )
    assert drawn.dtype == np.float32
    np.testing.assert_allclose(drawn, expected.numpy(), rtol=0, atol=2e-6)


@pytest.mark.parametrize("path", ["linear", "trig"])
def test_the_forward_kernel_from_data(path: str) -> None:
    for s in np.linspace(1e-3, 1 - 1e-3, 50, dtype=np.float32):
        scale, std = path_by_name(path).kernel(torch.zeros(1), torch.tensor([s]))
        assert kernel_from_data(path, float(s)) == pytest.approx((scale.item(), std.item()), abs=2e-7)


def test_an_unknown_path() -> None:
    with pytest.raises(UsageError, match="'cosine'"):
        kernel_from_data("cosine", 0.5)


@pytest.mark.parametrize(("height", "width"), [(2, 2), (6, 4), (4, 10)])
def test_tokens_are_laid_out_as_in_flux(height: int, width: int) -> None:
    latents = np.random.default_rng(0).standard_normal((2, 5, height, width), np.float32)
    tokens = pack(latents)
    torch_latents = torch.from_numpy(latents)
    # the same function serves an engine, whose arrays are torch tensors
    expected = FluxPipeline._pack_latents(torch_latents, 2, 5, height, width)
    assert torch.equal(pack(torch_latents), expected)
    np.testing.assert_array_equal(tokens, expected.numpy())
    np.testing.assert_array_equal(unpack(tokens, height, width), latents)
    assert torch.equal(unpack(pack(torch_latents), height, width), torch_latents)
    ids = FluxPipeline._prepare_latent_image_ids(1, height // 2, width // 2, torch.device("cpu"), torch.float32)
    np.testing.assert_array_equal(image_ids(height, width), ids.numpy())


def test_grid_times_are_rounded_before_they_are_subtracted() -> None:
    seen: list[tuple[float, float]] = []

    def velocity(x: NDArray[np.float32], t: float, s: float) -> NDArray[np.float32]:
        seen.append((t, s))
        return x

    grid = make_grid("scm", 3)
    few_step(velocity, noise(0), grid, noise, kind="two-time", path="linear")
    assert seen == [(float(np.float32(t)), float(np.float32(s))) for t, s in pairwise(grid)]
