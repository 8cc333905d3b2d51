"""The commands of the command line, with the arguments and options of each.

`python -m tests.support.commands` prints them; `tests/meta/test_commands.py` compares them with an earlier revision's.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import typer

from fmg.cli.main import app

Commands = dict[str, dict[str, dict[str, Any]]]


def commands() -> Commands:
    """The parameters of each command by Python name: what a user may write, its kind and its help."""
    return dict(_walked(typer.main.get_command(app), "fmg"))


def _walked(command: Any, path: str) -> list[tuple[str, dict[str, dict[str, Any]]]]:
    found = [(path, {parameter.name: _described(parameter) for parameter in command.params})]
    for name, child in getattr(command, "commands", {}).items():
        found += _walked(child, f"{path} {name}")
    return found


def _described(parameter: Any) -> dict[str, Any]:
    kind = parameter.param_type_name
    return {
        "kind": kind,
        "names": [*parameter.opts, *parameter.secondary_opts] if kind == "option" else [],
        "type": str(parameter.type_descriptor.annotation),
        "flag": bool(getattr(parameter, "is_flag", False)),
        "many": bool(parameter.multiple or parameter.nargs != 1),
        "required": parameter.required,
        "default": None if parameter.default is None else str(parameter.default),
        "range": [parameter.min, parameter.max],
        "help": getattr(parameter, "help", None) or "",
    }


if __name__ == "__main__":
    json.dump(commands(), sys.stdout, indent=1)
    sys.stdout.write("\n")
