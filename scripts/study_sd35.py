"""`python scripts/study_sd35.py --plan`: the arms of configs/study-sd35, trained on SD3.5-Medium and compared.

Without `--plan` it trains every arm on the GPUs of this machine, evaluates each beside its base on eight rewards at
1024 px, and prints one table. It runs what is missing: a finished arm or evaluation is kept, an interrupted arm resumes
from its last state, and nothing is overwritten. After an interruption, repeat the command (docs/study.md).
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import queue
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from fmg.cli.output import print_json, stderr, stdout
from fmg.cli.train import check_inputs
from fmg.core import hub
from fmg.core import metric_keys as keys
from fmg.core.display import size_text
from fmg.core.errors import FmgError, UsageError, suggestion
from fmg.core.files import lock, write_atomic
from fmg.core.specs import ModelGeometry
from fmg.data.checkpoints import existing_index
from fmg.data.prompt_sets import load_prompts, untied
from fmg.data.resume_points import ended_short, newest_state
from fmg.data.run_folder import RunFolder, is_run
from fmg.data.run_metrics import read_metrics
from fmg.recipe import Recipe, ResolvedRecipe, leaves, recipe_names, resolve
from fmg.registry import ComponentConfig, registry_for
from fmg.training.plan import GPUS, SHARE_OF_PEAK, plan

STUDY = "study-sd35/"
FIRST = "meanflow-nft"
ALPHA = 64
SEED = 12345
QUESTIONS = "geneval2_data.jsonl"
# what may change between the start of a run and its end
FREE = {"train.device", "train.micro_batch", "rollout.batch_size", "eval.batch_size"}


@dataclass(frozen=True)
class Evaluation:
    """Rewards that are measured on one set of prompts, one image for each.

    Attributes:
        rewards: their names.
        prompts: a file, or a prompt set by name; None: the questions of `geneval2`, once they are fetched.
        options: options of the rewards, as `fmg eval --set` takes them.
    """

    rewards: tuple[str, ...]
    prompts: str | None
    options: tuple[str, ...] = ()

    def found(self) -> str | None:
        """The prompts; None: they have not been fetched."""
        if self.prompts is not None:
            return self.prompts
        for asset in registry_for("reward").config("geneval2").assets():
            if QUESTIONS in asset.files and hub.problem(asset) is None:
                return str(hub.locate(asset, "reward", "geneval2").path / QUESTIONS)
        return None


EVALUATIONS: Mapping[str, Evaluation] = {
    "drawbench": Evaluation(
        ("imagereward", "pickscore", "aesthetic", "clipscore", "hpsv2"),
        "everyday-heldout",
        # the scale of published tables
        ("clipscore.variant=diffusion-nft", "pickscore.normalize=false"),
    ),
    "hpsv3": Evaluation(("hpsv3",), "everyday-heldout"),
    "ocr": Evaluation(("ocr",), "lettering-heldout"),
    "geneval2": Evaluation(("geneval2",), None),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; its exit code."""
    given = parse(argv)
    try:
        arms = {name: recipe_of(name, given) for name in given.arm}
        evaluations = evaluations_of(given)
        if given.plan:
            show_plan(arms, evaluations, given)
            return 0
        for name, resolved in arms.items():
            check_ready(name, resolved, evaluations)
        out = Path(given.out)
        out.mkdir(parents=True, exist_ok=True)
        with lock(out, f"The study '{out}' is being run by another process"):
            runs = {name: train(name, resolved, given) for name, resolved in arms.items()}
            reports = evaluate(runs, evaluations, given)
        table = results(runs, reports, given)
        if given.json:
            print_json(table)
        else:
            show(markdown(table))
    except FmgError as error:
        say(f"error: {error}")
        return 1
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options of the command line."""
    arms = [name.removeprefix(STUDY) for name in recipe_names() if name.startswith(STUDY)]
    arms.sort(key=lambda name: name != FIRST)
    summary, _, more = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(description=more, epilog=summary)
    add = parser.add_argument
    add("--plan", action="store_true", help="print GPU-hours, memory and downloads, and stop")
    add("--out", default="runs/study-sd35", metavar="DIR", help="folder of runs and evaluations [%(default)s]")
    add("--gpus", type=int, default=8, metavar="N", help="GPUs of this machine [%(default)s]")
    add("--arm", action="append", choices=arms, metavar="NAME", help=f"one of {', '.join(arms)}; repeat [all]")
    add("--adapter", action="append", default=[], metavar="FILE", help="published LoRA to start from, in order; repeat")
    add("--prompts", metavar="FILE", help="training prompts, such as those of PickScore [everyday-train]")
    add("--set", action="append", default=[], metavar="K=V", help="any value of every recipe; repeat")
    add("--eval-prompts", nargs=2, action="append", default=[], metavar=("NAME", "FILE"),
        help=f"prompts of an evaluation: {', '.join(EVALUATIONS)}; repeat")  # fmt: skip
    add("--evaluation", nargs=3, action="append", default=[], metavar=("NAME", "REWARDS", "PROMPTS"),
        help="in place of these evaluations: rewards, separated by commas, on prompts; repeat")  # fmt: skip
    add("--resolution", type=int, default=1024, metavar="N", help="image side of the evaluations [%(default)s]")
    add("--dtype", choices=("bf16", "fp32"), default="bf16", help="of the evaluations [%(default)s]")
    add("--allow-code", action="store_true", help="allow rewards that are your own code or a server")
    add("--json", action="store_true", help="print JSON")
    given = parser.parse_args(argv)
    given.arm = list(dict.fromkeys(given.arm or arms))
    if given.gpus < 1:
        parser.error("--gpus must be at least 1")
    return given


def sets_of(given: argparse.Namespace) -> list[str]:
    """What the command line changes in every recipe."""
    sets = []
    if given.adapter:
        files = [{"source": source, "alpha": ALPHA} for source in given.adapter]
        sets.append(f"model.adapters={json.dumps(files)}")
    if given.prompts:
        sets.append(f"prompts={json.dumps(str(Path(given.prompts).absolute()))}")
    return [*sets, *given.set]


def recipe_of(arm: str, given: argparse.Namespace) -> ResolvedRecipe:
    """The recipe of an arm with the options of the command line."""
    return resolve(STUDY + arm, sets=sets_of(given), allow_code=given.allow_code)


def evaluations_of(given: argparse.Namespace) -> dict[str, Evaluation]:
    """The evaluations by name; their prompts are read.

    Raises:
        UsageError: an unknown name, or prompts that cannot be read.
    """
    if given.evaluation:
        found = {name: Evaluation(tuple(rewards.split(",")), prompts) for name, rewards, prompts in given.evaluation}
    else:
        found = dict(EVALUATIONS)
    for name, file in given.eval_prompts:
        if name not in found:
            raise UsageError(f"There is no evaluation '{name}'", suggestion(name, found))
        found[name] = replace(found[name], prompts=file)
    for one in found.values():
        if (prompts := one.found()) is not None:
            load_prompts(prompts)
    return found


def with_all_rewards(resolved: ResolvedRecipe, evaluations: Mapping[str, Evaluation]) -> Recipe:
    """The recipe with every reward of the study among those that are measured."""
    known = {reward.label for reward in resolved.recipe.rewards}
    names = {name: None for one in evaluations.values() for name in one.rewards if name not in known}
    names |= {reward.name: None for reward in resolved.recipe.eval.rewards}
    return resolved.recipe.with_({"eval.rewards": list(names)})


def check_ready(arm: str, resolved: ResolvedRecipe, evaluations: Mapping[str, Evaluation]) -> None:
    """Refuses to start while anything is missing, before a GPU hour is spent.

    Raises:
        UsageError: prompts are missing.
        MissingDependencyError: weights or packages are missing.
    """
    check_inputs(with_all_rewards(resolved, evaluations), planned=False)
    for name, one in evaluations.items():
        if one.found() is None:
            raise UsageError(
                f"The evaluation '{name}' has no prompts",
                f"Name them with --eval-prompts {name} FILE, or fetch {name}.",
            )


# --- the plan


def show_plan(
    arms: Mapping[str, ResolvedRecipe], evaluations: Mapping[str, Evaluation], given: argparse.Namespace
) -> None:
    """Prints what the study costs and needs."""
    found = planned(arms, evaluations, given)
    if given.json:
        print_json(found)
        return
    head = [
        "arm",
        "images an iteration",
        "memory per GPU",
        *(f"h / 100, {gpu.name}" for gpu in GPUS),
        "whole arm, H100",
    ]
    rows = [
        [
            name,
            str(arm["images"]),
            "not known" if arm["memory_bytes"] is None else size_text(arm["memory_bytes"]),
            *(f"{hours:.2f}" if arm["fits"][gpu] else "too small" for gpu, hours in arm["hours_per_100"].items()),
            f"{arm['hours']['H100 SXM']:.1f}" if arm["hours"] else "not known",
        ]
        for name, arm in found["arms"].items()
    ]
    total = found["hours"].get("H100 SXM")
    show(f"GPU-hours of {len(rows)} arms, memory on {given.gpus} GPU(s)\n\n{pipes(head, rows)}\n")
    if total is not None:
        measured = found["evaluation"]
        show(
            f"The whole table: {total:.0f} GPU-hours on H100, {total / given.gpus:.1f} hours on {given.gpus}, of which"
            f" {measured['hours']['H100 SXM']:.1f} GPU-hours generate {measured['images']} images of"
            f" {given.resolution} px for the evaluations.\nThese count the transformer alone, at the rates measured on"
            " an H200 (docs/branching.md). Decoding, rewards and the evaluations during training come on top.\n"
        )
    if found["downloads"]:
        rows = [[d["command"], f"{d['size_gb']:.1f} GB", d["licence"]] for d in found["downloads"]]
        show(f"To fetch, {found['size_gb']:.0f} GB\n\n{pipes(['command', 'size', 'terms'], rows)}\n")
    for note in found["notes"]:
        show(f"note: {note}")


def planned(
    arms: Mapping[str, ResolvedRecipe], evaluations: Mapping[str, Evaluation], given: argparse.Namespace
) -> dict[str, Any]:
    """GPU-hours, memory, downloads and what is missing, from the recipes alone."""
    found: dict[str, Any] = {}
    for name, resolved in arms.items():
        recipe, cost = resolved.recipe, plan(resolved, devices=given.gpus)
        mine = {one.gpu.partition(",")[0]: one for one in cost.gpus if one.kind == recipe.rollout.kind}
        found[name] = {
            "images": recipe.rollout.samples,
            "iterations": recipe.train.iterations,
            "memory_bytes": None if cost.memory is None else cost.memory.peak,
            "fits": {gpu.name: cost.memory is not None and cost.memory.peak <= gpu.memory for gpu in GPUS},
            "hours_per_100": {gpu: one.seconds / 36 for gpu, one in mine.items()},
            "hours": {gpu: one.hours for gpu, one in mine.items()},
        }
    recipe = next(iter(arms.values())).recipe
    prompts = {name: one.found() for name, one in evaluations.items()}
    each = {name: 0 if file is None else len(load_prompts(file)) for name, file in prompts.items()}
    images = 2 * len(arms) * sum(each.values())
    geometry = recipe.with_({"model.resolution": given.resolution}).model.config.geometry()
    shown = [gpu for gpu in next(iter(found.values()))["hours"] if geometry is not None]
    hours = {gpu: images * evaluation_hours(gpu, geometry, recipe.rollout.steps) for gpu in shown if geometry}
    downloads = list(missing(with_all_rewards(next(iter(arms.values())), evaluations)))
    notes = [f"the evaluation '{name}' has no prompts yet" for name, file in prompts.items() if file is None]
    fallback = {name for name, one in evaluations.items() if EVALUATIONS.get(name) == one and one.prompts is not None}
    if recipe.prompts.name != "file":
        notes.append(f"training on {recipe.prompts.name}; MeanFlowNFT trains on PickScore's prompts (--prompts FILE)")
    notes += [f"'{name}' is measured on {prompts[name]}, not on its own prompts" for name in sorted(fallback)]
    if not getattr(recipe.model.config, "adapters", ()):
        notes.append("no adapter: MeanFlowNFT starts from the first two stages of its adapters (--adapter FILE, twice)")
    return {
        "gpus": given.gpus,
        "arms": found,
        "evaluation": {"images": images, "resolution": given.resolution, "prompts": each, "hours": hours},
        "hours": {gpu: hours[gpu] + sum(arm["hours"][gpu] for arm in found.values()) for gpu in hours},
        "downloads": downloads,
        "size_gb": sum(one["size_gb"] for one in downloads),
        "notes": notes,
    }


def evaluation_hours(name: str, geometry: ModelGeometry, steps: int) -> float:
    """Hours of the transformer for one image."""
    gpu = next(one for one in GPUS if one.name == name)
    return steps * geometry.call_flops / (gpu.peak * SHARE_OF_PEAK["rollout"]) / 3600


def missing(recipe: Recipe) -> Iterator[dict[str, Any]]:
    """The commands that fetch what is not on this computer, each with what the ones before it have not fetched."""
    components: list[tuple[str, str, ComponentConfig]] = [("model", recipe.model.name, recipe.model.config)]
    components += [("reward", reward.name, reward.config) for reward in recipe.measured_rewards]
    seen: set[tuple[str, tuple[str, ...]]] = set()
    for kind, name, config in components:
        wanted = {(d.asset.source, d.asset.files): d for d in hub.downloads(config.assets())}
        fresh = [download for place, download in wanted.items() if place not in seen]
        seen |= wanted.keys()
        if wanted:
            terms = dict.fromkeys(d.licence or config.about.licence for d in wanted.values())
            size = sum(download.size_gb for download in fresh)
            yield {"command": hub.fetch_command(kind, name), "size_gb": size, "licence": "; ".join(terms)}


# --- training


def train(arm: str, resolved: ResolvedRecipe, given: argparse.Namespace) -> RunFolder:
    """The finished run of an arm: kept, resumed or started.

    Raises:
        UsageError: the run has another recipe.
        SystemExit: training was interrupted or failed, with its exit code.
    """
    folder, state = place(Path(given.out), arm)
    code = ["--allow-code"] * given.allow_code
    if state != "new" and (changed := difference(resolved.recipe, folder)):
        raise UsageError(
            f"The run '{folder}' has another value of {changed}", "Repeat the first command, or choose another --out."
        )
    if state == "finished":
        say(f"{arm}: finished, kept")
        return RunFolder(folder)
    if state == "resume":
        say(f"{arm}: resuming {folder}")
        launch(["train", "--resume", str(folder), *code], given)
    else:
        say(f"{arm}: training in {folder}")
        sets = itertools.chain.from_iterable(("--set", text) for text in sets_of(given))
        launch(["train", "--config", STUDY + arm, *sets, "--run", str(folder), *code], given)
    return RunFolder(folder)


def place(out: Path, arm: str) -> tuple[Path, str]:
    """The folder of an arm, and whether its run is `new`, to `resume` or `finished`.

    A run that was killed before its first state cannot resume: it stays, and the arm starts again in a new folder.
    """
    for number in itertools.count(1):
        folder = out / (arm if number == 1 else f"{arm}-{number}")
        if not folder.exists() or not any(folder.iterdir()):
            return folder, "new"
        if not is_run(folder):
            raise UsageError(f"'{folder}' is not a run of the study", "Move it away, or choose another --out.")
        run = RunFolder(folder)
        with run.lock():
            pass
        if run.state().state == "finished" and not ended_short(folder):
            return folder, "finished"
        if newest_state(folder) is not None or ended_short(folder):
            return folder, "resume"
    raise AssertionError


def difference(recipe: Recipe, folder: Path) -> str | None:
    """The first value in which a run differs from the recipe of its arm."""
    ours, theirs = (
        dict(leaves(untied(one).plain())) for one in (recipe, Recipe.of_run(folder / "recipe.yaml", allow_code=True))
    )
    return next((key for key in sorted({*ours, *theirs} - FREE) if ours.get(key) != theirs.get(key)), None)


def launch(command: Sequence[str], given: argparse.Namespace) -> None:
    """Runs fmg on every GPU; signals reach it, so that it saves its state.

    Raises:
        SystemExit: with its exit code, if that is not 0.
    """
    # without --, torchrun takes the `--run` of fmg for an abbreviation of its own options
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(given.gpus), "-m", "--"]
    program = [sys.executable, *(torchrun if given.gpus > 1 else ["-m"]), "fmg", *command]
    # stdout belongs to the table
    child = subprocess.Popen(program, stdout=sys.stderr)
    before = {one: signal.signal(one, lambda number, _: child.send_signal(number)) for one in FORWARDED}
    while True:
        try:
            code = child.wait()
            break
        except KeyboardInterrupt:
            # the terminal sent it to the child as well, which saves and ends
            continue
    for one, handler in before.items():
        signal.signal(one, handler)
    if code:
        say("Stopped. Repeat the command to resume.")
        raise SystemExit(128 - code if code < 0 else code)


FORWARDED = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]


# --- evaluation


Report = dict[str, Any]


def evaluate(
    runs: Mapping[str, RunFolder], evaluations: Mapping[str, Evaluation], given: argparse.Namespace
) -> dict[tuple[str, str], Report]:
    """The reports of `fmg eval` by arm and evaluation; those that are missing run side by side, one on each GPU."""
    folder = Path(given.out) / "eval"
    folder.mkdir(exist_ok=True)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(given.gpus)))).split(",")
    free: queue.Queue[str] = queue.Queue()
    for gpu in visible[: given.gpus]:
        free.put(gpu)

    def measure(arm: str, name: str) -> Report:
        gpu = free.get()
        try:
            return measured(runs[arm], evaluations[name], folder / f"{arm}-{name}.json", gpu, given)
        finally:
            free.put(gpu)

    wanted = list(itertools.product(runs, evaluations))
    with ThreadPoolExecutor(given.gpus) as pool:
        jobs = {one: pool.submit(measure, *one) for one in wanted}
        return {one: job.result() for one, job in jobs.items()}


def measured(run: RunFolder, evaluation: Evaluation, file: Path, gpu: str, given: argparse.Namespace) -> Report:
    """The report of one evaluation, read from its file or made.

    Raises:
        UsageError: the file was made with other settings, or the evaluation failed.
    """
    prompts = str(evaluation.found())
    adapter = existing_index(run.path).best
    settings = {**asdict(evaluation), "prompts": prompts, "resolution": given.resolution, "dtype": given.dtype}
    settings = {"run": str(run.path), "checkpoint": adapter, "seed": SEED, **json.loads(json.dumps(settings))}
    if file.is_file():
        kept: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        if kept["settings"] != settings:
            raise UsageError(f"'{file}' was measured with other settings", "Move it away, or choose another --out.")
        report: Report = kept["report"]
        return report
    num = len(load_prompts(prompts))
    say(f"evaluating {run.path} on {file.stem}: {num} images")
    command = ["eval", str(run.path), "--against", "base", "--prompts", prompts, "--num", str(num), "--json"]
    command += ["--resolution", str(given.resolution), "--dtype", given.dtype, "--seed", str(SEED)]
    command += [part for reward in evaluation.rewards for part in ("--reward", reward)]
    command += [part for option in evaluation.options for part in ("--set", option)]
    command += ["--allow-code"] * given.allow_code
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": gpu}
    done = subprocess.run([sys.executable, "-m", "fmg", *command], capture_output=True, text=True, env=environment)
    if done.returncode:
        raise UsageError(
            f"Evaluating {run.path} failed: {done.stderr.strip()}", "Fix the cause, then repeat the command."
        )
    report = json.loads(done.stdout)
    write_atomic(file, json.dumps({"settings": settings, "report": report}, indent=2).encode())
    return report


# --- the table


def results(
    runs: Mapping[str, RunFolder], reports: Mapping[tuple[str, str], Report], given: argparse.Namespace
) -> dict[str, Any]:
    """The base, then every arm: means, paired differences from the base with 95 % intervals, GPU-hours and images."""
    rows: list[dict[str, Any]] = [{"arm": "base", "scores": {}}]
    for arm, run in runs.items():
        lines, recipe = read_metrics(run.metrics), Recipe.of_run(run.recipe, allow_code=True)
        times = (line.get(keys.TIME_ITERATION) for line in lines)
        seconds = sum(time for time in times if isinstance(time, float))
        scores: dict[str, Any] = {}
        for name in (name for one, name in reports if one == arm):
            report = reports[arm, name]
            for result, change in zip(report["results"], report["differences"], strict=True):
                if result["part"] == "total":
                    gain = {"difference": change["mean"], "difference_ci95": change["ci95"]}
                    scores[result["reward"]] = {"mean": result["mean"], "ci95": result["ci95"], **gain}
            for result in report["against"]["results"]:
                if result["part"] == "total":
                    rows[0]["scores"][result["reward"]] = {"mean": result["mean"], "ci95": result["ci95"]}
        rows.append(
            {
                "arm": arm,
                "run": str(run.path),
                "checkpoint": existing_index(run.path).best,
                "iterations": recipe.train.iterations,
                "images": recipe.train.iterations * recipe.rollout.samples,
                "gpu_hours": seconds * given.gpus / 3600,
                "scores": scores,
            }
        )
    return {"resolution": given.resolution, "steps": recipe.rollout.steps, "seed": SEED, "arms": rows}


def markdown(table: Mapping[str, Any]) -> str:
    """The table for a page."""
    rewards = list(table["arms"][0]["scores"])
    rows = []
    for row in table["arms"]:
        cells = [cell(row["scores"][reward]) for reward in rewards]
        spent = [f"{row['images']}", f"{row['gpu_hours']:.2f}", row["checkpoint"]] if "run" in row else ["", "", ""]
        rows.append([row["arm"], *cells, *spent])
    head = f"{table['resolution']} px, {table['steps']} steps; in brackets the paired difference from the base, 95 %"
    return f"{head}\n\n{pipes(['arm', *rewards, 'images', 'GPU-hours', 'kept'], rows)}"


def cell(score: Mapping[str, Any]) -> str:
    """A mean, and its difference from the base."""
    if "difference" not in score:
        return f"{score['mean']:.4g}"
    # a single prompt has no interval
    bounds = ", ".join("?" if bound is None else f"{bound:+.3g}" for bound in score["difference_ci95"])
    return f"{score['mean']:.4g} ({score['difference']:+.3g} [{bounds}])"


def pipes(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def show(text: str) -> None:
    """Prints a result."""
    stdout().print(text, soft_wrap=True)


def say(text: str) -> None:
    """Prints progress."""
    stderr().print(text, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
