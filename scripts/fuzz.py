"""`python scripts/fuzz.py --minutes 5 [--seed S] [--kinds run,artifact]`: mutates what a user can give to fmg.

A trial copies a good run folder, artifact, recipe, prompt file or picture, mutates one file of the copy and runs one
command on it. After damage, as by a disk or a network, the result must be unchanged or the command must end
with one line; after an edit, as by a person or a program, the result may also differ. Never accepted: exit code 70, a
traceback, an exception, more than one error line, a trial that exceeds its limit of time or memory.

`--trials 1000 --kinds run,artifact` runs 1000 trials in all; `--only run:17` repeats one. Counts by kind are
printed, and the exit code is 1 when a trial failed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
from PIL import Image  # noqa: E402
from safetensors.numpy import load_file  # noqa: E402

from fmg import Recipe, train  # noqa: E402
from fmg.core.events import Event, IterationDone  # noqa: E402
from fmg.core.json_io import sealed  # noqa: E402
from fmg.inference.artifact.layout import file_entry  # noqa: E402
from fmg.inference.artifact.manifest import MANIFEST  # noqa: E402
from tests.support.cli import Invocation, fmg  # noqa: E402
from tests.support.tiny_artifact import build_tiny_artifact  # noqa: E402

SECONDS = 60.0
"""Longest time of one trial."""
MEMORY = 1 << 30
"""Most bytes that one trial may add to the process."""
PROMPT = "a red circle"
RECIPE: dict[str, object] = {
    "train.device": "cpu",
    "train.iterations": 2,
    "train.state_every": 1,
    "lora.rank": 2,
    "rewards": ["jpeg-compressibility"],
    "rollout.groups": 2,
    "rollout.group_size": 2,
    "rollout.steps": 2,
    "eval.num": 2,
    "eval.every": 1,
    "eval.rewards": [],
}
VALUES: tuple[object, ...] = (
    *(
        None,
        True,
        False,
        0,
        -1,
        1,
        3,
        10**6,
        10**18,
        10**400,
        0.5,
        -1e300,
        float("nan"),
        "",
        "x",
        "../x",
        "/etc/passwd",
    ),
    *("\x00", "\x1b[31m", "\ud800", "x" * 10_000, [], [1], {}, {"a": 1}, [[]] * 1000),
)
TEXTS = (
    *(
        "!!python/object:os.system",
        "!!bool x",
        "!!int ''",
        "&a [*a]",
        "*b",
        "~",
        ".inf",
        "0x",
        "1e999",
        "{",
        "}",
        "[",
        "- ",
    ),
    *(
        "\t",
        "\x00",
        "\x1b[2J",
        "\ud83d",
        "\ufeff",
        "\u2028",
        "é",
        "<<: *a",
        "? a",
        "%YAML 9",
        "--- ",
        "x" * 5000,
        "'",
        '"',
    ),
)

Work = Callable[[Path], object]


@dataclass(frozen=True)
class Task:
    """A command on the copy of a subject.

    Attributes:
        name: for people.
        words: the words of the command, given the path of the copy.
        result: what it made, to compare; None if the result is not compared.
        verdict: whether exit code 1 without an error line is also a result.
    """

    name: str
    words: Callable[[Path], Sequence[str]]
    result: Work | None = None
    verdict: bool = False


@dataclass
class Kind:
    """A kind of subject: how to make a good one in a folder, how to edit it, and which commands to run on it."""

    name: str
    make: Work
    tasks: Sequence[Task]
    edit: Callable[[random.Random, Path], str]
    expected: dict[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Trial:
    """The outcome of one trial: `same`, `line`, `other` (accepted after an edit), or `FAILED`."""

    outcome: str
    said: str


class TooLongError(BaseException):
    """A trial is over its time; no handler of `Exception` may swallow it."""


# ---- mutations


def damage(rng: random.Random, file: Path) -> str:
    """Damages a file as a disk or a transfer may."""
    data = bytearray(file.read_bytes())
    at = rng.randrange(max(1, len(data)))
    length = rng.choice((1, 16, 512, 4096, len(data) // 2))
    how = rng.choice(("bit", "bit", "bit", "zeros", "cut", "longer", "repeat", "noise", "empty", "gone"))
    if how == "bit" and data:
        data[at] ^= 1 << rng.randrange(8)
    elif how == "zeros":
        data[at : at + length] = bytes(len(data[at : at + length]))
    elif how == "cut":
        del data[at:]
    elif how == "longer":
        data += rng.randbytes(length)
    elif how == "repeat":
        data[at:at] = data[at : at + length]
    elif how == "noise":
        data[at : at + length] = rng.randbytes(len(data[at : at + length]))
    stat = file.stat()
    if how == "gone":
        file.unlink()
    else:
        file.write_bytes(b"" if how == "empty" else data)
        if rng.random() < 0.5:
            # a copy that keeps the times
            os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    return f"{how} at {at}"


def replace(rng: random.Random, file: Path) -> str:
    """Puts something else under the name of a file."""
    how = rng.choice(("folder", "link to nothing", "link to itself", "link out", "namesake"))
    others = [path for path in sorted(file.parent.iterdir()) if path.is_file() and path != file]
    content = file.read_bytes()
    file.unlink()
    if how == "folder":
        file.mkdir()
    elif how == "link to nothing":
        file.symlink_to("nothing")
    elif how == "link to itself":
        file.symlink_to(file.name)
    elif how == "namesake" and others:
        shutil.copyfile(rng.choice(others), file)
    else:
        (outside := file.parent.parent.parent / "outside").write_bytes(content)
        file.symlink_to(outside)
    return how


def edit_value(rng: random.Random, value: Any) -> tuple[Any, str]:
    """A JSON value in which one entry, at any depth, is replaced, renamed or removed."""
    if isinstance(value, dict) and value and rng.random() < 0.95:
        key = rng.choice(sorted(value))
        if rng.random() < 0.6:
            value[key], how = edit_value(rng, value[key])
            return value, f"{key}.{how}"
        what = rng.choice(("delete", "rename", "set"))
        old = value.pop(key)
        if what == "rename":
            value[rng.choice((f"{key}x", "../x", "", "\x00"))] = old
        elif what == "set":
            value[key] = rng.choice(VALUES)
        return value, f"{key}: {what}"
    if isinstance(value, list) and value and rng.random() < 0.9:
        at = rng.randrange(len(value))
        if rng.random() < 0.3:
            return [*value, *[value[at]] * rng.choice((1, 2000))], "repeated"
        value[at], how = edit_value(rng, value[at])
        return value, f"[{at}].{how}"
    new = rng.choice(VALUES)
    return new, f"= {new!r:.30}"


def edit_json(rng: random.Random, file: Path) -> str:
    """Edits a JSON document, or one line of JSON lines, and renews the seal of half of those that have one."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.suffix == ".jsonl" else [file.read_text("utf-8")]
    at = rng.randrange(len(lines))
    value, how = edit_value(rng, json.loads(lines[at]))
    seal = isinstance(value, dict) and "sha256" in value and rng.random() < 0.5
    if seal:
        value = sealed({key: entry for key, entry in value.items() if key != "sha256"})
    lines[at] = json.dumps(value)
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return f"{how}{', sealed' if seal else ''}"


