"""Branched rollouts against chains: each part of branching, and every stochasticizer, at equal images and row-NFE.

An arm with a seed is a unit: `fmg train`, whose evaluations are the curve (1000 held-out images per point, the native
4-step sampler), then `fmg eval` of the kept checkpoint at 1, 2 and 4 steps. Finished units are in the result file, so
the script can be interrupted and resumed. Chains of 40 iterations with other seeds are in embedded.json; the figure
reads them from there.

    python benchmarks/branching.py [--arms default,null] [--seeds 0,1,2] [--jobs 2] [--list]
    python benchmarks/branching.py --report        # prints the tables and draws the figure from the results
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from comparison import BUDGETS, Band, budget_figure, markdown, reached
from embedded import RESULTS, Unit, settings, store

from fmg.core.machine import machine

FIGURE = Path(__file__).parents[1] / "docs" / "pictures" / "branching.png"
OUT = RESULTS / "branching.json"
CHAINS = RESULTS / "embedded.json"
BACKWARD = 2
"""Cost of a backward pass, in forward passes."""


@dataclass(frozen=True)
class Arm:
    """Flags of `fmg train` on top of the model's default recipe, and their label in the table."""

    flags: tuple[str, ...]
    about: str
    score: str = "shapes_strict"


def _kernel(name: str, **options: object) -> tuple[str, ...]:
    return ("--stochasticizer", name, *settings(**{f"stochasticizer__{k}": v for k, v in options.items()}))


SHAPES = ("--model", "meanflow-shapes")
R7 = _kernel("asfmc", ratio=0.7)
OFTEN = settings(eval__every=5)
CHAIN = (*SHAPES, *OFTEN, *settings(rollout__kind="chain", train__iterations=20))
BRANCH = (*SHAPES, *OFTEN, *settings(rollout__kind="branch", train__iterations=20))
FIRST = settings(rollout__window="{size: 1, mode: fixed}")
GRID = settings(rollout__branch__completion="grid")
ADAPTIVE = settings(rollout__branch__steps="adaptive")
HARD = ("--config", "shapes-hard")
KERNELS = {
    "asfmc-.7": (R7, "asfmc, a = .7 s"),
    "asfmc-.5": (_kernel("asfmc", ratio=0.5), "asfmc, a = .5 s"),
    "endpoint": (_kernel("asfmc-endpoint"), "asfmc-endpoint"),
    "flow-sde": (_kernel("flow-sde"), "flow-sde, .7"),
    "naive-noise": (_kernel("naive-noise"), "naive-noise, .7"),
    "cps": (_kernel("cps"), "cps, .8"),
    "euler": (_kernel("asfmc-euler"), "asfmc-euler, .03 and .7"),
    "dance-sde": (_kernel("dance-sde"), "dance-sde, .3"),
}
ARMS: dict[str, Arm] = {
    "default": Arm(SHAPES, "the default recipe"),
    "null": Arm((*SHAPES, *settings(train__shuffle_advantages="true")), "the default with shuffled advantages"),
    "scm": Arm(("--model", "scm-shapes"), "scm-shapes, its default"),
    "text": Arm(("--model", "meanflow-text"), "meanflow-text, its default", "ocr-logp_exact"),
    "hard": Arm(HARD, "shapes-hard"),
    "hard-null": Arm(
        (*HARD, *settings(train__shuffle_advantages="true", train__iterations=40)),
        "shapes-hard with shuffled advantages, 40 iterations",
    ),
    "ladder-1-chain": Arm((*CHAIN, *R7), "chain"),
    "ladder-2-first": Arm((*CHAIN, *R7, *FIRST), "chain, only the first step stochastic and trained"),
    "ladder-3-shared": Arm(
        (*CHAIN, *R7, *FIRST, *settings(rollout__same_initial_noise="true")), "the same, one initial noise a group"
    ),
    "chain-hold": Arm((*CHAIN, *_kernel("asfmc", hold=1.0)), "chain, anchor by hold = 1"),
    "chain-weights": Arm((*CHAIN, *R7, *settings(objective__noise_weighting="true")), "chain, steps weighted by std"),
    "chain-weights-2": Arm(
        (*CHAIN, *R7, *settings(objective__noise_weighting="true", objective__noise_power=2.0)),
        "chain, steps weighted by the square of std",
    ),
    "ladder-4-grid": Arm((*BRANCH, *R7, *GRID), "branch, completion grid"),
    "ladder-5-jump": Arm((*BRANCH, *R7), "branch, completion jump"),
    "ladder-6-adaptive": Arm((*BRANCH, *R7, *ADAPTIVE), "the same, adaptive steps"),
    "ladder-7-prompts": Arm(
        (*BRANCH, *R7, *settings(rollout__prompt_sampling="dynamic")), "jump at the first step, dynamic prompts"
    ),
    **{f"jump-{name}": Arm((*BRANCH, *flags), f"branch, jump: {about}") for name, (flags, about) in KERNELS.items()},
    **{
        f"grid-{name}": Arm((*BRANCH, *flags, *GRID), f"branch, grid: {about}")
        for name, (flags, about) in KERNELS.items()
    },
}
CURVES = {
    "default": "branch, default",
    "jump-endpoint": "branch, endpoint",
    "jump-flow-sde": "branch, flow-sde",
    "jump-naive-noise": "branch, naive-noise",
}
CHAIN_CURVES = {"default": "chain, asfmc .9", "flow-sde": "chain, flow-sde", "naive-noise": "chain, naive-noise"}


