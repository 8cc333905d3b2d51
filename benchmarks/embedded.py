"""Stochasticizers as chains on the embedded models: one training, several seeds, evaluated against the base in pairs.

Branched rollouts, the default now, are compared in branching.py.

Every arm trains with `fmg train` and is evaluated with `fmg eval RUN --against MODEL`: the native sampler, and the same
held-out prompts and seeds for run and base. All arms of a study see the same number of samples. An arm with a seed is a
unit: finished units are in the result file, so the script can be interrupted and resumed.

    python benchmarks/embedded.py [--arms default,shuffled] [--seeds 0,1,2] [--jobs 2] [--num 2000] [--list]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from comparison import figure, summary

from fmg.core.machine import machine

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Arm:
    """One way to train: flags of `fmg train` on top of the model's default recipe."""

    model: str
    flags: tuple[str, ...]
    about: str


@dataclass(frozen=True)
class Study:
    """Arms that are compared, the steps they are evaluated at, and the scores (reward, part) that the table shows."""

    name: str
    arms: Mapping[str, Arm]
    steps: str
    shown: tuple[tuple[str, str], ...]
    num: int
    shortened: tuple[str, ...] = ()
    """Flags of `fmg train` for all arms, after the arm's own."""

    def flags(self, arm: str) -> list[str]:
        """The arguments of `fmg train` for an arm, except seed and folder."""
        return ["--model", self.arms[arm].model, *self.arms[arm].flags, *self.shortened]

    @property
    def counts(self) -> list[int]:
        """The numbers of steps."""
        return [int(count) for count in self.steps.split(",")]


def settings(**values: object) -> tuple[str, ...]:
    return tuple(part for key, value in values.items() for part in ("--set", f"{key.replace('__', '.')}={value}"))


def chain(*flags: str, iterations: int = 40, every: int = 10) -> tuple[str, ...]:
    """Flags of a run whose rollouts are chains, as every default was before branched rollouts."""
    kind = settings(rollout__kind="chain", train__iterations=iterations, eval__every=every, eval__min_diversity=0.1)
    return (*kind, *flags)


def asfmc(rule: str, value: float) -> tuple[str, ...]:
    return ("--stochasticizer", "asfmc", *settings(**{f"stochasticizer__{rule}": value}))


MEANFLOW = "meanflow-shapes"
DEFAULT = asfmc("ratio", 0.9)
ARMS = {
    "default": Arm(MEANFLOW, chain(*DEFAULT), "asfmc, the exact form, anchor a = .9 s (the default for chains)"),
    "endpoint": Arm(MEANFLOW, chain("--stochasticizer", "asfmc-endpoint"), "asfmc-endpoint, a = 0"),
    "gap": Arm(MEANFLOW, chain(*asfmc("gap", 0.0147)), "asfmc, the paper's gap .0147"),
    "euler": Arm(MEANFLOW, chain("--stochasticizer", "asfmc-euler"), "asfmc-euler, the paper's .03 and .7"),
    "flow-sde": Arm(MEANFLOW, chain("--stochasticizer", "flow-sde"), "Flow-GRPO's sampler, k = .7"),
    "dance-sde": Arm(MEANFLOW, chain("--stochasticizer", "dance-sde"), "DanceGRPO's sampler, .3"),
    "cps": Arm(MEANFLOW, chain("--stochasticizer", "cps"), "Flow-CPS, k = .8"),
    "naive-noise": Arm(MEANFLOW, chain("--stochasticizer", "naive-noise"), "noise on top of the map, k = .7"),
    "shuffled": Arm(
        MEANFLOW, chain(*DEFAULT, *settings(train__shuffle_advantages="true")), "the default with shuffled advantages"
    ),
    "paper-clip": Arm(
        MEANFLOW,
        chain(*DEFAULT, *settings(objective__clip_range="1e-4")),
        "the default with the paper's clip range 1e-4",
    ),
    "scm": Arm("scm-shapes", chain(), "scm-shapes, asfmc-endpoint (its only one)"),
}
STUDY = Study(
    "embedded", ARMS, "2,4", (("shapes", "strict"), ("shapes-quality", "total"), ("shapes", "soft")), num=2000
)
COMPARED = tuple(arm for arm in ARMS if arm not in ("paper-clip", "scm"))
"""Arms of the comparison: one model, one recipe, one budget; only the stochasticizer differs, or the advantages."""


def run_arm(study: Study, name: str, seed: int, num: int, threads: int) -> dict[str, object]:
    """Trains and evaluates one arm in a temporary folder."""
    # run in the folder, so that the result contains no path of this machine
    with tempfile.TemporaryDirectory() as folder:
        unit = Unit(folder, threads)
        start = time.perf_counter()
        unit.fmg(["train", *study.flags(name), "--seed", str(seed), "--run", "run", "--json"])
        trained = time.perf_counter() - start
        report = json.loads(
            unit.fmg(["eval", "run", "--against", "base", "--num", str(num), "--steps", study.steps, "--json"])
        )
        lines = unit.metrics("run")
    return {
        "arm": name,
        "seed": seed,
        "flags": study.flags(name),
        "threads": threads,
        "machine": machine(),
        "train_s": trained,
        "total_s": time.perf_counter() - start,
        "eval": report,
        "metrics": lines,
    }


