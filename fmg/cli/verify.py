"""`fmg verify`: whether an exported artifact is intact and reproduces the images of its run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated

import typer

from fmg.cli import completion
from fmg.cli.options import AllowCode, AsJson, Backend, Device, Seed
from fmg.cli.output import print_json, stderr, stdout, table
from fmg.core.errors import UsageError
from fmg.core.runtime import require
from fmg.progress.reporters import LOADING, reporter_for

if TYPE_CHECKING:
    from rich.console import Console

    from fmg.inference.self_check import VerifyReport

_FAILED = 1


def verify(
    artifact: Annotated[
        str,
        typer.Argument(
            metavar="ARTIFACT",
            help="A folder that `fmg export` made, its run, or owner/name on the hub.",
            autocompletion=completion.artifacts,
        ),
    ],
    against: Annotated[
        str | None,
        typer.Option(
            metavar="T",
            help="The run or model to compare with.",
            show_default="the one in its manifest",
            autocompletion=completion.targets,
        ),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Compare files, weights, each graph and 16 images (the default).")
    ] = False,
    full: Annotated[bool, typer.Option("--full", help="Also compare the run's rewards, on 512 images.")] = False,
    alone: Annotated[
        bool,
        typer.Option(
            "--alone", help="Only check the files and generate a few images; needs neither torch nor the run."
        ),
    ] = False,
    num: Annotated[
        int | None,
        typer.Option(min=1, max=1_000_000, metavar="N", help="Images to compare.", show_default="16; with --full: 512"),
    ] = None,
    backend: Backend = "auto",
    device: Device = "auto",
    seed: Seed = 0,
    allow_code: AllowCode = False,
    as_json: AsJson = False,
) -> None:
    """Verify that an artifact reproduces the images of its run.

    If it does not, the exit code is 1 and the first layer that differs is named.
    """
    from fmg.inference.loading import find_artifact

    if quick + full + alone > 1:
        raise UsageError("--quick, --full and --alone cannot be used together", "Give one of them.")
    if alone and (against is not None or num is not None):
        raise UsageError("--alone compares with nothing", "Leave out --alone, or --against and --num.")
    with reporter_for(stderr()) as reporter:
        folder = find_artifact(artifact, reporter)
        reporter(LOADING)
        from fmg.inference.artifact import open_artifact

        opened = open_artifact(folder, hashes=False)
        if alone:
            from fmg.inference.self_check import verify_alone

            report = verify_alone(opened, backend=backend, device=device)
        else:
            require("Comparing an artifact with its run", "torch", instead=", or add --alone")
            from fmg.export.verify import verify as compare

            report = compare(
                opened,
                against,
                level="full" if full else "quick",
                backend=backend,
                device=device,
                num=num,
                seed=seed,
                allow_code=allow_code,
                observer=reporter,
            )
    if as_json:
        print_json(report.to_json())
    else:
        print_report(stdout(), report)
    if not report.passed:
        raise typer.Exit(_FAILED)


def print_report(console: Console, report: VerifyReport) -> None:
    """Prints one row per check with what was measured, why checks failed, and under which conditions others passed."""
    against = f" against {report.against}" if report.against else ""
    console.print(f"{report.artifact}{against}, {report.level}, {report.backend}\n", soft_wrap=True)
    rows = [("passed" if check.passed else "FAILED", check.name, _measured(check.values)) for check in report.checks]
    console.print(table(["", "check", "measured"], rows))
    for check in report.checks:
        if not check.passed:
            console.print(f"\n{check.name}: {check.note}", soft_wrap=True)
    terms = dict.fromkeys(check.note for check in report.checks if check.passed and check.note)
    for note in terms:
        names = [check.name for check in report.checks if check.passed and check.note == note]
        console.print(f"\n{', '.join(names)}: {note}", soft_wrap=True)


def _measured(values: Mapping[str, float]) -> str:
    return "  ".join(
        f"{name} {f'{value:,.0f}' if float(value).is_integer() else f'{value:.6g}'}" for name, value in values.items()
    )