def run_unit(arm: str, seed: int, threads: int) -> dict[str, Any]:
    """Trains one unit in a temporary folder and evaluates what it keeps at 1, 2 and 4 steps."""
    with tempfile.TemporaryDirectory() as folder:
        unit = Unit(folder, threads)
        unit.fmg(["train", *ARMS[arm].flags, "--seed", str(seed), "--run", "run", "--json"])
        train_cpu = unit.cpu_s
        report = json.loads(unit.fmg(["eval", "run", "--num", "500", "--steps", "1,2,4", "--json"]))
        metrics = unit.metrics("run")
    kept = {f"{r['reward']}_{r['part']}@{r['steps']}": round(r["mean"], 4) for r in report["results"]}
    return {
        "arm": arm,
        "seed": seed,
        "flags": list(ARMS[arm].flags),
        "threads": threads,
        "machine": machine(),
        "train_cpu_s": round(train_cpu, 1),
        "iterations_s": round(sum(line.get("time/iteration_s", 0.0) for line in metrics), 1),
        "kept": kept,
        "metrics": metrics,
    }


def course(unit: Mapping[str, Any], score: str) -> list[dict[str, float]]:
    """By evaluation: images, row-NFE and seconds spent until then, and the score on held-out prompts, of the moving
    average where the run keeps one."""
    images = nfe = seconds = 0.0
    points = []
    average = f"eval_ema/{score}_mean"
    key = average if any(average in line for line in unit["metrics"]) else f"eval/{score}_mean"
    for line in unit["metrics"]:
        if key in line:
            points.append({"iteration": line["iteration"], "images": images, "nfe": nfe, "seconds": seconds})
            points[-1]["score"] = line[key]
            continue
        # chains older than this log entry: 24 x 16 images, 4 evaluations and 3 trained rows per image
        nfe += line.get("nfe/rollout", 384 * 4) + (1 + BACKWARD) * line.get("nfe/trained_rows", 384 * 3)
        images += 384
        seconds += line.get("time/iteration_s", 0.0)
    return points


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """One row per arm: the score after the last iteration by seed, quality, what the kept checkpoint has at 1, 2 and 4
    steps, row-NFE to .9, and seconds."""
    heads = ["arm", "at the end, by seed", "quality at the end", "kept: 1, 2, 4 steps", "1000 row-NFE to .9, by seed"]
    rows = []
    for name, arm in ARMS.items():
        units = sorted((u for u in results if u["arm"] == name), key=lambda u: int(u["seed"]))
        if not units:
            continue
        reward, _, part = arm.score.rpartition("_")
        ends = [course(u, arm.score)[-1]["score"] for u in units]
        quality = [course(u, "shapes-quality") for u in units]
        to = [reached(course(u, arm.score), 0.9, "nfe") for u in units]
        kept = [mean(u["kept"][f"{reward}_{part}@{steps}"] for u in units) for steps in (1, 2, 4)]
        cells = [
            arm.about,
            ", ".join(f"{end:.3f}" for end in ends),
            ", ".join(f"{q[-1]['score']:.3f}" for q in quality if q) or "-",
            ", ".join(f"{value:.3f}" for value in kept),
            ", ".join("-" if value is None else f"{value / 1000:.1f}" for value in to),
            f"{mean(u['train_cpu_s'] for u in units):.0f}",
        ]
        rows.append(cells)
    return markdown([*heads, "CPU s of one core"], rows)