def edit_text(rng: random.Random, file: Path) -> str:
    """Edits a line of a text, or characters in it."""
    lines = file.read_text(encoding="utf-8", errors="surrogateescape").splitlines() or [""]
    at, new = rng.randrange(len(lines)), rng.choice(TEXTS)
    how = rng.choice(("delete", "repeat", "value", "insert", "indent", "line", "many"))
    before = lines[at].partition(":")[0]
    place = rng.randrange(len(lines[at]) + 1)
    lines[at : at + 1] = {
        "delete": [],
        "repeat": [lines[at]] * 2,
        "value": [f"{before}: {new}"],
        "insert": [lines[at][:place] + new + lines[at][place:]],
        "indent": ["  " + lines[at]],
        "line": [lines[at], new],
        "many": [lines[at]] * 3000,
    }[how]
    file.write_bytes("\n".join(lines).encode("utf-8", errors="surrogatepass"))
    return f"{how} {new!r:.30} in line {at + 1}"


def edit_folder(rng: random.Random, file: Path) -> str:
    """Edits a file of a folder by what it is, or puts something else in its place."""
    if rng.random() < 0.2:
        return replace(rng, file)
    if file.suffix in (".json", ".jsonl"):
        return edit_json(rng, file)
    return edit_text(rng, file) if file.suffix in (".yaml", ".md", ".txt", "") else damage(rng, file)


def edit_artifact(rng: random.Random, file: Path) -> str:
    """Edits a file of an artifact; half of the time the manifest is updated to match, as an attacker could."""
    if file.name == MANIFEST or rng.random() < 0.5:
        return edit_folder(rng, file)
    how = edit_folder(rng, file) if rng.random() < 0.3 else damage(rng, file)
    folder = next(parent for parent in file.parents if (parent / MANIFEST).is_file())
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    if file.is_file():
        stated = file_entry(file)
        manifest["files"][file.relative_to(folder).as_posix()] = {"sha256": stated.sha256, "size": stated.size}
    content = sealed({key: value for key, value in manifest.items() if key != "sha256"})
    (folder / MANIFEST).write_text(json.dumps(content), encoding="utf-8")
    return f"{how}, as the manifest says"


# ---- what is mutated


