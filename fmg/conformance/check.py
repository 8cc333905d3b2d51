"""Checks a component by the rules of its kind."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from fmg.conformance import inputs, rewards, stochasticizers, training
from fmg.conformance.component_under_test import ComponentUnderTest, find_component
from fmg.conformance.rules import COMMON_RULES, Finding, examine
from fmg.core.errors import UsageError

KITS: Mapping[str, Callable[[ComponentUnderTest], list[Finding]]] = {
    "reward": lambda c: examine(rewards.RULES, rewards.RewardCase(c)),
    "stochasticizer": lambda c: examine(stochasticizers.RULES, stochasticizers.StochasticizerCase(c)),
    "objective": lambda c: examine(training.OBJECTIVE_RULES, training.ObjectiveCase(c)),
    "optimizer": lambda c: examine(training.OPTIMIZER_RULES, training.OptimizerCase(c)),
    "prompt-set": lambda c: examine(inputs.PROMPT_RULES, inputs.PromptsCase(c)),
    "feature-extractor": lambda c: examine(inputs.FEATURE_RULES, inputs.FeaturesCase(c)),
    "model": lambda c: examine(inputs.MODEL_RULES, inputs.ModelCase(c)),
}
"""Checks a component of a kind by the rules of that kind."""


@dataclass(frozen=True)
class Report:
    """The outcome of every rule for one component."""

    kind: str
    name: str
    factory: str
    findings: tuple[Finding, ...]

    @property
    def violations(self) -> tuple[Finding, ...]:
        return tuple(finding for finding in self.findings if finding.outcome == "violated")


def check_component(target: str, name: str | None = None, options: Mapping[str, object] | None = None) -> Report:
    """Checks one component by every rule, even after one is broken.

    Args:
        target: `module:attribute` of a registered factory, or of a function as a reward; or a kind.
        name: a registered name of that kind.
        options: options of the component; the others take their defaults.

    Raises:
        UsageError: unknown target, name or option, a missing option, or a kind without a kit.
    """
    component = find_component(target, name, options or {})
    if component.kind not in KITS:
        raise UsageError(f"There are no rules for a {component.kind}", f"Kinds with rules: {', '.join(sorted(KITS))}.")
    findings = [*examine(COMMON_RULES, component), *KITS[component.kind](component)]
    return Report(component.kind, component.name, component.row.factory, tuple(findings))


def assert_conforms(target: str, name: str | None = None, options: Mapping[str, object] | None = None) -> None:
    """For tests: as `check_component`.

    Raises:
        AssertionError: naming every rule that is broken.
    """
    report = check_component(target, name, options)
    lines = "".join(f"\n  {finding.rule}: {finding.text}" for finding in report.violations)
    assert not report.violations, f"{report.kind} '{report.name}' breaks the contract of its kind:{lines}"
