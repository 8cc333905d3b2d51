from __future__ import annotations

import subprocess
import sys

import pytest

from fmg.core.errors import UsageError
from fmg.core.specs import Requirements
from fmg.registry import StochasticizerConfig, stochasticizers

DEFAULTS: dict[str, dict[str, object]] = {
    "asfmc": {"gap": None, "ratio": None, "noise_share": None, "hold": None},
    "asfmc-endpoint": {"noise_level": 1.0},
    "asfmc-euler": {"epsilon": 0.03, "strength": 0.7, "detach_velocity": False, "floor": None, "truncate": False},
    "flow-sde": {"noise_level": 0.7},
    "dance-sde": {"noise_level": 0.3},
    "cps": {"noise_level": 0.8, "published_log_prob": False},
    "naive-noise": {"noise_level": 0.7},
}


@pytest.mark.parametrize("name", DEFAULTS)
def test_options_and_defaults(name: str) -> None:
    fields = stochasticizers.describe(name).fields
    assert {field.name: field.default for field in fields} == DEFAULTS[name]
    assert all(field.doc.endswith(".") for field in fields)


@pytest.mark.parametrize(
    ("name", "options", "complaint"),
    [
        ("asfmc", {"gap": 0.1, "ratio": 0.5}, "give only one of gap, ratio, noise_share and hold, not gap and ratio"),
        ("asfmc", {"gap": 0.1, "noise_share": 0.0}, "not gap and noise_share"),
        ("asfmc", {"gap": 1e-5}, "greater than or equal to 0.0001"),
        ("asfmc", {"ratio": 0.99999}, "less than or equal to 0.9999"),
        ("asfmc", {"noise_share": 0.99999}, "less than or equal to 0.9999"),
        ("asfmc", {"noise_share": -0.1}, "greater than or equal to 0"),
        ("asfmc", {"gapp": 0.1}, "Did you mean 'gap'"),
        ("asfmc", {"gap": "wide"}, "option 'gap'"),
        ("asfmc", {"gap": float("nan")}, "option 'gap'"),
        ("asfmc-endpoint", {"noise_level": 1.5}, "less than or equal to 1"),
        ("asfmc-endpoint", {"noise_level": 1e-9}, "greater than or equal to 0.001"),
        ("asfmc-euler", {"epsilon": 1.0}, "less than 1"),
        ("asfmc-euler", {"epsilon": 1e-9}, "greater than or equal to 0.0001"),
        ("asfmc-euler", {"strength": 0.0}, "greater than or equal to 0.01"),
        ("flow-sde", {"noise_level": -0.7}, "greater than or equal to 0.001"),
        ("dance-sde", {"noise_level": 1e9}, "less than or equal to 10"),
        ("dance-sde", {"eta": 0.3}, "no option 'eta'"),
        ("cps", {"noise_level": 1.1}, "less than or equal to 1"),
        ("naive-noise", {"noise_level": 0}, "greater than or equal to 0.001"),
        ("asfcm", {}, "Did you mean 'asfmc'"),
    ],
)
def test_wrong_options_are_usage_errors(name: str, options: dict[str, object], complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint):
        stochasticizers.build(name, options)


@pytest.mark.parametrize(
    ("name", "anchors", "path", "calls", "min_target_time"),
    [
        ("asfmc", "any", "any", 1, 0.0),
        ("asfmc-endpoint", "endpoint", "any", 1, 0.0),
        ("asfmc-euler", "any", "linear", 2, 0.03),
        ("flow-sde", "any", "linear", 1, 0.0),
        ("dance-sde", "any", "linear", 1, 0.0),
        ("cps", "any", "linear", 1, 0.0),
        ("naive-noise", "any", "linear", 1, 0.0),
    ],
)
def test_requirements(name: str, anchors: str, path: str, calls: int, min_target_time: float) -> None:
    config = stochasticizers.config(name)
    assert isinstance(config, StochasticizerConfig)
    assert config.requires() == Requirements(anchors, path, calls, min_target_time)  # type: ignore[arg-type]


def test_describing_and_validating_imports_no_torch() -> None:
    program = (
        "import sys; from fmg.registry import stochasticizers as s\n"
        "[(s.describe(n), s.config(n).requires()) for n in s.names()]\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