def make_run(folder: Path) -> None:
    """A run that was interrupted after the first of its two iterations."""

    def stop(event: Event) -> None:
        if isinstance(event, IterationDone):
            raise KeyboardInterrupt

    assert train(Recipe.default("meanflow-shapes", **RECIPE), folder / "run", stop).interrupted


def make_recipe(folder: Path) -> None:
    """The recipe of that run."""
    text = Recipe.default("meanflow-shapes", **RECIPE).to_yaml()
    (folder / "recipe.yaml").write_text(text, encoding="utf-8")


def make_prompts(folder: Path) -> None:
    """A prompt file of each form."""
    prompts = ["a red circle", "a blue square left of a green triangle", "a “quoted” é"]
    (folder / "prompts.txt").write_text("\n".join(prompts) + "\n", encoding="utf-8")
    lines = [json.dumps({"prompt": prompt, "tag": "shapes"}) for prompt in prompts]
    (folder / "prompts.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def make_pictures(folder: Path) -> None:
    """A picture of each of the usual formats."""
    pixels = np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels)
    for suffix in ("png", "jpg", "webp", "gif", "tiff", "bmp"):
        picture.save(folder / f"picture.{suffix}")


def pixels_of(place: Path) -> object:
    """A digest of all pictures that `generate` wrote."""
    digest = hashlib.sha256()
    for file in sorted((place / "out").glob("*.png")):
        with Image.open(file) as picture:
            digest.update(picture.tobytes())
    return digest.hexdigest()


def trained(place: Path) -> object:
    """The weights of the resumed run, by file and name."""
    weights = {}
    for file in sorted((place / "run").glob("checkpoints/*/*.safetensors")):
        for name, tensor in load_file(file).items():
            weights[f"{file.relative_to(place)} {name}"] = hashlib.sha256(tensor.tobytes()).hexdigest()
    return weights


def generate(name: str, *more: str) -> Task:
    """`fmg generate` from the subject called `name`."""
    words = ("generate", PROMPT, "--seed", "3", *more)
    return Task("generate", lambda place: (*words, "--from", str(place / name), "--out", str(place / "out")), pixels_of)


def kinds() -> dict[str, Kind]:
    """All kinds by name."""
    look = (
        Task("runs", lambda place: ("runs", str(place))),
        Task("report", lambda place: ("report", str(place / "run"))),
        Task("doctor run", lambda place: ("doctor", "run", str(place / "run")), verdict=True),
    )
    resumed = Task("resume", lambda place: ("train", "--resume", str(place / "run")), trained)
    artifact = (
        generate("artifact"),
        Task("verify", lambda place: ("verify", str(place / "artifact"), "--alone"), verdict=True),
    )
    dry = ("train", "--dry-run", "--run")

    def planned(flag: str, name: str) -> Task:
        return Task(name, lambda place: (*dry, str(place / "new"), flag, str(place / name)))

    def scored(name: str) -> Task:
        return Task(
            name, lambda place: ("score", str(place / name), "--reward", "jpeg-compressibility", "--prompt", "a")
        )

    suffixes = ("png", "jpg", "webp", "gif", "tiff", "bmp")
    every = (
        Kind(
            "run",
            make_run,
            (generate("run", "--device", "cpu"), *look, generate("run", "--device", "cpu"), resumed),
            edit_folder,
        ),
        Kind("artifact", lambda folder: build_tiny_artifact(folder / "artifact"), artifact, edit_artifact),
        Kind("recipe", make_recipe, (planned("--config", "recipe.yaml"),), edit_text),
        Kind("prompts", make_prompts, tuple(planned("--prompts", f"prompts.{s}") for s in ("txt", "jsonl")), edit_text),
        Kind("image", make_pictures, tuple(scored(f"picture.{suffix}") for suffix in suffixes), damage),
    )
    return {kind.name: kind for kind in every}


# ---- trials