def _timed(metrics: Sequence[Mapping[str, Any]], times: Sequence[float]) -> list[dict[str, Any]]:
    return [{**line, "time/iteration_s": seconds} for line, seconds in zip(metrics, times, strict=False)]


def figure(results: Sequence[Mapping[str, Any]], chains: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Held-out strict accuracy over images, row-NFE and seconds: mean over seeds, band from lowest to highest.

    An iteration takes the shortest time of all seeds, because other processes slowed some of them down.
    """
    named = [(label, [u for u in results if u["arm"] == arm]) for arm, label in CURVES.items()]
    named += [(label, [u for u in chains if u["arm"] == arm]) for arm, label in CHAIN_CURVES.items()]
    bands = []
    for label, units in ((label, units) for label, units in named if units):
        times = zip(*([m.get("time/iteration_s", 0.0) for m in u["metrics"]] for u in units), strict=False)
        shortest = [min(values) for values in times]
        courses = [course({**u, "metrics": _timed(u["metrics"], shortest)}, "shapes_strict") for u in units]
        spent = {
            axis: [mean(at) for at in zip(*([p[axis] for p in c] for c in courses), strict=False)] for axis in BUDGETS
        }
        scores = list(zip(*([p["score"] for p in c] for c in courses), strict=False))
        bands.append(Band(label, len(bands), spent, *([pick(s) for s in scores] for pick in (mean, min, max))))
    budget_figure(bands, "held-out strict accuracy", path, height=4.6, level=0.9)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time; the cores are shared among them")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--list", action="store_true", help="print which units are missing, and start nothing")
    parser.add_argument("--report", action="store_true", help="print the tables and draw the figure, and start nothing")
    args = parser.parse_args()
    results: list[dict[str, Any]] = json.loads(args.out.read_text())["runs"] if args.out.is_file() else []
    wanted = [(arm, int(seed)) for arm in args.arms.split(",") for seed in args.seeds.split(",")]
    if unknown := [arm for arm, _ in wanted if arm not in ARMS]:
        parser.error(f"there is no arm '{unknown[0]}'; known: {', '.join(ARMS)}")
    done = {(u["arm"], u["seed"]) for u in results if u["flags"] == list(ARMS[u["arm"]].flags)}
    todo = [] if args.report else [unit for unit in wanted if unit not in done]
    if args.list:
        print("\n".join(f"{arm} {seed}" for arm, seed in todo))
        return
    threads = max(1, (os.cpu_count() or 1) // args.jobs)
    with ThreadPoolExecutor(args.jobs) as pool:
        for finished in as_completed([pool.submit(run_unit, *unit, threads) for unit in todo]):
            unit = finished.result()
            results = [u for u in results if (u["arm"], u["seed"]) != (unit["arm"], unit["seed"])] + [unit]
            store(args.out, results)
            last = course(unit, ARMS[unit["arm"]].score)[-1]["score"]
            print(f"{unit['arm']} seed {unit['seed']}: {last:.3f}, {unit['train_cpu_s']:.0f} CPU s", file=sys.stderr)
    print(table(results))
    chains = json.loads(CHAINS.read_text(encoding="utf-8"))["runs"]
    for arm in CHAIN_CURVES:
        to = [reached(course(u, "shapes_strict"), 0.9, "nfe") for u in chains if u["arm"] == arm]
        print(f"chain {arm}, 1000 row-NFE to .9:", ", ".join("-" if x is None else f"{x / 1000:.0f}" for x in to))
    figure(results, chains, FIGURE)


if __name__ == "__main__":
    main()
