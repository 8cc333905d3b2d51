"""Stochasticizers on the embedded models: the same training, several seeds, evaluated against the base in pairs.

Every arm trains with `fmg train` and is evaluated with `fmg eval RUN --against MODEL`: the native sampler, and the same
held-out prompts and seeds for run and base. Finished arms are read from the result file, so it can be interrupted.

    python benchmarks/embedded.py [--arms default,shuffled] [--seeds 0,1,2] [--jobs 2] [--num 2000]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

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


def settings(**values: object) -> tuple[str, ...]:
    return tuple(part for key, value in values.items() for part in ("--set", f"{key.replace('__', '.')}={value}"))


MEANFLOW = "meanflow-shapes"
ARMS = {
    "default": Arm(MEANFLOW, (), "asfmc, anchor a = .9 s (the model's default)"),
    "endpoint": Arm(MEANFLOW, ("--stochasticizer", "asfmc-endpoint"), "asfmc-endpoint, a = 0"),
    "gap": Arm(
        MEANFLOW, ("--stochasticizer", "asfmc", *settings(stochasticizer__gap=0.0147)), "asfmc, the paper's gap .0147"
    ),
    "euler": Arm(MEANFLOW, ("--stochasticizer", "asfmc-euler"), "asfmc-euler, the paper's .03 and .7"),
    "shuffled": Arm(MEANFLOW, settings(train__shuffle_advantages="true"), "the default with shuffled advantages"),
    "paper-clip": Arm(MEANFLOW, settings(objective__clip_range="1e-4"), "the default with the paper's clip range 1e-4"),
    "scm": Arm("scm-shapes", (), "scm-shapes, asfmc-endpoint (its only one)"),
}
STUDY = Study(
    "embedded", ARMS, "2,4", (("shapes", "strict"), ("shapes", "soft"), ("shapes-quality", "total")), num=2000
)


def run_arm(study: Study, name: str, seed: int, num: int, threads: int) -> dict[str, object]:
    """Trains and evaluates one arm in a temporary folder."""
    arm = study.arms[name]
    # run in the folder, so that the result names no path of this machine
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        _fmg(
            ["train", "--model", arm.model, "--seed", str(seed), "--run", "run", "--json", *arm.flags], folder, threads
        )
        trained = time.perf_counter() - start
        report = json.loads(
            _fmg(
                ["eval", "run", "--against", "base", "--num", str(num), "--steps", study.steps, "--json"],
                folder,
                threads,
            )
        )
        lines = [_short(json.loads(line)) for line in (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()]
    return {"arm": name, "seed": seed, "threads": threads, "train_s": trained, "eval": report, "metrics": lines}


def _short(metrics: dict[str, object]) -> dict[str, object]:
    """Six digits are enough to plot, and halve the file."""
    return {key: float(f"{value:.6g}") if isinstance(value, float) else value for key, value in metrics.items()}


def _fmg(arguments: list[str], folder: str, threads: int) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "fmg", *arguments],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.exit(f"fmg {' '.join(arguments)} failed:\n{done.stderr}")
    return done.stdout


def table(study: Study, results: list[dict[str, object]]) -> str:
    """One row a run and number of steps: base, tuned, paired difference with its interval."""
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


def main(study: Study, about: str | None) -> None:
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", default=",".join(study.arms))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time; the cores are shared among them")
    parser.add_argument("--num", type=int, default=study.num)
    parser.add_argument("--out", type=Path, default=RESULTS / f"{study.name}.json")
    args = parser.parse_args()
    results: list[dict[str, object]] = json.loads(args.out.read_text())["runs"] if args.out.is_file() else []
    done = {(entry["arm"], entry["seed"]) for entry in results}
    threads = max(1, (os.cpu_count() or 1) // args.jobs)
    wanted = [(arm, int(seed)) for seed in args.seeds.split(",") for arm in args.arms.split(",")]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(args.jobs) as pool:
        todo = [job for job in wanted if job not in done]
        for entry in pool.map(lambda job: run_arm(study, *job, args.num, threads), todo):
            results.append(entry)
            machine = {"machine": platform.machine(), "cores": os.cpu_count(), "python": platform.python_version()}
            args.out.write_text(json.dumps({"schema": 1, **machine, "runs": results}) + "\n", encoding="utf-8")
            print(f"{entry['arm']} seed {entry['seed']} done", file=sys.stderr, flush=True)
    print(table(study, results))


if __name__ == "__main__":
    main(STUDY, __doc__)