class Unit:
    """Commands of `fmg` in one folder, on a number of threads, and the CPU time that they took."""

    def __init__(self, folder: str, threads: int) -> None:
        self.folder = Path(folder)
        self.threads = threads
        self.cpu_s = 0.0

    def fmg(self, arguments: list[str]) -> str:
        """What a command prints; the script ends where it fails."""
        environment = {**os.environ, "OMP_NUM_THREADS": str(self.threads)}
        command = [sys.executable, "-m", "fmg", *arguments]
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
            process = subprocess.Popen(command, cwd=self.folder, env=environment, stdout=out, stderr=err)
            _, status, used = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            self.cpu_s += used.ru_utime + used.ru_stime
            out.seek(0)
            err.seek(0)
            if process.returncode:
                raise SystemExit(f"fmg {' '.join(arguments)} failed:\n{err.read()}")
            return out.read()

    def metrics(self, run: str) -> list[dict[str, Any]]:
        """The log of a run. Six digits are enough to plot, and halve the file."""
        lines = (self.folder / run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return [
            {key: float(f"{value:.6g}") if isinstance(value, float) else value for key, value in line.items()}
            for line in map(json.loads, lines)
        ]


def table(study: Study, results: list[dict[str, object]]) -> str:
    """One row per run and number of steps: base, tuned, paired difference with its interval."""
    lines = [
        "| arm | seed | steps | score | base | tuned | difference (95 %) | training |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for entry in sorted(results, key=lambda e: (list(study.arms).index(str(e["arm"])), e["seed"])):
        report = entry["eval"]
        assert isinstance(report, dict)
        after = {(r["steps"], r["reward"], r["part"]): r for r in report["results"]}
        before = {(r["steps"], r["reward"], r["part"]): r for r in report["against"]["results"]}
        for row in report["differences"]:
            key = (row["steps"], row["reward"], row["part"])
            if key[1:] not in study.shown:
                continue
            low, high = row["ci95"]
            lines.append(
                f"| {entry['arm']} | {entry['seed']} | {key[0]} | {' '.join(key[1:])} | {before[key]['mean']:.3f} "
                f"| {after[key]['mean']:.3f} | {row['mean']:+.3f} ({low:+.3f}, {high:+.3f}) "
                f"| {entry['train_s']:.0f} s, {entry['threads']} thread(s) |"
            )
    return "\n".join(lines)


def is_done(entry: Mapping[str, Any], study: Study, arm: str, seed: int, num: int) -> bool:
    """Whether a unit of the file is this one, trained and evaluated with the same settings."""
    same = (entry["arm"], entry["seed"], entry["eval"]["num"]) == (arm, seed, num)
    steps = {row["steps"] for row in entry["eval"]["results"]}
    return same and entry.get("flags") == study.flags(arm) and steps == set(study.counts)


def store(path: Path, results: list[dict[str, Any]]) -> None:
    """Replaces the result file in one step, so that an interruption loses no finished unit; notes in it stay."""
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    draft = path.with_suffix(".partial")
    draft.write_text(json.dumps({**known, "schema": 2, "runs": results}) + "\n", encoding="utf-8")
    draft.replace(path)


def main(study: Study, about: str | None, compared: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", default=",".join(compared or study.arms))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time; the cores are shared among them")
    parser.add_argument("--num", type=int, default=study.num, help="held-out images per point")
    parser.add_argument(
        "--set", action="append", default=[], metavar="K=V", help="for all arms, such as a shorter run to try it"
    )
    parser.add_argument("--out", type=Path, default=RESULTS / f"{study.name}.json")
    parser.add_argument("--figure", type=Path, help="a figure to write: .png, .svg or .pdf")
    parser.add_argument("--list", action="store_true", help="print which units are missing, and start nothing")
    args = parser.parse_args()
    study = replace(study, shortened=tuple(word for text in args.set for word in ("--set", text)))
    results: list[dict[str, Any]] = json.loads(args.out.read_text())["runs"] if args.out.is_file() else []
    wanted = [(arm, int(seed)) for seed in args.seeds.split(",") for arm in args.arms.split(",")]
    if unknown := [arm for arm, _ in wanted if arm not in study.arms]:
        parser.error(f"there is no arm '{unknown[0]}'; known: {', '.join(study.arms)}")
    todo = [job for job in wanted if not any(is_done(entry, study, *job, args.num) for entry in results)]
    print(f"{len(wanted) - len(todo)} of {len(wanted)} units are done", file=sys.stderr)
    if args.list:
        print("\n".join(f"{arm} {seed}" for arm, seed in todo))
        return
    threads = max(1, (os.cpu_count() or 1) // args.jobs)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(args.jobs) as pool:
        running = [pool.submit(run_arm, study, *job, args.num, threads) for job in todo]
        try:
            for finished in as_completed(running):
                entry = finished.result()
                results = [e for e in results if (e["arm"], e["seed"]) != (entry["arm"], entry["seed"])] + [entry]
                store(args.out, results)
                print(f"{entry['arm']} seed {entry['seed']}: {entry['total_s']:.0f} s", file=sys.stderr, flush=True)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    chosen = [e for e in results if any(is_done(e, study, *job, args.num) for job in wanted)]
    print(table(study, chosen))
    print()
    names = {name: arm.about for name, arm in study.arms.items()}
    print(summary(chosen, names, study.counts, study.shown[:2]))
    spent = sum(entry.get("total_s", entry["train_s"]) for entry in chosen)
    print(f"\n{len(chosen)} units, {spent / 60 / args.jobs:.0f} minutes with {args.jobs} at a time")
    if args.figure:
        figure(chosen, names, study.counts, *study.shown[:2], args.figure)


if __name__ == "__main__":
    main(STUDY, __doc__, COMPARED)
