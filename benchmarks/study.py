"""Head to head on the embedded models: chains, branches, likelihood-free objectives and reward gradients.

Every arm gets the same search for its learning rate: three rates, then a fourth beside the best of them, on a seed
and on prompts that the comparison does not use. Then it trains with that rate on every seed. A training has 10
iterations of 384 images (of 192 for the text model, of 96 where rewards have gradients).

A unit is one training. Finished units are in the result file, so the script can be interrupted and started again.

    python benchmarks/study.py [--worlds shapes,scm,text] [--arms branch,null] [--seeds 0,1,2,3,4] [--jobs 2]
    python benchmarks/study.py --list       # what is missing
    python benchmarks/study.py --report     # the tables and figures of docs/study.md, from the results
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from embedded import RESULTS, store

OUT = RESULTS / "study.json"
RATES = (1e-3, 3e-3, 1e-2)
"""Learning rates of the first three trials."""
BELOW, ABOVE = 3e-4, 3e-2
"""Learning rates of the fourth trial where the lowest or the highest of the three is the best."""
SEARCH_SEED = 100
ITERATIONS = 10
TRIAL_IMAGES = 500
KEPT_IMAGES = 500
KEPT_STEPS = (1, 2, 4, 8)
JUDGE_STEPS = 4

Entry = dict[str, Any]
Key = tuple[str, str, str, int, float]
"""World, arm, `trial`, `run` or `timing`, seed, learning rate."""


@dataclass(frozen=True)
class World:
    """One task: a model with its recipe.

    Attributes:
        model: the model, whose recipe every arm starts from.
        score: what the arms are compared by: a reward and its part.
        quality: a reward that falls where images go wrong. The text model trains it as well, with a small weight.
        prompts: prompts of the search; the comparison takes the recipe's held-out ones.
        curve: settings of the evaluations while a run trains.
        differentiable: the reward whose gradient `reward-gradient` follows; None if there is none.
        judge: the recipe's evaluation reward, if it is so slow that it scores the kept checkpoint alone.
    """

    model: str
    score: str
    quality: str
    prompts: str
    curve: Mapping[str, object]
    differentiable: str | None = None
    judge: str | None = None


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Attributes:
        about: its label.
        values: recipe values on top of the model's default recipe.
        rate_of: the arm whose learning rate it takes; None searches its own.
    """

    about: str
    values: Mapping[str, object] = field(default_factory=dict)
    rate_of: str | None = None


WORLDS = {
    "shapes": World(
        "meanflow-shapes", "shapes_strict", "shapes-quality", "shapes-train", {"eval.every": 1, "eval.num": 400},
        "shapes-clip",
    ),
    "scm": World(
        "scm-shapes", "shapes_strict", "shapes-quality", "shapes-train", {"eval.every": 1, "eval.num": 400},
        "shapes-clip",
    ),
    "text": World(
        "meanflow-text", "ocr-logp_exact", "text-fidelity", "text-train", {"eval.every": 1, "eval.num": 240},
        judge="ocr",
    ),
}  # fmt: skip

