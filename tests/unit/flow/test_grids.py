from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence

import pytest

from fmg.core.errors import UsageError
from fmg.flow import grid_names, make_grid


def test_explicit_times_are_kept() -> None:
    assert make_grid([1, 0.6, 0.2, 0], 3) == (1.0, 0.6, 0.2, 0.0)


def test_last_time_is_exactly_zero_and_first_exactly_one() -> None:
    for name in grid_names():
        if name == "explicit":
            continue
        for steps in (3, 7, 28):
            grid = make_grid(name, steps, image_tokens=1024)
            assert (grid[0], grid[-1]) == (1.0, 0.0)


def test_one_step_is_one_jump() -> None:
    for name in ("uniform", "scm", "flux-shift", "flux2-shift", "shift-3"):
        assert make_grid(name, 1, image_tokens=256) == (1.0, 0.0)


@pytest.mark.parametrize(
    ("spec", "steps", "tokens", "complaint"),
    [
        ("unifrom", 4, None, "Did you mean 'uniform'"),
        ("uniform", 0, None, "at least one step"),
        ("uniform", 1001, None, "at most 1000"),
        ("flux-shift", 1000, 16384, "apart"),
        ([1, 0.5, 0.49999, 0], 3, None, "apart"),
        ("paper", 2, None, "3 steps or more"),
        ("flux-shift", 4, None, "number of image tokens"),
        ("flux2-shift", 4, None, "'flux2-shift' depends on the number of image tokens"),
        ("flux-shift", 4, 0, "number of image tokens"),
        ("explicit", 4, None, "list of times"),
        ("shift-", 4, None, "states no shift"),
        ("shift-0", 4, None, "states no shift"),
        ("shift-1e3", 4, None, "states no shift"),
        ("shift--3", 4, None, "states no shift"),
        ("shift-nan", 4, None, "states no shift"),
        ("shift-101", 4, None, "up to 100"),
        ("shift3", 4, None, "Did you mean 'shift-3'"),
        ([1, 0.5, 0], 4, None, "5 times, got 3"),
        ([1, 0.5, 0.5, 0], 3, None, "decrease strictly"),
        ([0.9, 0.5, 0], 2, None, "decrease strictly"),
        ([1, 0.5, 0.1], 2, None, "decrease strictly"),
        ([1, float("nan"), 0], 2, None, "decrease strictly"),
    ],
)
def test_impossible_grids_are_usage_errors(
    spec: str | Sequence[float], steps: int, tokens: int | None, complaint: str
) -> None:
    with pytest.raises(UsageError, match=complaint):
        make_grid(spec, steps, image_tokens=tokens)


def test_a_shift_of_one_is_the_uniform_grid() -> None:
    assert make_grid("shift-1", 7) == pytest.approx(make_grid("uniform", 7), abs=1e-15)
    assert make_grid("shift-1.5", 2)[1] == pytest.approx(0.6)


def test_grids_are_known_without_torch() -> None:
    program = "import sys; from fmg.flow import make_grid; make_grid('paper', 5); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_unknown_names_of_the_package_are_attribute_errors() -> None:
    import fmg.flow

    with pytest.raises(AttributeError, match="no_such_name"):
        _ = fmg.flow.no_such_name
    assert all(hasattr(fmg.flow, name) for name in fmg.flow.__all__)
