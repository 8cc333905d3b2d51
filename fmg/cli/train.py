"""`fmg train`: one run of reinforcement learning, from flags to a run folder."""

from __future__ import annotations

import json
import math
import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from fmg.cli import completion
from fmg.cli.options import DEVICES, DTYPES, LR_SCHEDULES, AsJson, Offline, hardware_option, panel
from fmg.cli.output import print_error, print_json, print_warning, stderr, stdout, table
from fmg.core.errors import MissingDependencyError, UsageError, said_once
from fmg.core.events import Evaluated, Event, IterationDone, Notice, Resumed, ignore
from fmg.core.files import check_place
from fmg.core.signals import exit_code
from fmg.progress.reporters import LOADING, Reporter, Stateless, reporter_for

if TYPE_CHECKING:
    from fmg.core.events import Observer
    from fmg.recipe import Recipe, ResolvedRecipe
    from fmg.training.trainer import TrainResult

_RECIPE = "the recipe's"
_WITH_RESUME = ("resume", "allow-code", "accept-changed-prompts", "offline", "json")
_task_option, _training_option, _run_option = map(panel, ("Model, reward and data", "Training", "Run"))


def train(
    ctx: typer.Context,
    config: Annotated[
        str | None,
        _task_option(
            metavar="F|NAME",
            help="Recipe file, a shipped recipe, or owner/name of a run on the hub.",
            show_default="the model's own",
            autocompletion=completion.recipes,
        ),
    ] = None,
    model: Annotated[
        str | None,
        _task_option(
            metavar="N",
            help="Model to fine-tune.",
            show_default="meanflow-shapes",
            autocompletion=completion.components("model"),
        ),
    ] = None,
    stochasticizer: Annotated[
        str | None,
        _training_option(
            metavar="N",
            help="Turns the flow map into a policy; auto takes the model's default.",
            show_default=_RECIPE,
            autocompletion=completion.components("stochasticizer"),
        ),
    ] = None,
    reward: Annotated[
        list[str] | None,
        _task_option(
            metavar="N[=W]",
            help="Reward and weight; repeat for several. python:my.mod:fn runs your own function.",
            show_default=_RECIPE,
            autocompletion=completion.components("reward"),
        ),
    ] = None,
    objective: Annotated[
        str | None,
        _training_option(
            metavar="N", help="Loss.", show_default=_RECIPE, autocompletion=completion.components("objective")
        ),
    ] = None,
    optimizer: Annotated[
        str | None,
        _training_option(
            metavar="N", help="Optimizer.", show_default=_RECIPE, autocompletion=completion.components("optimizer")
        ),
    ] = None,
    lr: Annotated[float | None, _training_option(metavar="X", help="Learning rate.", show_default=_RECIPE)] = None,
    lr_schedule: Annotated[
        str | None,
        _training_option(
            metavar="S",
            help="Learning-rate schedule: constant, linear or cosine.",
            show_default=_RECIPE,
            autocompletion=LR_SCHEDULES,
        ),
    ] = None,
    prompts: Annotated[
        str | None,
        _task_option(
            metavar="N|F",
            help="Prompt set by name, or a .txt or .jsonl file.",
            show_default=_RECIPE,
            autocompletion=completion.prompt_sets,
        ),
    ] = None,
    steps: Annotated[
        int | None, _training_option(metavar="N", help="Sampling steps (NFE) per image.", show_default=_RECIPE)
    ] = None,
    iterations: Annotated[
        int | None,
        _training_option(metavar="N", help="Iterations, each a rollout and its updates.", show_default=_RECIPE),
    ] = None,
    seed: Annotated[int | None, _training_option(metavar="N", help="Seed of the run.", show_default=_RECIPE)] = None,
    device: Annotated[
        str | None,
        hardware_option(metavar="D", help="auto, cpu, cuda or cuda:N.", show_default=_RECIPE, autocompletion=DEVICES),
    ] = None,
    dtype: Annotated[
        str | None, hardware_option(metavar="T", help="fp32 or bf16.", show_default=_RECIPE, autocompletion=DTYPES)
    ] = None,
    stop_on_hacking: Annotated[
        bool,
        _training_option(
            "--stop-on-hacking",
            help="Stop when the trained reward rises while a held-out reward or the diversity falls.",
        ),
    ] = False,
    tracker: Annotated[
        list[str] | None,
        _run_option(
            metavar="N",
            help="Follow the run in TensorBoard, W&B or another tracker; repeat for several.",
            show_default=_RECIPE,
            autocompletion=completion.components("tracker"),
        ),
    ] = None,
    sets: Annotated[
        list[str] | None,
        _task_option(
            "--set",
            metavar="K=V",
            help="Any value of the recipe, such as lora.rank=4; repeat for several.",
            autocompletion=completion.recipe_values,
        ),
    ] = None,
    run: Annotated[
        str | None, _run_option(metavar="DIR", help="Run folder.", show_default="a new one under runs/")
    ] = None,
    resume: Annotated[
        str | None,
        _run_option(
            metavar="RUN",
            help="Resume an interrupted run with its own recipe.",
            show_default=False,
            autocompletion=completion.runs,
        ),
    ] = None,
    allow_code: Annotated[
        bool, _run_option("--allow-code", help="Allow a recipe file to name reward code and reward servers.")
    ] = False,
    accept_changed_prompts: Annotated[
        bool,
        _run_option(
            "--accept-changed-prompts", help="With --resume: accept prompts that have changed since the run started."
        ),
    ] = False,
    dry_run: Annotated[
        bool, _run_option("--dry-run", help="Print every value, its source and the plan, then exit.")
    ] = False,
    offline: Offline = False,
    as_json: AsJson = False,
) -> int:
    """Fine-tune a generator with reinforcement learning; by default, the embedded model."""
    from fmg.data.run_folder import RunFolder
    from fmg.recipe import resolve
    from fmg.recipe.layers import FLAGS
    from fmg.training.launch import is_main_process

    first, given = is_main_process(), _given(ctx)
    if resume is not None:
        with said_once(first):
            for name in given:
                if name not in _WITH_RESUME:
                    raise UsageError(
                        f"--resume continues a run as it was started, but --{name} would change it",
                        "Give only one of them; a run with other values is a new run.",
                    )
        return _resume(
            resume, first=first, allow_code=allow_code, accept_prompts=accept_changed_prompts, as_json=as_json
        )
    if accept_changed_prompts:
        raise UsageError("--accept-changed-prompts needs --resume", "Leave it out, or name the run to resume.")
    with said_once(first):
        flags = {name: value for name, value in given.items() if name in FLAGS}
        file = _recipe_file(config, first=first)
        resolved = resolve(file, flags, sets or [], allow_code)
        if file != config:
            _check_of_hub(resolved)
    if first:
        # the others might already see the folder that the first process makes
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