BRANCH: dict[str, object] = {"rollout.kind": "branch"}
CHAIN: dict[str, object] = {"rollout.kind": "chain"}
SAMPLES: dict[str, object] = {**CHAIN, "objective.draws": 2}
"""Half of the published noise levels of an image, so that an iteration costs about as much as that of a chain."""
JUMPS: dict[str, object] = {**SAMPLES, "objective.old_decay": 0.0}
"""The published decay of the old policy rises by .001 an iteration: in runs this short it is as good as 0."""
GRADIENT: dict[str, object] = {
    **CHAIN, "objective": "reward-gradient", "rewards": "differentiable", "rollout.groups": 24, "rollout.group_size": 4
}  # fmt: skip
ARMS: dict[str, Arm] = {
    "branch": Arm("branch, default kernel", BRANCH),
    "null": Arm("branch, shuffled advantages (null)", {**BRANCH, "train.shuffle_advantages": True}, rate_of="branch"),
    "reinforce": Arm("branch, reinforce", {**BRANCH, "objective": "reinforce", "train.updates_per_iteration": 1}),
    "meanflow-nft": Arm("meanflow-nft", {**JUMPS, "objective": "meanflow-nft"}),
    "mean-flow-advantage": Arm("mean-flow-advantage", {**JUMPS, "objective": "mean-flow-advantage"}),
    "reward-gradient": Arm("reward-gradient, all jumps", {**GRADIENT, "objective.jumps": 4}),
    "awm": Arm("awm", {**SAMPLES, "objective": "awm"}),
    "chain": Arm("chain, default kernel", CHAIN),
    "branch-naive-noise": Arm("branch, naive-noise", {**BRANCH, "stochasticizer": "naive-noise"}),
    "chain-flow-sde": Arm("chain, flow-sde", {**CHAIN, "stochasticizer": "flow-sde"}),
    "diffusion-nft": Arm("diffusion-nft", {**SAMPLES, "objective": "diffusion-nft"}),
    "refl": Arm("reward-gradient, one jump (ReFL)", {**GRADIENT, "objective.method": "refl"}),
    "branch-endpoint": Arm("branch, asfmc-endpoint", {**BRANCH, "stochasticizer": "asfmc-endpoint"}),
    "branch-flow-sde": Arm("branch, flow-sde", {**BRANCH, "stochasticizer": "flow-sde"}),
    "branch-cps": Arm("branch, cps", {**BRANCH, "stochasticizer": "cps"}),
    "chain-endpoint": Arm("chain, asfmc-endpoint", {**CHAIN, "stochasticizer": "asfmc-endpoint"}),
    "chain-cps": Arm("chain, cps", {**CHAIN, "stochasticizer": "cps"}),
    "chain-naive-noise": Arm("chain, naive-noise", {**CHAIN, "stochasticizer": "naive-noise"}),
}
"""In the order in which they run."""


def key_of(entry: Mapping[str, Any]) -> Key:
    """What tells the units of the result file apart."""
    return entry["world"], entry["arm"], entry["kind"], entry["seed"], entry["lr"]


def values_of(world: str, arm: str) -> dict[str, object]:
    """The recipe values of an arm in a world, except learning rate and seed."""
    values, task = dict(ARMS[arm].values), WORLDS[world]
    if "rewards" in values:
        values["rewards"] = [{"name": task.differentiable, "weight": 1.0}]
        values["eval.rewards"] = [task.score.rpartition("_")[0], task.quality]
    if task.judge:
        values["eval.rewards"] = []
    return values


def refusal(world: str, arm: str) -> str | None:
    """Why an arm does not exist in a world; None if it does."""
    import fmg
    from fmg.recipe import recipe_of

    if "rewards" in ARMS[arm].values and WORLDS[world].differentiable is None:
        return "this world has no differentiable reward"

    def recipe(of: str) -> fmg.Recipe:
        return recipe_of(WORLDS[world].model, values_of(world, of), allow_code=False).recipe

    try:
        own = recipe(arm)
    except fmg.UsageError as error:
        return str(error)
    # the default stochasticizer of a single-time map is the only one that fits it
    kernels = [other for other in ("branch", "chain") if other != arm and recipe(other) == own]
    return f"the same recipe as '{kernels[0]}'" if kernels else None


def fourth_rate(trials: Mapping[float, float]) -> float:
    """The learning rate of the fourth trial, given the scores of the first three.

    It is half a decade beyond the best of them, or between the best and the better of its neighbours.
    """
    low, middle, high = RATES
    best = best_rate(trials)
    if best == middle:
        other = max((low, high), key=lambda rate: trials[rate])
        return float(f"{math.sqrt(best * other):.1e}")
    return BELOW if best == low else ABOVE


def best_rate(trials: Mapping[float, float]) -> float:
    """The rate with the highest score; the lowest of equals."""
    return max(sorted(trials), key=lambda rate: trials[rate])


