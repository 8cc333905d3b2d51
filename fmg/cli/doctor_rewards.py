"""`fmg doctor rewards`: which rewards can be used here, and whether they give the scores they should."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from fmg.cli import completion
from fmg.cli.console import print_json, stderr, stdout
from fmg.cli.options import AsJson, Device, OptionsByName
from fmg.cli.reward_options import reward_options
from fmg.cli.tables import table
from fmg.progress.reporters import reporter_for

if TYPE_CHECKING:
    from fmg.rewards.doctor import Diagnosis


def doctor_rewards(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[NAME]...",
            help="Rewards that must work.",
            show_default="all, as far as installed",
            autocompletion=completion.components("reward"),
        ),
    ] = None,
    sets: OptionsByName = None,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Check each reward: installed, weights as published, known scores reproduced, speed and memory.

    Exit code 1 when one fails. What is not installed or not fetched is "not verified", and fails only when named.
    """
    options = reward_options(sets or ())

    from fmg.inference.devices import pick_device
    from fmg.rewards.doctor import diagnose

    with reporter_for(stderr()) as reporter:
        found = diagnose(names or (), options, pick_device(device), reporter)
    if as_json:
        print_json([vars(diagnosis) for diagnosis in found])
    else:
        columns = ["reward", "verdict", "installed", "weights", "known scores", "ms/image", "memory MiB"]
        stdout().print(table(columns, map(_cells, found), right=["ms/image", "memory MiB"]))
        for diagnosis in found:
            if diagnosis.advice:
                stdout().print(f"{diagnosis.reward}: {diagnosis.advice}", soft_wrap=True)
    if any(diagnosis.outcome == "failed" for diagnosis in found):
        raise typer.Exit(1)


def _cells(diagnosis: Diagnosis) -> list[str]:
    numbers = ["-" if value is None else f"{value:.1f}" for value in (diagnosis.ms_per_image, diagnosis.memory_mib)]
    texts = [diagnosis.reward, diagnosis.outcome, diagnosis.installed, diagnosis.weights, diagnosis.known_scores]
    return [*texts, *numbers]
