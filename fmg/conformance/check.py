"""Runs the kit of a component's kind."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from fmg.conformance.configs import RULES
from fmg.conformance.rules import Finding, examine
from fmg.conformance.subject import Subject, find
from fmg.core.errors import UsageError

Kit = Callable[[Subject], list[Finding]]


@dataclass(frozen=True)
class Report:
    """What came of every rule for one component."""

    kind: str
    name: str
    factory: str
    findings: tuple[Finding, ...]

    @property
    def violations(self) -> tuple[Finding, ...]:
        """The rules that it breaks."""
        return tuple(finding for finding in self.findings if finding.outcome == "violated")


def check_component(target: str, name: str | None = None, options: Mapping[str, object] | None = None) -> Report:
    """Examines one component; every rule is checked, also after one is broken.

    Args:
        target: `module:attribute` of a registered factory, or of a function as a reward; or a kind.
        name: a registered name of that kind.
        options: options of the component; the others take their defaults.

    Raises:
        UsageError: unknown target, name or option, a missing option, or a kind without a kit.
    """
    subject = find(target, name, options or {})
    kits = _kits()
    if subject.kind not in kits:
        raise UsageError(f"There are no rules for a {subject.kind}", f"Kinds with rules: {', '.join(sorted(kits))}.")
    findings = [*examine(RULES, subject), *kits[subject.kind](subject)]
    return Report(subject.kind, subject.name, subject.row.factory, tuple(findings))


def assert_conforms(target: str, name: str | None = None, options: Mapping[str, object] | None = None) -> None:
    """For tests: as `check_component`.

    Raises:
        AssertionError: naming every rule that is broken.
    """
    report = check_component(target, name, options)
    lines = "".join(f"\n  {finding.rule}: {finding.text}" for finding in report.violations)
    assert not report.violations, f"{report.kind} '{report.name}' breaks the contract of its kind:{lines}"


def _kits() -> dict[str, Kit]:
    from fmg.conformance import inputs, rewards, stochasticizers, training

    return {
        "reward": lambda s: examine(rewards.RULES, rewards.RewardCase(s)),
        "stochasticizer": lambda s: examine(stochasticizers.RULES, stochasticizers.StochasticizerCase(s)),
        "objective": lambda s: examine(training.OBJECTIVE_RULES, training.ObjectiveCase(s)),
        "optimizer": lambda s: examine(training.OPTIMIZER_RULES, training.OptimizerCase(s)),
        "prompt-set": lambda s: examine(inputs.PROMPT_RULES, inputs.PromptsCase(s)),
        "feature-extractor": lambda s: examine(inputs.FEATURE_RULES, inputs.FeaturesCase(s)),
        "model": lambda s: examine(inputs.MODEL_RULES, inputs.ModelCase(s)),
    }
