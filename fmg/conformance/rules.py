"""Rules of a kind of component, and what came of checking them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

from fmg.core.stdout_redirect import prints_aside

S = TypeVar("S")

Outcome = Literal["ok", "violated", "not checked"]


class Violation(Exception):  # noqa: N818
    """A component breaks a rule; the message says how, and what is asked."""


class NotApplicable(Exception):  # noqa: N818
    """A rule says nothing about this component; the message says why."""


@dataclass(frozen=True)
class Rule(Generic[S]):
    """One clause of the contract of a kind: a short name, and a check that raises `Violation` or `NotApplicable`."""

    name: str
    check: Callable[[S], None]


@dataclass(frozen=True)
class Finding:
    """What came of one rule. `text` is empty when it holds."""

    rule: str
    outcome: Outcome
    text: str = ""


def examine(rules: Sequence[Rule[S]], subject: S) -> list[Finding]:
    """Checks every rule, also after one is broken. An exception that a rule does not expect breaks it."""
    return [_check(rule, subject) for rule in rules]


def require(holds: bool, text: str) -> None:
    """Raises `Violation(text)` unless `holds`."""
    if not holds:
        raise Violation(text)


def _check(rule: Rule[S], subject: S) -> Finding:
    try:
        with prints_aside():
            rule.check(subject)
    except NotApplicable as reason:
        return Finding(rule.name, "not checked", str(reason))
    except Violation as violation:
        return Finding(rule.name, "violated", str(violation))
    except Exception as error:
        message = " ".join(f"{type(error).__name__}: {error}".split())
        return Finding(rule.name, "violated", f"It raised {message}")
    return Finding(rule.name, "ok")