def run_unit(key: Key) -> Entry:
    """Trains one unit in a temporary folder; a run is evaluated at every number of steps as well."""
    import torch

    import fmg
    from fmg.core.machine import machine
    from fmg.recipe import recipe_of
    from fmg.training.plan_work import Work, rows_of

    torch.set_num_threads(1)
    name, arm, kind, seed, rate = key
    world = WORLDS[name]
    values = {**values_of(name, arm), "train.iterations": ITERATIONS, "lr": rate, "seed": seed}
    values |= {
        "trial": {"eval.every": ITERATIONS, "eval.prompts": world.prompts, "eval.num": TRIAL_IMAGES},
        "run": world.curve,
        "timing": {"train.iterations": 6, "eval.every": 6, "eval.num": 16},
    }[kind]
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        stopped = None
        try:
            fmg.train(world.model, run, _unheard, **values)  # type: ignore[arg-type]
        except fmg.FmgError as error:
            # a gate that stops a run with too high a rate is a result
            stopped = str(error)
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        kept = {}
        if kind == "run" and stopped is None:
            measured = fmg.evaluate(run, steps=KEPT_STEPS, num=KEPT_IMAGES, extractors="pixels", observer=_unheard)
            kept = {f"{r.reward}_{r.part}@{r.steps}": round(r.mean, 4) for r in measured.results}
            kept |= {f"{m.metric}@{m.steps}": round(m.value, 6) for m in measured.metrics}
            if world.judge:
                judged = fmg.evaluate(run, rewards=world.judge, steps=JUDGE_STEPS, num=KEPT_IMAGES, observer=_unheard)
                kept |= {f"{r.reward}_{r.part}@{r.steps}": round(r.mean, 4) for r in judged.results}
    recipe = recipe_of(world.model, values, allow_code=False).recipe
    work = Work.of(recipe)
    row_cost = (work.row_nfe - work.rollout_calls) / rows_of(recipe)
    return {
        "world": name, "arm": arm, "kind": kind, "seed": seed, "lr": rate,
        "values": values_of(name, arm), "images": recipe.rollout.samples, "machine": machine(),
        "stopped": stopped, "kept": kept,
        **course(lines, world, row_cost),
    }  # fmt: skip


def _unheard(event: object) -> None:
    """Hides progress and warnings: a trial evaluates on training prompts on purpose."""


def course(lines: Iterable[Mapping[str, Any]], world: World, row_cost: float) -> dict[str, list[Any]]:
    """The curve of a run: row-NFE and seconds spent before every evaluation, and what it measured.

    `row_cost` is what the update spends on a row, in network evaluations. The diversity of a chain's weights is that
    of the rollout that they generate next, so its last point has none. That of branches is measured by evaluations.
    """
    from fmg.core import metric_keys as keys

    points: list[dict[str, float]] = []
    seconds: list[float] = []
    nfe = 0.0
    for line in lines:
        prefix = keys.EVAL_EMA if keys.EMA_SCORE in line else keys.EVAL
        if keys.SCORE in line or keys.EMA_SCORE in line:
            point = {
                "iteration": line[keys.ITERATION],
                "nfe": nfe,
                "seconds": sum(seconds),
                "score": line[f"{prefix}{world.score}{keys.MEAN}"],
                "diversity": line.get(keys.DIVERSITY_WITHIN_GROUPS, math.nan),
                "trained_gain": line.get(keys.TRAINED_GAIN, math.nan),
                "quality_loss": line.get(keys.watched_loss(world.quality), math.nan),
            }
            quality = f"{prefix}{world.quality}{keys.MEAN}"
            points.append({**point, "quality": line[quality]} if quality in line else point)
        else:
            if keys.DIVERSITY_WITHIN_GROUPS in line:
                points[-1]["diversity"] = line[keys.DIVERSITY_WITHIN_GROUPS]
            nfe += line[keys.ROLLOUT_NFE] + row_cost * line[keys.TRAINED_ROWS]
            seconds.append(line[keys.TIME_ITERATION])
    rounded = [{k: float(f"{v:.6g}") for k, v in p.items() if not math.isnan(v)} for p in points]
    return {"points": rounded, "iteration_s": [round(s, 4) for s in seconds]}


def score_of(entry: Mapping[str, Any]) -> float:
    """The score of a trial after its last iteration; of a trial that a gate stopped, below any other."""
    return -1.0 if entry["stopped"] else float(entry["points"][-1]["score"])