def _recipe_file(config: str | None, *, first: bool) -> str | Path | None:
    """The recipe as typed; for a run on the hub, its recipe file, which is fetched first."""
    if config is None or "/" not in config:
        return config
    from fmg.inference.hub_target import fetch_recipe, hub_source
    from fmg.recipe import recipe_names

    if config in recipe_names() or (source := hub_source(config)) is None:
        return config
    with reporter_for(stderr()) as reporter:
        return fetch_recipe(source, reporter if first else ignore)


def _check_of_hub(resolved: ResolvedRecipe) -> None:
    """Refuses trackers named in a recipe from the hub: they could send metrics and images to its author's account.

    Raises:
        UsageError: the recipe names one.
    """
    for index, tracker in enumerate(resolved.recipe.trackers):
        if (source := resolved.provenance[f"trackers.{index}.name"]).kind == "file":
            raise UsageError(
                f"{source.text}: the recipe on the hub names the tracker '{tracker.name}'",
                "Choose your own with --tracker, or leave it out: --set trackers=[].",
            )


def _given(ctx: typer.Context) -> dict[str, object]:
    """The options on the command line by their names, in the order of `--help`; those in FLAGS set recipe values."""
    sources = {option: ctx.get_parameter_source(str(option.name)) for option in ctx.command.params}
    return {
        option.opts[0].lstrip("-"): ctx.params[str(option.name)]
        for option, source in sources.items()
        if source is not None and source.name == "COMMANDLINE"
    }


