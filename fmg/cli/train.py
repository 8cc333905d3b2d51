"""`fmg train`: one run of reinforcement learning, from flags to a run folder."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated

import typer

from fmg.cli.console import print_json, stderr, stdout
from fmg.cli.observers import LOADING, JsonReporter, reporter_for
from fmg.cli.options import AsJson, given_text
from fmg.cli.preflight import check_inputs
from fmg.cli.tables import change, table
from fmg.data.run_metrics import headline

if TYPE_CHECKING:
    from fmg.registry.resolve import ResolvedRecipe
    from fmg.training.trainer import TrainResult

INTERRUPTED = 130
_RECIPE = "the recipe's"


def train(
    config: Annotated[
        str | None,
        typer.Option(metavar="F|NAME", help="Recipe file, or a shipped recipe.", show_default="the model's own"),
    ] = None,
    model: Annotated[
        str | None, typer.Option(metavar="N", help="Model to tune.", show_default="meanflow-shapes")
    ] = None,
    stochasticizer: Annotated[
        str | None,
        typer.Option(metavar="N", help="How the map becomes a policy; auto asks the model.", show_default=_RECIPE),
    ] = None,
    reward: Annotated[
        list[str] | None,
        typer.Option(
            metavar="N[=W]",
            help="Reward and weight; repeat for several. python:my.mod:fn runs your own function.",
            show_default=_RECIPE,
        ),
    ] = None,
    objective: Annotated[str | None, typer.Option(metavar="N", help="Loss.", show_default=_RECIPE)] = None,
    optimizer: Annotated[str | None, typer.Option(metavar="N", help="Optimizer.", show_default=_RECIPE)] = None,
    lr: Annotated[float | None, typer.Option(metavar="X", help="Learning rate.", show_default=_RECIPE)] = None,
    prompts: Annotated[
        str | None,
        typer.Option(metavar="N|F", help="Prompt set by name, or a .txt or .jsonl file.", show_default=_RECIPE),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(metavar="N", help="Network calls an image.", show_default=_RECIPE)
    ] = None,
    iterations: Annotated[
        int | None, typer.Option(metavar="N", help="Rollouts, each with its updates.", show_default=_RECIPE)
    ] = None,
    seed: Annotated[int | None, typer.Option(metavar="N", help="Seed of the run.", show_default=_RECIPE)] = None,
    device: Annotated[
        str | None, typer.Option(metavar="D", help="auto, cpu, cuda or cuda:N.", show_default=_RECIPE)
    ] = None,
    dtype: Annotated[str | None, typer.Option(metavar="T", help="fp32 or bf16.", show_default=_RECIPE)] = None,
    sets: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="K=V", help="Any value of the recipe, such as lora.rank=4; repeat for several."),
    ] = None,
    run: Annotated[
        str | None, typer.Option(metavar="DIR", help="Folder of the run.", show_default="a new one under runs/")
    ] = None,
    allow_code: Annotated[
        bool, typer.Option("--allow-code", help="Let a recipe file name reward code and reward servers.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print every value, where it came from and the plan; start nothing.")
    ] = False,
    as_json: AsJson = False,
) -> int:
    """Tune a generator with reinforcement learning; without options, the embedded one on this computer."""
    from fmg.data.run_folder import RunFolder
    from fmg.registry.resolve import resolve

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
    }
    resolved = resolve(config, flags, sets or [], allow_code)
    RunFolder.check_free(run)
    if dry_run:
        check_inputs(resolved.recipe)
        _print_plan(resolved, as_json=as_json)
        return 0

    with JsonReporter(stderr()) if as_json else reporter_for(stdout()) as reporter:
        reporter(LOADING)
        from fmg.training.api import train as run_training

        result = run_training(resolved, run, reporter)
    if as_json:
        best = {"iteration": result.best.iteration, "key": result.best.score_key, "value": result.best.score}
        print_json({"run": str(result.run.path), "best": best, "interrupted": result.interrupted}, indent=None)
    else:
        _print_result(resolved, result)
    return INTERRUPTED if result.interrupted else 0


def _print_plan(resolved: ResolvedRecipe, *, as_json: bool) -> None:
    from fmg.training.plan import plan, size_text

    planned = plan(resolved)
    rows, memory = resolved.table(), planned.memory
    if as_json:
        values = {row.path: {"value": row.value, "source": row.source.text} for row in rows}
        parts = {} if memory is None else {"memory_bytes": {**memory.parts, "peak": memory.peak}}
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


def _shown(value: object) -> str:
    """A value as a recipe would state it."""
    return value if isinstance(value, str) else json.dumps(value)


def _print_result(resolved: ResolvedRecipe, result: TrainResult) -> None:
    out = stdout()
    run = result.run.path
    best = result.best
    out.print()
    out.print(table(["", "before -> after"], _improvements(result.initial, result.final)))
    judged = "not evaluated" if best.score is None else f"{best.score_key} {best.score:.3f}"
    out.print(f"\nBest checkpoint: iteration {best.iteration} ({judged})")
    for name in ("before_after.png", "curve.png"):
        if (run / name).is_file():
            out.print(f"Picture: {run / name}", soft_wrap=True)
    folder = shlex.quote(str(run))
    out.print("\nNext:")
    out.print(f"  fmg eval {folder} --against base{_consent(resolved)}", soft_wrap=True)
    out.print(f"  fmg generate {shlex.quote(_example_prompt(resolved))} --from {folder}", soft_wrap=True)


def _consent(resolved: ResolvedRecipe) -> str:
    """The flag that evaluating the run needs when its rewards are the user's own code or ask a server."""
    asks = any(ref.config.needs_consent for ref in resolved.recipe.measured_rewards)
    return " --allow-code" if asks else ""


def _improvements(initial: Mapping[str, float], final: Mapping[str, float]) -> list[tuple[str, str]]:
    before, after = headline(initial), headline(final)
    return [(name, change(before.get(name), value)) for name, value in after.items()]


def _example_prompt(resolved: ResolvedRecipe) -> str:
    from fmg.data.prompt_sets import load_prompts

    return load_prompts(resolved.recipe.eval.prompts)[0].text