class Fuzz:
    """Good subjects in a separate folder, and trials on copies of them.

    Args:
        folder: empty, for everything; it becomes the working directory.
        names: of the kinds.
        seed: with a kind and a number, it decides a trial.
    """

    def __init__(self, folder: Path, names: Sequence[str], seed: int = 0) -> None:
        self.folder, self.seed = folder, seed
        self.kinds = {name: kinds()[name] for name in names}
        os.environ["FMG_CACHE"] = str(folder / "cache")
        os.chdir(folder)
        for kind in self.kinds.values():
            (good := folder / "good" / kind.name).mkdir(parents=True)
            kind.make(good)
            for task in kind.tasks:
                place = self._copy(kind)
                done, _ = run(task, place)
                if done is None or done.code not in (0, 1 if task.verdict else 0):
                    raise AssertionError(f"{task.name} of a good {kind.name} fails: {done}")
                kind.expected[task.name] = task.result(place) if task.result else None

    def trial(self, name: str, number: int) -> Trial:
        """Mutates, runs and judges."""
        kind, rng = self.kinds[name], random.Random(f"{self.seed} {name} {number}")
        place = self._copy(kind)
        task = rng.choice(kind.tasks)
        files = sorted(path for path in place.rglob("*") if path.is_file())
        named = [file for file in files if file.name == task.name]
        file = rng.choice(named or files)
        edited = rng.random() < 0.4
        how = (kind.edit if edited else damage)(rng, file)
        said = f"{name}:{number} {task.name}, {file.relative_to(place)} {'edited' if edited else 'damaged'}: {how}"
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        done, problem = run(task, place)
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
        if grown > MEMORY:
            problem = f"{grown / 1e9:.1f} GB of memory"
        if problem or done is None:
            return Trial("FAILED", f"{said}: {problem}")
        if done.code in (1, 2) and not (task.verdict and done.code == 1 and "error: " not in done.stderr):
            return Trial("line", said)
        if task.result is None or task.result(place) == kind.expected[task.name]:
            return Trial("same", said)
        return Trial("other", said) if edited else Trial("FAILED", f"{said}: another result without an error")

    def _copy(self, kind: Kind) -> Path:
        place = self.folder / "trial" / kind.name
        shutil.rmtree(place, ignore_errors=True)
        return Path(shutil.copytree(self.folder / "good" / kind.name, place))


def run(task: Task, place: Path) -> tuple[Invocation | None, str]:
    """Runs a task; returns its outcome and what is wrong with it."""
    try:
        with limited(SECONDS), warnings.catch_warnings():
            warnings.simplefilter("default")
            done = fmg(*task.words(place))
    except TooLongError:
        return None, f"more than {SECONDS:.0f} s"
    except BaseException as error:
        return None, f"{type(error).__name__}: {error!s:.200}"
    both = done.stdout + done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    if done.code not in (0, 1, 2) or "Traceback (most recent" in both or "Unexpected " in "".join(errors):
        return done, f"exit {done.code}: {done.stderr[-300:]}"
    if len(errors) != (done.code != 0) and not (task.verdict and done.code == 1 and not errors):
        return done, f"exit {done.code} with {len(errors)} error lines: {done.stderr[-300:]}"
    if len(done.stderr) > 20_000 or any(ord(char) < 32 and char not in "\n\r\t" for char in done.stderr):
        return done, f"stderr is too long or has control characters: {done.stderr[:200]!r}"
    return done, ""


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Ends the body with a `TooLongError` when its time is up."""

    def ring(number: int, frame: FrameType | None) -> None:
        raise TooLongError

    former = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, former)


def table(counts: Mapping[str, Counter[str]]) -> str:
    """Counts by kind."""
    columns = ("same", "line", "other", "FAILED")
    head = f"{'':<10}" + "".join(f"{column:>8}" for column in (*columns, "trials"))
    rows = [
        f"{name:<10}" + "".join(f"{count[column]:>8}" for column in columns) + f"{count.total():>8}"
        for name, count in counts.items()
    ]
    return "\n".join([head, *rows])


def say(text: str) -> None:
    """A line on stdout."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=None, help="how long to run")
    parser.add_argument("--trials", type=int, default=None, help="number of trials, over all kinds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", default=",".join(kinds()), help="kinds to run, separated by commas")
    parser.add_argument("--only", default=None, metavar="KIND:N", help="repeat one trial and describe it")
    args = parser.parse_args()
    names = [args.only.partition(":")[0]] if args.only else args.kinds.split(",")
    if unknown := sorted({*names} - kinds().keys()):
        parser.error(f"unknown kind {unknown[0]}; known: {', '.join(kinds())}")
    with tempfile.TemporaryDirectory() as folder:
        fuzz = Fuzz(Path(folder), names, args.seed)
        if args.only:
            trial = fuzz.trial(names[0], int(args.only.partition(":")[2]))
            say(f"{trial.outcome} {trial.said}")
            return trial.outcome == "FAILED"
        counts: dict[str, Counter[str]] = {name: Counter() for name in names}
        until = time.monotonic() + 60 * args.minutes if args.minutes is not None else None
        wanted = args.trials if args.trials is not None or until is not None else 500
        number = 0
        while (until is None or time.monotonic() < until) and (wanted is None or number < wanted):
            name = names[number % len(names)]
            trial = fuzz.trial(name, number // len(names))
            counts[name][trial.outcome] += 1
            number += 1
            if trial.outcome == "FAILED":
                say(trial.said)
        os.chdir(ROOT)
    say(table(counts))
    return any(count["FAILED"] for count in counts.values())


if __name__ == "__main__":
    sys.exit(main())