def _resume(run: str, *, first: bool, allow_code: bool, accept_prompts: bool, as_json: bool) -> int:
    from fmg.data.prompt_sets import stated_digests, untied
    from fmg.data.resume_points import check_prompts, check_resumable, ended_short
    from fmg.recipe import Recipe

    folder = Path(run)
    with said_once(first):
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


def check_inputs(recipe: Recipe, *, planned: bool) -> list[str]:
    """Checks before loading that the files a recipe names can be read: model, reward weights, prompts, code.

    Imports no torch and runs no code.

    Args:
        recipe: what is to be trained.
        planned: whether the run is only planned, perhaps for another machine, so that published files may be fetched
            later.

    Returns:
        One line for each published file that has not been fetched and each missing package, if `planned`.

    Raises:
        UsageError: for the first that is missing or malformed.
        MissingDependencyError: the package of a tracker is missing; or published files that have not been fetched or
            another package, unless it is only planned.
        CheckpointError: local model files that are missing.
    """
    from fmg.core.hub import locate
    from fmg.data.prompt_sets import FilePromptsConfig, load_prompts
    from fmg.recipe.composition import check_backend, check_trackers
    from fmg.registry import models
    from fmg.rewards.configs import PythonRewardConfig
    from fmg.rewards.functions import check_module

    check_trackers(recipe)
    for prompts in (recipe.prompts, recipe.eval.prompts):
        if isinstance(prompts.config, FilePromptsConfig):
            load_prompts(prompts)
    lacking: list[MissingDependencyError] = []
    for reward in recipe.measured_rewards:
        if isinstance(reward.config, PythonRewardConfig):
            check_module(reward.config.target)
        for asset in reward.config.assets():
            try:
                locate(asset, "reward", reward.name, reward.config.source_options)
            except MissingDependencyError as error:
                lacking.append(error)
    try:
        models.build_config(recipe.model.name, recipe.model.config).check()
    except MissingDependencyError as error:
        lacking.append(error)
    try:
        check_backend(recipe, "auto")
    except MissingDependencyError as error:
        lacking.append(error)
    if lacking and not planned:
        raise lacking[0]
    return [str(error) for error in lacking]


class JsonReporter(Stateless):
    """Prints the lines of `metrics.jsonl` on stdout, and notices on the console `notices`."""

    def __init__(self, notices: Console) -> None:
        self._notices = notices

    def __call__(self, event: Event) -> None:
        """Prints iterations, evaluations and notices."""
        if isinstance(event, (IterationDone, Evaluated)):
            finite = {key: value if math.isfinite(value) else None for key, value in event.metrics.items()}
            print_json({**finite, "iteration": event.iteration}, indent=None)
        elif isinstance(event, Resumed):
            self._notices.print(f"info: {event.text}", soft_wrap=True)
        elif isinstance(event, Notice):
            self._notices.print(f"{event.level}: {event.text}", soft_wrap=True)


class SilentReporter(Stateless):
    """Shows nothing: for all but the first of several processes, which shows their events."""

    def __call__(self, event: Event) -> None:
        """Ignores the event."""


