"""`fmg doctor`: the installation, the rewards, and the log of a run."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from fmg.cli import completion
from fmg.cli.console import print_json, stderr, stdout
from fmg.cli.doctor_rewards import doctor_rewards
from fmg.cli.options import AsJson, given_text
from fmg.cli.tables import table
from fmg.core.errors import UsageError
from fmg.data.run_folder import is_run, no_run
from fmg.progress.reporters import LOADING, reporter_for

doctor = typer.Typer(help="Examine the installation, the rewards, or a run.", invoke_without_command=True)
doctor.command("rewards")(doctor_rewards)


@doctor.callback()
def examine_installation(
    ctx: typer.Context,
    quick: Annotated[bool, typer.Option("--quick", help="Leave out the self-test.")] = False,
    network: Annotated[
        bool, typer.Option("--network", help="Contact the indexes that packages and weights come from.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Examine the installation: versions, devices, disk, extras with their install lines, and a tiny training run.

    Exit code 1 when something is wrong. An extra that is not installed is no fault. Nothing is contacted without
    --network.
    """
    if (command := ctx.invoked_subcommand) is not None:
        for flag, given in (("--quick", quick), ("--network", network)):
            if given:
                what = f"{flag} does not go with `doctor {command}`"
                raise UsageError(what, "Leave it out: it is of the installation.")
        if as_json:
            raise UsageError(f"--json comes after `doctor {command}`", f"Write `fmg doctor {command} ... --json`.")
        return
    with reporter_for(stderr()) as reporter:
        reporter(LOADING)
        from fmg.training.doctor import examine

        checks = examine(self_test=not quick, network=network, observer=reporter)
    if as_json:
        print_json([asdict(check) for check in checks])
    else:
        rows = [(c.topic, c.name, c.outcome, " ".join(filter(None, (c.found, c.advice)))) for c in checks]
        stdout().print(table(["about", "what", "verdict", "found"], rows))
    if any(check.outcome == "failed" for check in checks):
        raise typer.Exit(1)


@doctor.command("run")
def examine_run(
    run: Annotated[
        str, typer.Argument(metavar="RUN", help="A run folder.", show_default=False, autocompletion=completion.runs)
    ],
    as_json: AsJson = False,
) -> None:
    """Read the log of a run and name the knob: learning rate, clip, groups, KL, a held-out reward that falls.

    Exit code 1 when there is a problem. The rules and their thresholds are in docs/doctor.md.
    """
    given_text(run, "RUN")
    # before numpy is imported
    if not is_run(Path(run)):
        raise no_run(Path(run))
    from fmg.data import run_diagnostics

    found = run_diagnostics.examine_run(run)
    if as_json:
        print_json([asdict(advice) for advice in found])
    elif found:
        rows = [(advice.severity, advice.sign, advice.knob, advice.advice) for advice in found]
        stdout().print(table(["", "sign", "knob", "what to do"], rows))
    else:
        stdout().print("Nothing in the log looks wrong.")
    if any(advice.severity == "problem" for advice in found):
        raise typer.Exit(1)
