"""The conformance kit: does a component follow the contract of its kind?

For the command line `fmg check-component`, and in a test of your own package:

    from fmg.conformance import assert_conforms

    def test_my_reward() -> None:
        assert_conforms("my_package.rewards:MyReward")
"""

from __future__ import annotations

from fmg.conformance.check import Report, assert_conforms, check_component
from fmg.conformance.rules import Finding

__all__ = ["Finding", "Report", "assert_conforms", "check_component"]
