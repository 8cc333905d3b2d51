"""Both components conform to the rules of their kind."""

from __future__ import annotations

from fmg.conformance import assert_conforms


def test_the_reward() -> None:
    assert_conforms("fmg_warmth.reward:Warmth")


def test_the_stochasticizer() -> None:
    for fraction in (0.0, 0.5, 0.95):
        assert_conforms("fmg_warmth.stochasticizer:Halfway", options={"fraction": fraction})
