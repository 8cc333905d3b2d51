"""`fmg doctor`: checks the installation, the rewards, or the log of a run."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fmg.cli import completion
from fmg.cli.options import AsJson, Command, Device, OptionsByName, reward_options
from fmg.cli.output import print_json, stderr, stdout, table
from fmg.core.errors import UsageError
from fmg.core.events import ignore
from fmg.core.metric_keys import SCORE
from fmg.data.run_folder import is_run, no_run
from fmg.progress.reporters import LOADING, reporter_for
from fmg.version import is_runtime

if TYPE_CHECKING:
    from fmg.inference.doctor import Check
    from fmg.rewards.doctor import Diagnosis

_SELF_TEST: Mapping[str, object] = {
    "train.iterations": 1,
    "train.updates_per_iteration": 1,
    "rollout.groups": 2,
    "rollout.group_size": 4,
    "rollout.steps": 2,
    "eval.num": 4,
    "train.device": "cpu",
}

doctor = typer.Typer(help="Check the installation, the rewards, or a run.", invoke_without_command=True)


@doctor.callback()
def examine_installation(
    ctx: typer.Context,
    quick: Annotated[bool, typer.Option("--quick", help="Skip the self-test.")] = False,
    network: Annotated[
        bool, typer.Option("--network", help="Also check that the package indexes and the model hub can be reached.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Check the installation: versions, devices, disk, extras with their install lines, and a tiny training run.

    The exit code is 1 when a check fails; a missing extra is not a failure. Uses no network without --network.
    """
    if (command := ctx.invoked_subcommand) is not None:
        for flag, given in (("--quick", quick), ("--network", network)):
            if given:
                what = f"{flag} cannot be used with `doctor {command}`"
                raise UsageError(what, "Leave it out: it belongs to the check of the installation.")
        if as_json:
            raise UsageError(f"--json comes after `doctor {command}`", f"Write `fmg doctor {command} ... --json`.")
        return
    with reporter_for(stderr()) as reporter:
        reporter(LOADING)
        from fmg.inference.doctor import computes, examine

        self_test = None
        if not quick and is_runtime():
            self_test = computes
        elif not quick:
            self_test = trains
        checks = examine(self_test, network=network, observer=reporter)
    if as_json:
        print_json([asdict(check) for check in checks])
    else:
        rows = [(c.topic, c.name, c.outcome, " ".join(filter(None, (c.found, c.advice)))) for c in checks]
        stdout().print(table(["about", "what", "verdict", "found"], rows))
    if any(check.outcome == "failed" for check in checks):
        raise typer.Exit(1)


@doctor.command("rewards", cls=Command)
def examine_rewards(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="NAME",
            help="Rewards that must work.",
            show_default="all that are installed",
            autocompletion=completion.components("reward"),
        ),
    ] = None,
    sets: OptionsByName = None,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Check each reward: installed, weights as published, known scores reproduced, speed and memory.

    The exit code is 1 when one fails. A reward that is not installed or fetched is "not verified", and fails only
    when named.
    """
    options = reward_options(sets or ())

    from fmg.inference.torch_backend import pick_device
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


def trains() -> Check:
    """The self-test: trains the embedded model for one iteration, with every stage of a real run, on eight images."""
    from fmg.inference.doctor import self_tested

    def scores() -> bool:
        from fmg.recipe import Recipe
        from fmg.training.api import train

        with tempfile.TemporaryDirectory() as folder:
            return SCORE in train(Recipe.default(None, **_SELF_TEST), Path(folder) / "run", ignore).final

    return self_tested(
        "one iteration of meanflow-shapes",
        scores,
        "generated, scored, updated, saved and read back",
        "See where: fmg --debug train --iterations 1",
    )


def _cells(diagnosis: Diagnosis) -> list[str]:
    numbers = ["-" if value is None else f"{value:.1f}" for value in (diagnosis.ms_per_image, diagnosis.memory_mib)]
    texts = [diagnosis.reward, diagnosis.outcome, diagnosis.installed, diagnosis.weights, diagnosis.known_scores]
    return [*texts, *numbers]


@doctor.command("run", cls=Command)
def examine_run(
    run: Annotated[
        str, typer.Argument(metavar="RUN", help="A run folder.", show_default=False, autocompletion=completion.runs)
    ],
    as_json: AsJson = False,
) -> None:
    """Read the log of a run and name what to change: learning rate, clip range, group size, KL, rewards.

    The exit code is 1 when there is a problem. docs/doctor.md lists the rules and their thresholds.
    """
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
        stdout().print("The log shows no problem.")
    if any(advice.severity == "problem" for advice in found):
        raise typer.Exit(1)