@dataclass
class Schedule:
    """Which units are to be done next, given those that are finished or running."""

    pairs: Sequence[tuple[str, str]]
    seeds: Sequence[int]
    done: dict[Key, Entry]
    running: set[Key] = field(default_factory=set)

    def trials(self, world: str, arm: str) -> dict[float, float]:
        """The scores of the finished trials of an arm by learning rate."""
        return {k[4]: score_of(e) for k, e in self.done.items() if k[:3] == (world, arm, "trial")}

    def rate(self, world: str, arm: str) -> float | None:
        """The learning rate that an arm runs with; None while it is being searched."""
        trials = self.trials(world, ARMS[arm].rate_of or arm)
        return best_rate(trials) if len(trials) > len(RATES) else None

    def ready(self) -> Iterator[Key]:
        """Units that can start now. Every arm gets its first seed before any gets its second."""
        for world, arm in self.pairs:
            trials = self.trials(world, arm)
            if ARMS[arm].rate_of is None and len(trials) <= len(RATES):
                missing = [rate for rate in RATES if rate not in trials] or [fourth_rate(trials)]
                yield from self._free((world, arm, "trial", SEARCH_SEED, rate) for rate in missing)
        for seed in self.seeds:
            for world, arm in self.pairs:
                if rate := self.rate(world, arm):
                    yield from self._free([(world, arm, "run", seed, rate)])

    def _free(self, keys: Iterable[Key]) -> Iterator[Key]:
        return (key for key in keys if key not in self.done and key not in self.running)


def finished(path: Path) -> dict[Key, Entry]:
    """The finished units whose recipe values are still those of the arm."""
    if not path.is_file():
        return {}
    runs: list[Entry] = json.loads(path.read_text(encoding="utf-8"))["runs"]
    return {key_of(e): e for e in runs if e["arm"] in ARMS and e["values"] == values_of(e["world"], e["arm"])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worlds", default=",".join(WORLDS))
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--seeds", default="0,1,2,3,4")
    parser.add_argument(
        "--jobs", type=int, choices=range(1, 65), metavar="N", default=2, help="trainings at a time, each on one thread"
    )
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument(
        "--timing", action="store_true", help="instead, measure the seconds of an iteration of each arm"
    )
    parser.add_argument("--list", action="store_true", help="print which units could start now, and start nothing")
    parser.add_argument(
        "--report", action="store_true", help="print the tables and draw the figures, and start nothing"
    )
    args = parser.parse_args()
    if not all(seed.isdigit() for seed in args.seeds.split(",")):
        parser.error(f"--seeds takes numbers, not '{args.seeds}'")
    worlds, arms = args.worlds.split(","), args.arms.split(",")
    for kind, given, known in (("world", worlds, WORLDS), ("arm", arms, ARMS)):
        if unknown := [name for name in given if name not in known]:
            parser.error(f"there is no {kind} '{unknown[0]}'; known: {', '.join(known)}")
    done = finished(args.out)
    if args.report:
        from study_report import report

        report(list(done.values()))
        return
    refused = {(world, arm): refusal(world, arm) for world in worlds for arm in arms}
    for (world, arm), reason in refused.items():
        if reason:
            print(f"{world} {arm}: left out: {reason}", file=sys.stderr)
    pairs = [pair for pair, reason in refused.items() if reason is None]
    schedule = Schedule(pairs, [int(seed) for seed in args.seeds.split(",")], done)
    if args.list:
        print("\n".join(" ".join(map(str, key)) for key in schedule.ready()))
        return
    os.environ["OMP_NUM_THREADS"] = "1"
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.jobs, context) as pool:
        if args.timing:
            # one at a time: the cores share their caches
            for world, arm in pairs:
                if rate := schedule.rate(world, arm):
                    _keep(args.out, done, pool.submit(run_unit, (world, arm, "timing", 0, rate)).result())
            return
        jobs: dict[Future[Entry], Key] = {}
        while True:
            for key in schedule.ready():
                if len(jobs) == args.jobs:
                    break
                jobs[pool.submit(run_unit, key)] = key
                schedule.running.add(key)
            if not jobs:
                return
            for job in wait(jobs, return_when=FIRST_COMPLETED).done:
                schedule.running.discard(jobs.pop(job))
                _keep(args.out, done, job.result())


def _keep(path: Path, done: dict[Key, Entry], entry: Entry) -> None:
    done[key_of(entry)] = entry
    store(path, list(done.values()))
    words = [entry["world"], entry["arm"], entry["kind"], f"seed {entry['seed']}", f"lr {entry['lr']:g}:"]
    print(*words, f"{score_of(entry):.3f}", f"{sum(entry['iteration_s']):.0f} s", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
