"""`python scripts/kills.py --kills 200`: kills training runs at random moments and resumes them.

Chains and branched rollouts take turns. Each run must end like an undisturbed run of its kind: the same metrics and
weights, bit for bit, the same files, a report, and nothing outside its folder. A quarter of the signals end a run
cleanly (SIGTERM, SIGHUP, SIGUSR1, SIGINT); the others are SIGKILL, and `--kills` counts these. A run that is killed
before its first state is refused in one line, and is started again.

Processes are forked from one that has imported everything, so that a kill costs a second or two.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import itertools
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file

from fmg import Recipe, train
from fmg.core.errors import UsageError
from fmg.core.files import digest
from fmg.data.checkpoints import read_index
from fmg.data.resume_points import check_resumable, ended_short
from fmg.data.run_folder import RunFolder, is_run
from fmg.training.api import resume

PRELOADED = [
    "diffusers.pipelines.flux.pipeline_flux",
    "fmg.models.flux.model",
    "matplotlib.backends.backend_agg",
    "peft",
]
ORDERLY = [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGINT]
COMMON: dict[str, object] = {
    "train.device": "cpu",
    "train.iterations": 3,
    "train.state_every": 2,
    "train.ema_decay": 0.9,
    "lora.rank": 2,
    "rewards": ["jpeg-compressibility"],
    "rollout.groups": 2,
    "rollout.group_size": 2,
    "eval.num": 2,
    "eval.every": 2,
    "eval.rewards": [],
}
RECIPES: dict[str, dict[str, object]] = {
    # dropout uses the global generator, and the rollouts come from an average of their own
    "chain": {
        **COMMON,
        "objective": {"name": "meanflow-nft", "draws": 1, "old_decay_rise": 0.2},
        "lora.dropout": 0.2,
        "rollout.kind": "chain",
        "rollout.steps": 2,
    },
    # steps and prompts are chosen by earlier rewards
    "branch": {
        **COMMON,
        # its iterations are short
        "train.iterations": 6,
        "train.state_every": 1,
        "eval.every": 3,
        "rollout.kind": "branch",
        "rollout.steps": 3,
        "rollout.branch.steps": "adaptive",
        "rollout.branch.completion": "grid",
        "rollout.prompt_sampling": "dynamic",
    },
}


class LostError(AssertionError):
    """A run did not end as it should."""


def start(run: Path, kind: str) -> int:
    """Trains, or resumes, in a separate process; returns its id. Exit codes: 0 finished, 3 interrupted, 1 error."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        result = resume(run) if is_run(run) else train(Recipe.default(**RECIPES[kind]), run)
        code = 3 if result.interrupted else 0
    except KeyboardInterrupt:
        code = 3
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def ended(child: int) -> int:
    """Waits; returns the exit code, or minus the signal."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def strike(child: int, after: float, number: int) -> int | None:
    """Sends a signal after a delay; returns the exit code of the process, or None if it had ended before."""
    until = time.monotonic() + after
    while time.monotonic() < until:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
            if code:
                raise LostError(f"an undisturbed process ended with {code}")
            return None
        time.sleep(0.002)
    os.kill(child, number)
    return ended(child)


def record(run: Path) -> dict[str, object]:
    """What two equal runs have in common."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    weights = {
        f"{file.relative_to(run)} {name}": x.flatten().tolist()
        for file in sorted(run.rglob("*.safetensors"))
        for name, x in load_file(file).items()
    }
    return {
        "state": RunFolder(run).state().state,
        "files": sorted(str(path.relative_to(run)) for path in run.rglob("*")),
        "metrics": [{k: v for k, v in line.items() if not k.startswith("time/")} for line in lines],
        "weights": weights,
        "index": read_index(run),
    }


def snapshot(root: Path, run: Path) -> dict[str, str]:
    """Digests of all files below `root` that are not the run's."""
    files = [path for path in sorted(root.rglob("*")) if path.is_file() and run not in path.parents]
    return {str(path): digest(path) for path in files}


def check(run: Path, reference: dict[str, object]) -> None:
    """Checks that a run ended like the undisturbed one.

    Raises:
        LostError: it did not.
    """
    found = record(run)
    for key, value in reference.items():
        if found[key] != value:
            raise LostError(f"{key} of {run} differ: {str(found[key])[:2000]} and {str(value)[:2000]}")


def main(kills: int, seed: int, root: Path, kinds: Sequence[str] = tuple(RECIPES)) -> dict[str, int]:
    """Kills runs until there were `kills` kills, and compares each run when it has ended; returns counts of events."""
    for name in PRELOADED:
        importlib.import_module(name)
    # a collection in a child would touch, and so copy, the pages that it shares
    gc.freeze()
    chance = random.Random(seed)
    lengths: dict[str, float] = {}
    references: dict[str, dict[str, object]] = {}
    for kind in kinds:
        began = time.monotonic()
        if code := ended(start(root / kind, kind)):
            raise LostError(f"the reference of {kind} ended with {code}")
        lengths[kind] = time.monotonic() - began
        references[kind] = record(root / kind)
    turns = itertools.cycle(kinds)
    kind = next(turns)
    run = root / "run"
    (root / "thesis.txt").write_text("precious")
    outside = snapshot(root, run)
    counts = dict.fromkeys(["kills", "orderly", "resumed", "anew", "completed", "compared"], 0)
    finishing = False
    while counts["kills"] < kills or finishing:
        if is_run(run):
            counts["completed"] += ended_short(run)
            counts["resumed"] += 1
        child = start(run, kind)
        if counts["kills"] >= kills:
            code: int | None = ended(child)
            if code:
                raise LostError(f"an undisturbed process ended with {code}")
            code = None
        else:
            number = chance.choice(ORDERLY) if chance.random() < 0.25 else signal.SIGKILL
            code = strike(child, chance.uniform(0, 1.1 * lengths[kind]), number)
        if code == -signal.SIGKILL:
            counts["kills"] += 1
        elif code is not None:
            # before it handles signals, a signal kills it like any process
            if code not in (0, 3, -number):
                raise LostError(f"a process that was sent {number} ended with {code}")
            counts["orderly"] += 1
        finishing = not _over(run, counts)
        if not finishing:
            if is_run(run) and RunFolder(run).state().state == "finished":
                check(run, references[kind])
                counts["compared"] += 1
            shutil.rmtree(run, ignore_errors=True)
            kind = next(turns)
        if snapshot(root, run) != outside:
            raise LostError("a file outside of the run was touched")
        sys.stderr.write(json.dumps(counts) + "\n")
    return counts


def _over(run: Path, counts: dict[str, int]) -> bool:
    """Whether a run has ended, or has nothing to resume from, which is refused in one line."""
    if is_run(run) and ended_short(run):
        return False
    try:
        check_resumable(run)
    except UsageError as error:
        if len(str(error).splitlines()) != 1:
            raise LostError(f"more than one line: {error}") from None
        counts["anew"] += "finished" not in error.what
        return True
    return False


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", default=",".join(RECIPES))
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["FMG_CACHE"] = f"{folder}/cache"
        place = Path(folder) / "place"
        place.mkdir()
        sys.stdout.write(json.dumps(main(given.kills, given.seed, place, given.kinds.split(","))) + "\n")
