"""Rules and their outcomes, and the rules that every component follows: its row in the list and its options."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

from pydantic import ValidationError

from fmg.conformance.component_under_test import ComponentUnderTest
from fmg.core.errors import one_line
from fmg.core.stdout_redirect import prints_aside

S = TypeVar("S")
_UNKNOWN = "no_such_option_of_any_component"

Outcome = Literal["ok", "violated", "not checked"]


class Violation(Exception):  # noqa: N818
    """A component breaks a rule; the message says how, and what is required."""


class NotApplicable(Exception):  # noqa: N818
    """A rule does not apply to this component; the message says why."""


@dataclass(frozen=True)
class Rule(Generic[S]):
    """One clause of the contract of a kind: a short name, and a check that raises `Violation` or `NotApplicable`."""

    name: str
    check: Callable[[S], None]


@dataclass(frozen=True)
class Finding:
    """The outcome of one rule. `text` is empty when the rule passes."""

    rule: str
    outcome: Outcome
    text: str = ""


def examine(rules: Sequence[Rule[S]], case: S) -> list[Finding]:
    """Checks every rule, even after one is broken. An exception that a rule does not expect breaks it."""
    return [_check(rule, case) for rule in rules]


def require(holds: bool, text: str) -> None:
    """Raises `Violation(text)` unless `holds`."""
    if not holds:
        raise Violation(text)


def _check(rule: Rule[S], case: S) -> Finding:
    try:
        with prints_aside():
            rule.check(case)
    except NotApplicable as reason:
        return Finding(rule.name, "not checked", str(reason))
    except Violation as violation:
        return Finding(rule.name, "violated", str(violation))
    except Exception as error:
        return Finding(rule.name, "violated", f"The component raised {one_line(error)}")
    return Finding(rule.name, "ok")


def _summary(component: ComponentUnderTest) -> None:
    summary = component.row.summary.strip()
    require(
        bool(summary),
        "There is no summary: set `summary`, or write a docstring whose first line says what the component is.",
    )
    require("\n" not in summary, "The summary has several lines; `fmg list` shows one.")


def _licence(component: ComponentUnderTest) -> None:
    if component.built_in:
        raise NotApplicable("The component is part of fmg, under fmg's licence.")
    text = 'Add it to the config: about: ClassVar[About] = About(licence="MIT").'
    require(bool(type(component.config).about.licence.strip()), f"The config states no licence. {text}")


def _options(component: ComponentUnderTest) -> None:
    silent = [name for name, field in type(component.config).model_fields.items() if not field.description]
    require(not silent, f"Options without a description: {', '.join(silent)}. Say what each means, in Field(...).")


def _round_trip(component: ComponentUnderTest) -> None:
    cls, plain = type(component.config), component.config.model_dump(mode="json")
    again = cls.model_validate(json.loads(json.dumps(plain, allow_nan=False)))
    require(
        again == component.config,
        "The options change when a recipe stores them and is read back: use fields of plain types, and equality.",
    )


def _strict(component: ComponentUnderTest) -> None:
    cls, plain = type(component.config), component.config.model_dump(mode="json")
    try:
        cls.model_validate({**plain, _UNKNOWN: 1})
    except ValidationError:
        pass
    else:
        raise Violation('Unknown options are accepted: keep extra="forbid", or a mistyped name is silently ignored.')
    require(bool(cls.model_config.get("frozen")), "Options can be changed after validation: keep frozen=True.")


def _light(component: ComponentUnderTest) -> None:
    module = component.row.config.partition(":")[0]
    if module == component.row.factory.partition(":")[0]:
        raise NotApplicable("Config and factory share a module. Put the config into one without torch before sharing.")
    paths = [entry for entry in sys.path if entry]
    program = (
        f"import sys, importlib; sys.path[:0] = {paths!r}; importlib.import_module({module!r}); "
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    require(done.returncode == 0, f"The module of its config, {module}, imports torch, which slows down every command.")


COMMON_RULES: tuple[Rule[ComponentUnderTest], ...] = (
    Rule("summary", _summary),
    Rule("licence", _licence),
    Rule("options are described", _options),
    Rule("options survive a recipe", _round_trip),
    Rule("options are strict", _strict),
    Rule("config imports no torch", _light),
)
