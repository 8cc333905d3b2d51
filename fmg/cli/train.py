"""`fmg train`: one run of reinforcement learning, from flags to a run folder."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fmg.cli import completion
from fmg.cli.console import print_json, print_warning, stderr, stdout
from fmg.cli.observers import JsonReporter, Outspoken, SilentReporter
from fmg.cli.options import AsJson, Offline, given_text
from fmg.cli.preflight import check_inputs
from fmg.cli.tables import table
from fmg.core.errors import UsageError, said_once
from fmg.core.files import check_place
from fmg.core.signals import exit_code
from fmg.progress.reporters import LOADING, Reporter, reporter_for

if TYPE_CHECKING:
    from fmg.core.events import Observer
    from fmg.registry.recipe import Recipe
    from fmg.registry.resolve import ResolvedRecipe
    from fmg.training.trainer import TrainResult
    from fmg.training.tripwire import Verdict

_RECIPE = "the recipe's"


def train(
    config: Annotated[
        str | None,
        typer.Option(
            metavar="F|NAME",
            help="Recipe file, or a shipped recipe.",
            show_default="the model's own",
            rich_help_panel="What is trained",
            autocompletion=completion.recipes,
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="N",
            help="Model to tune.",
            show_default="meanflow-shapes",
            rich_help_panel="What is trained",
            autocompletion=completion.components("model"),
        ),
    ] = None,
    stochasticizer: Annotated[
        str | None,
        typer.Option(
            metavar="N",
            help="How the map becomes a policy; auto asks the model.",
            show_default=_RECIPE,
            rich_help_panel="How",
            autocompletion=completion.components("stochasticizer"),
        ),
    ] = None,
    reward: Annotated[
        list[str] | None,
        typer.Option(
            metavar="N[=W]",
            help="Reward and weight; repeat for several. python:my.mod:fn runs your own function.",
            show_default=_RECIPE,
            rich_help_panel="What is trained",
            autocompletion=completion.components("reward"),
        ),
    ] = None,
    objective: Annotated[
        str | None,
        typer.Option(
            metavar="N",
            help="Loss.",
            show_default=_RECIPE,
            rich_help_panel="How",
            autocompletion=completion.components("objective"),
        ),
    ] = None,
    optimizer: Annotated[
        str | None,
        typer.Option(
            metavar="N",
            help="Optimizer.",
            show_default=_RECIPE,
            rich_help_panel="How",
            autocompletion=completion.components("optimizer"),
        ),
    ] = None,
    lr: Annotated[
        float | None, typer.Option(metavar="X", help="Learning rate.", show_default=_RECIPE, rich_help_panel="How")
    ] = None,
    prompts: Annotated[
        str | None,
        typer.Option(
            metavar="N|F",
            help="Prompt set by name, or a .txt or .jsonl file.",
            show_default=_RECIPE,
            rich_help_panel="What is trained",
            autocompletion=completion.prompt_sets,
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(metavar="N", help="Network calls an image.", show_default=_RECIPE, rich_help_panel="How"),
    ] = None,
    iterations: Annotated[
        int | None,
        typer.Option(metavar="N", help="Rollouts, each with its updates.", show_default=_RECIPE, rich_help_panel="How"),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(metavar="N", help="Seed of the run.", show_default=_RECIPE, rich_help_panel="How")
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            metavar="D",
            help="auto, cpu, cuda or cuda:N.",
            show_default=_RECIPE,
            rich_help_panel="Where it runs",
            autocompletion=completion.one_of("auto", "cpu", "cuda"),
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            metavar="T",
            help="fp32 or bf16.",
            show_default=_RECIPE,
            rich_help_panel="Where it runs",
            autocompletion=completion.one_of("fp32", "bf16"),
        ),
    ] = None,
    stop_on_hacking: Annotated[
        bool,
        typer.Option(
            "--stop-on-hacking",
            help="End when the trained reward rises while a held-out one or the diversity falls.",
            rich_help_panel="How",
        ),
    ] = False,
    sets: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="K=V",
            help="Any value of the recipe, such as lora.rank=4; repeat for several.",
            rich_help_panel="What is trained",
            autocompletion=completion.recipe_values,
        ),
    ] = None,
    run: Annotated[
        str | None,
        typer.Option(
            metavar="DIR", help="Folder of the run.", show_default="a new one under runs/", rich_help_panel="The run"
        ),
    ] = None,
    resume: Annotated[
        str | None,
        typer.Option(
            metavar="RUN",
            help="Go on with an interrupted run, by its own recipe.",
            show_default=False,
            rich_help_panel="The run",
            autocompletion=completion.runs,
        ),
    ] = None,
    allow_code: Annotated[
        bool,
        typer.Option(
            "--allow-code", help="Let a recipe file name reward code and reward servers.", rich_help_panel="The run"
        ),
    ] = False,
    accept_changed_prompts: Annotated[
        bool,
        typer.Option(
            "--accept-changed-prompts",
            help="With --resume: take prompts that were changed since.",
            rich_help_panel="The run",
        ),
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Print every value, where it came from and the plan; start nothing.",
            rich_help_panel="The run",
        ),
    ] = False,
    offline: Offline = False,
    as_json: AsJson = False,
) -> int:
    """Tune a generator with reinforcement learning; without options, the embedded one on this computer."""
    from fmg.data.run_folder import RunFolder
    from fmg.registry.resolve import resolve
    from fmg.training.launch import is_main_process

    given_text(config, "--config")
    given_text(prompts, "--prompts")
    given_text(run, "--run")
    flags: dict[str, object] = {
        "model": model,
        "stochasticizer": stochasticizer,
        "reward": reward,
        "objective": objective,
        "optimizer": optimizer,
        "lr": lr,
        "prompts": prompts,
        "steps": steps,
        "iterations": iterations,
        "seed": seed,
        "device": device,
        "dtype": dtype,
        "stop-on-hacking": stop_on_hacking or None,
    }
    first = is_main_process()
    if resume is not None:
        others = {"config": config, **flags, "set": sets, "run": run, "dry-run": dry_run or None}
        return _resume(
            resume, others, first=first, allow_code=allow_code, accept_prompts=accept_changed_prompts, as_json=as_json
        )
    if accept_changed_prompts:
        raise UsageError("--accept-changed-prompts is of --resume alone", "Leave it out, or name the run to resume.")
    with said_once(first):
        resolved = resolve(config, flags, sets or [], allow_code)
    if first:
        # the others might already meet the folder that the first process makes
        RunFolder.check_free(run)
    with said_once(first):
        lacking = check_inputs(resolved.recipe, planned=dry_run)
    if dry_run:
        if first:
            for text in lacking:
                print_warning(text)
            _print_plan(resolved, as_json=as_json)
        return 0

    with _reporting(first=first, as_json=as_json) as reporter:
        from fmg.training.api import train as run_training

        result = run_training(resolved, run, reporter)
    return _report(resolved.recipe, result, first=first, as_json=as_json)


def _resume(
    run: str, others: Mapping[str, object], *, first: bool, allow_code: bool, accept_prompts: bool, as_json: bool
) -> int:
    """Goes on with a run; everything that a run is made of stands in its own recipe."""
    from fmg.data.prompt_sets import stated_digests, untied
    from fmg.data.resume_points import check_prompts, check_resumable, ended_short
    from fmg.registry.recipe import Recipe

    folder = Path(run)
    with said_once(first):
        given_text(run, "--resume")
        for name, value in others.items():
            if value not in (None, []):
                raise UsageError(
                    f"--resume goes on with a run as it was begun, and --{name} would change it",
                    "Leave one of the two out; a run with other values is a new run.",
                )
        if not ended_short(folder):
            check_resumable(folder)
        recipe = Recipe.of_run(folder / "recipe.yaml", allow_code=allow_code)
        check_place(folder, "--resume")
        if not accept_prompts:
            check_prompts(folder, recipe, stated_digests(recipe))
        check_inputs(untied(recipe), planned=False)
    with _reporting(first=first, as_json=as_json) as reporter:
        from fmg.training.api import resume as resume_training

        result = resume_training(folder, reporter, allow_code=allow_code, accept_changed_prompts=accept_prompts)
    return _report(recipe, result, first=first, as_json=as_json)


@contextmanager
def _reporting(*, first: bool, as_json: bool) -> Iterator[Observer]:
    # what torch's store prints when its other end is gone would drown the line that says so
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    with _reporter(first=first, as_json=as_json) as reporter:
        reporter(LOADING)
        yield Outspoken(reporter)


def _report(recipe: Recipe, result: TrainResult, *, first: bool, as_json: bool) -> int:
    code = 0 if result.signal is None else exit_code(result.signal)
    if not first:
        return code
    if as_json:
        key = result.best.score_key
        best = {"iteration": result.best.iteration, "key": key, "value": result.best.score}
        last = {"iteration": int(result.final["iteration"]), "key": key, "value": result.final.get(key)}
        hacking = None if result.hacking is None else _hacking(result.hacking)
        print_json(
            {
                "run": str(result.run.path),
                "best": best,
                "last": last,
                "interrupted": result.interrupted,
                "hacking": hacking,
            },
            indent=None,
        )
    else:
        _print_result(recipe, result)
    return code


def _hacking(verdict: Verdict) -> dict[str, object]:
    """What the tripwire found, for programs."""
    return {"began": verdict.began, "found": verdict.iteration, "lost": [r.name for r in verdict.hacked]}


def _reporter(*, first: bool, as_json: bool) -> Reporter:
    if not first:
        return SilentReporter()
    return JsonReporter(stderr()) if as_json else reporter_for(stdout())


def _print_plan(resolved: ResolvedRecipe, *, as_json: bool) -> None:
    from fmg.training.plan import plan, size_text

    planned = plan(resolved)
    rows, memory = resolved.table(), planned.memory
    if as_json:
        values = {row.path: {"value": row.value, "source": row.source.text} for row in rows}
        parts: dict[str, object] = {} if memory is None else {"memory_bytes": {**memory.parts, "peak": memory.peak}}
        if planned.gpus:
            parts["one_gpu"] = [asdict(gpu) for gpu in planned.gpus]
        print_json({"recipe": values, "plan": dict(planned.facts), **parts})
        return
    out = stdout()
    out.print(table(["value", "is", "from"], [(row.path, _shown(row.value), row.source.text) for row in rows]))
    out.print()
    out.print(table(["plan", ""], list(planned.facts.items())))
    if memory is not None:
        out.print()
        sizes = [(part, size_text(size)) for part, size in memory.parts.items()]
        out.print(table(["memory of a device", "size"], [*sizes, ("together", size_text(memory.peak))], right=["size"]))
    if planned.gpus:
        out.print()
        columns = ["one GPU", "rollout", "s an iteration", "h a run", "memory", "fits"]
        on_gpus = [
            (
                on.gpu,
                on.kind,
                f"{on.seconds:,.0f}",
                f"{on.hours:,.1f}",
                size_text(on.memory),
                "yes" if on.fits else "no",
            )
            for on in planned.gpus
        ]
        out.print(table(columns, on_gpus, right=columns[2:5]))
        out.print(
            "Network time at the shares of peak that an H200 reached with 8 B parameters at 512 px (docs/branching.md);"
            " decoding, rewards and evaluations come on top."
        )


def _shown(value: object) -> str:
    """A value as a recipe would state it."""
    return value if isinstance(value, str) else json.dumps(value)


def _print_result(recipe: Recipe, result: TrainResult) -> None:
    from fmg.data.resume_points import consent_flag, newest_state, resume_command

    out = stdout()
    run = result.run.path
    best = result.best
    out.print()
    columns, rows = result.outcome.table()
    out.print(table(columns, rows, right=columns[1:]))
    judged = "not evaluated" if best.score is None else f"{best.score_key} {best.score:.3f}"
    out.print(f"\nKept checkpoint: {result.outcome.title} ({judged})")
    for name in ("before_after.png", "curve.png"):
        if (run / name).is_file():
            out.print(f"Picture: {run / name}", soft_wrap=True)
    folder = shlex.quote(str(run))
    out.print("\nNext:")
    if result.interrupted and newest_state(run) is not None:
        out.print(f"  {resume_command(run, recipe)}", soft_wrap=True)
    out.print(f"  fmg eval {folder} --against base{consent_flag(recipe)}", soft_wrap=True)
    out.print(f"  fmg generate {shlex.quote(_example_prompt(recipe))} --from {folder}", soft_wrap=True)


def _example_prompt(recipe: Recipe) -> str:
    from fmg.data.prompt_sets import load_prompts, untied

    return load_prompts(untied(recipe).eval.prompts)[0].text
