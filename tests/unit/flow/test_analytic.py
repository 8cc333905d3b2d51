from __future__ import annotations

import pytest
import torch

from fmg.core.protocols import FlowMap
from fmg.flow import GaussianMap, LinearPath
from tests.support.analytic import gaussian_map, mixture_map


def test_covariances_have_to_be_positive_definite() -> None:
    with pytest.raises(ValueError, match="positive definite"):
        GaussianMap(torch.zeros(2), torch.tensor([[1.0, 2.0], [2.0, 1.0]]), LinearPath())


def test_mixture_samples_have_the_moments_of_the_mixture() -> None:
    mixture, count = mixture_map(LinearPath()), 40_000
    x = mixture.draw(count, torch.Generator().manual_seed(2))
    mean = mixture.weights @ mixture.means
    centred = mixture.means - mean
    covariance = (centred * mixture.weights[:, None]).T @ centred
    covariance = covariance + (mixture.weights @ mixture.stds**2) * torch.eye(2)
    errors = (x.mean(0) - mean).abs() / (covariance.diagonal() / count).sqrt()
    assert float(errors.max()) < 4
    torch.testing.assert_close(x.T.cov(), covariance, rtol=0.03, atol=0.03)


def test_exact_maps_are_flow_maps() -> None:
    for flow_map in (gaussian_map(LinearPath()), mixture_map(LinearPath())):
        assert isinstance(flow_map, FlowMap)
        assert flow_map.anchors == "any"
