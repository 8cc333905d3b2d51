"""`fmg check-component`: does a component keep the contract of its kind?"""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from fmg.cli.console import print_json, stdout
from fmg.cli.options import AsJson, given_text
from fmg.cli.reward_options import reward_options
from fmg.cli.tables import table


def check_component(
    target: Annotated[str, typer.Argument(metavar="PATH|KIND", help="my_pkg:MyReward, or a kind.", show_default=False)],
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="A name that `fmg list KIND` prints.", show_default=False)
    ] = None,
    sets: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="OPTION=VALUE", help="Option of the component.", show_default=False),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Examine a component by the rules of its kind: a reward, a stochasticizer, an objective, ...

    Exit code 1 when a rule is broken. The module that is named is imported, which runs its code.
    """
    given_text(target, "PATH")
    options = reward_options([f"options.{text}" for text in sets or ()]).get("options", {})

    from fmg.conformance import check_component as check

    report = check(target, name, options)
    if as_json:
        print_json(asdict(report))
    else:
        out = stdout()
        out.print(f"{report.kind} {report.name} ({report.factory})\n", soft_wrap=True)
        out.print(table(["rule", "verdict", ""], [(f.rule, f.outcome, f.text) for f in report.findings]))
        broken = len(report.violations)
        out.print(f"\n{broken} of {len(report.findings)} rules broken." if broken else "\nIt keeps every rule.")
    if report.violations:
        raise typer.Exit(1)