class Outspoken:
    """Passes events on to a reporter, except errors, which go to stderr because the process may end right after."""

    def __init__(self, reporter: Reporter) -> None:
        self._reporter = reporter

    def __call__(self, event: Event) -> None:
        """Shows the event."""
        if isinstance(event, Notice) and event.level == "error":
            # a live view restores the terminal
            self._reporter.__exit__(None, None, None)
            print_error(event.text)
        else:
            self._reporter(event)


@contextmanager
def _reporting(*, first: bool, as_json: bool) -> Iterator[Observer]:
    # what torch's store prints when its peer is gone would bury our own line about it
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    with _reporter(first=first, as_json=as_json) as reporter:
        reporter(LOADING)
        yield Outspoken(reporter)


def _report(recipe: Recipe, result: TrainResult, *, first: bool, as_json: bool) -> int:
    code = 0 if result.signal is None else exit_code(result.signal)
    if not first:
        return code
    if as_json:
        key, hacking = result.best.score_key, result.hacking
        document = {
            "run": str(result.run.path),
            "best": {"iteration": result.best.iteration, "key": key, "value": result.best.score},
            "last": {"iteration": int(result.final["iteration"]), "key": key, "value": result.final.get(key)},
            "interrupted": result.interrupted,
            "hacking": None,
        }
        if hacking is not None:
            lost = [reading.name for reading in hacking.hacked]
            document["hacking"] = {"began": hacking.began, "found": hacking.iteration, "lost": lost}
        print_json(document, indent=None)
    else:
        _print_result(recipe, result)
    return code


def _reporter(*, first: bool, as_json: bool) -> Reporter:
    if not first:
        return SilentReporter()
    return JsonReporter(stderr()) if as_json else reporter_for(stdout())


# What the table calls facts whose keys `--json` keeps.
_LABELS = {
    "images an iteration": "images per iteration",
    "images in all": "total images",
    "transitions an image": "transitions per image",
    "network calls an iteration": "network evaluations per iteration",
    "row-NFE an iteration": "row-NFE per iteration",
    "updates an iteration": "updates per iteration",
    "memory at the peak": "peak memory",
}


def _print_plan(resolved: ResolvedRecipe, *, as_json: bool) -> None:
    from fmg.core.display import size_text
    from fmg.training.plan import plan

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
    out.print(table(["key", "value", "source"], [(row.path, _shown(row.value), row.source.text) for row in rows]))
    out.print()
    out.print(table(["plan", ""], [(_LABELS.get(key, key), fact) for key, fact in planned.facts.items()]))
    if memory is not None:
        out.print()
        sizes = [(part, size_text(size)) for part, size in (*memory.parts.items(), ("total", memory.peak))]
        out.print(table(["memory per device", "size"], sizes, right=["size"]))
    if planned.gpus:
        out.print()
        columns = ["one GPU", "rollout", "s/iteration", "h/run", "memory", "fits"]
        cells = [
            (g.gpu, g.kind, f"{g.seconds:,.0f}", f"{g.hours:,.1f}", size_text(g.memory), "yes" if g.fits else "no")
            for g in planned.gpus
        ]
        out.print(table(columns, cells, right=columns[2:5]))
        out.print(
            "Transformer time only, at the utilisation that an H200 reached with 8 B parameters at 512 px"
            " (docs/branching.md). Decoding, rewards and evaluation are not included."
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
            out.print(f"Image: {run / name}", soft_wrap=True)
    folder = shlex.quote(str(run))
    out.print("\nNext:")
    if result.interrupted and newest_state(run) is not None:
        out.print(f"  {resume_command(run, recipe)}", soft_wrap=True)
    out.print(f"  fmg eval {folder} --against base{consent_flag(recipe)}", soft_wrap=True)
    out.print(f"  fmg generate {shlex.quote(_example_prompt(recipe))} --from {folder}", soft_wrap=True)


def _example_prompt(recipe: Recipe) -> str:
    from fmg.data.prompt_sets import load_prompts, untied

    return load_prompts(untied(recipe).eval.prompts)[0].text
