from __future__ import annotations

import pytest
import torch

from fmg.core.errors import UsageError
from fmg.flow import AffinePath, expand, path_by_name
from tests.support.analytic import PATHS


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.name)
class TestTimes:
    @pytest.mark.parametrize(
        ("t", "complaint"),
        [
            (torch.tensor(0.5), r"shaped \(b,\)"),
            (torch.full((2, 1), 0.5), r"shaped \(b,\)"),
            (torch.tensor([0, 1]), "int64"),
            (0.5, "0.5"),
            (torch.tensor([0.2, 1.001]), "1.001"),
            (torch.tensor([-0.001, 0.5]), "-0.001"),
            (torch.tensor([0.5, float("nan")]), "nan"),
        ],
    )
    def test_malformed_times_are_refused(self, path: AffinePath, t: torch.Tensor, complaint: str) -> None:
        with pytest.raises(ValueError, match=complaint):
            path.alpha(t)

    def test_kernel_runs_from_data_to_noise(self, path: AffinePath) -> None:
        with pytest.raises(ValueError, match="a <= s"):
            path.kernel(torch.tensor([0.5, 0.7]), torch.tensor([0.6, 0.6]))
        with pytest.raises(ValueError, match="the same shape"):
            path.kernel(torch.tensor([0.5]), torch.tensor([0.6, 0.6]))

    @pytest.mark.parametrize(
        ("given", "kept"),
        [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
    )
    def test_precision_never_drops_below_fp32(self, path: AffinePath, given: torch.dtype, kept: torch.dtype) -> None:
        a, s = torch.tensor([0.25], dtype=given), torch.tensor([0.5], dtype=given)
        results = (path.alpha(s), path.sigma(s), *path.rates(s), *path.kernel(a, s), path.noise_share(a, s))
        assert {result.dtype for result in results} == {kept}

    def test_full_noise_forgets_everything(self, path: AffinePath) -> None:
        scale, std = path.kernel(torch.tensor([0.0, 0.4, 0.9]), torch.ones(3))
        assert scale.tolist() == [0.0] * 3
        torch.testing.assert_close(std, torch.ones(3))


def test_expand_refuses_what_would_broadcast_wrongly() -> None:
    x = torch.zeros(4, 4, 2)
    assert expand(torch.arange(4.0), x).shape == (4, 1, 1)
    for value in (torch.tensor(1.0), torch.ones(1), torch.ones(2), torch.ones(4, 1)):
        with pytest.raises(ValueError, match="one value for each"):
            expand(value, x)


def test_paths_by_name() -> None:
    assert [path_by_name(path.name) for path in PATHS] == list(PATHS)
    with pytest.raises(UsageError, match="Did you mean 'linear'"):
        path_by_name("linaer")


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.name)
def test_an_anchor_never_passes_its_target(path: AffinePath) -> None:
    s = torch.linspace(0.001, 0.999, 2000)
    for share in (1.0, 1 - 2**-24, 0.9999):
        anchor = path.anchor(torch.full_like(s, share), s)
        assert bool((anchor <= s).all())
        path.kernel(anchor, s)
