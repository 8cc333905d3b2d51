"""Rules that every component keeps: its row in the list, and its options. Imports no torch."""

from __future__ import annotations

import json
import subprocess
import sys

from pydantic import ValidationError

from fmg.conformance.rules import NotApplicable, Rule, Violation, require
from fmg.conformance.subject import Subject

_UNKNOWN = "no_such_option_of_any_component"


def _summary(subject: Subject) -> None:
    summary = subject.row.summary.strip()
    require(bool(summary), "It has no summary: give `summary`, or a docstring whose first line says what it is.")
    require("\n" not in summary, "Its summary has several lines; `fmg list` shows one.")


def _licence(subject: Subject) -> None:
    if subject.built_in:
        raise NotApplicable("It is part of fmg, under fmg's licence.")
    text = 'State it in the config: about: ClassVar[About] = About(licence="MIT").'
    require(bool(type(subject.config).about.licence.strip()), f"It states no licence. {text}")


def _options(subject: Subject) -> None:
    silent = [name for name, field in type(subject.config).model_fields.items() if not field.description]
    require(not silent, f"Options without a description: {', '.join(silent)}. Say what each means, in Field(...).")


def _round_trip(subject: Subject) -> None:
    cls, plain = type(subject.config), subject.config.model_dump(mode="json")
    again = cls.model_validate(json.loads(json.dumps(plain, allow_nan=False)))
    require(
        again == subject.config,
        "Its options are not what they were after a recipe has stored them: use fields of plain types, and equality.",
    )


def _strict(subject: Subject) -> None:
    cls, plain = type(subject.config), subject.config.model_dump(mode="json")
    try:
        cls.model_validate({**plain, _UNKNOWN: 1})
    except ValidationError:
        pass
    else:
        raise Violation('It accepts unknown options: keep extra="forbid", or a typing mistake is silently ignored.')
    require(bool(cls.model_config.get("frozen")), "Its options can be changed after validation: keep frozen=True.")


def _light(subject: Subject) -> None:
    module = subject.row.config.partition(":")[0]
    if module == subject.row.factory.partition(":")[0]:
        raise NotApplicable("Config and factory share a module. Put the config into one without torch before sharing.")
    paths = [entry for entry in sys.path if entry]
    program = (
        f"import sys, importlib; sys.path[:0] = {paths!r}; importlib.import_module({module!r}); "
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    require(done.returncode == 0, f"The module of its config, {module}, imports torch, which slows every command down.")


RULES: tuple[Rule[Subject], ...] = (
    Rule("summary", _summary),
    Rule("licence", _licence),
    Rule("options are described", _options),
    Rule("options survive a recipe", _round_trip),
    Rule("options are strict", _strict),
    Rule("config imports no torch", _light),
)
