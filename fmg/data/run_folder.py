"""Run folders: what a training run writes and where, and its state. Imports no torch.

Layout: `recipe.yaml`, `run.json` (state), `environment.json`, `metrics.jsonl`, `samples/`, `checkpoints/`, `curve.png`,
`before_after.png`, `report.html`.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

from fmg.core.display import LONGEST_VALUE, html_picture, html_text
from fmg.core.errors import CheckpointError, UsageError, reason, suggestion
from fmg.core.files import RECIPE, lock, refusal_of
from fmg.core.json_io import read_object, sealed, unsealed, write_json

if TYPE_CHECKING:
    from fmg.recipe.document import Plain

RUNS = Path("runs")
"""Default folder of runs, relative to the working directory."""
SCHEMA = 1
State = Literal["running", "finished", "interrupted", "failed"]
_SHOWN_WIDTH = 720
STATES: tuple[State, ...] = get_args(State)
_SAMPLE = re.compile(r"iteration-(\d+)\.png")


@dataclass(frozen=True)
class RunState:
    """`run.json`: the trained model, when the run started (ISO 8601), and its state."""

    schema: int
    model: str
    created: str
    state: State

    @property
    def began(self) -> float:
        """`created` in seconds since 1970.

        Raises:
            ValueError: `created` is not a date.
        """
        return datetime.fromisoformat(self.created).timestamp()


@dataclass(frozen=True, repr=False)
class RunFolder:
    """The folder of one run; works wherever a path does."""

    path: Path

    @classmethod
    def create(
        cls, folder: str | Path | None, model: str, *, root: Path = RUNS, now: datetime | None = None
    ) -> RunFolder:
        """Creates the folder of a new run, with the state `running`.

        Args:
            folder: None takes `<root>/<model>-<yyyymmdd-hhmmss>`, with `-2`, `-3`, ... if that name is taken.
            model: name of the model.
            root: where unnamed runs go.
            now: the start of the run; None takes the current time.

        Raises:
            UsageError: `folder` is not free, or cannot be created. Nothing is overwritten.
        """
        began = now or datetime.now().astimezone()
        cls.check_free(folder)
        try:
            path = _claim(root / f"{model}-{began:%Y%m%d-%H%M%S}") if folder is None else Path(folder)
            run = cls(path)
            run.samples.mkdir(parents=True)
            run.checkpoints.mkdir()
            _write_state(path, RunState(SCHEMA, model, began.isoformat(), "running"))
        except OSError as error:
            where = folder or root
            raise UsageError(f"'{where}' cannot be used for a run: {error.strerror}", "Choose another --run.") from None
        return run

    @staticmethod
    def check_free(folder: str | Path | None) -> None:
        """Checks that `create` would succeed: `folder` (None: one under `RUNS`) is missing or empty, and writable.

        Raises:
            UsageError: it contains a run or anything else, or cannot be created.
        """
        path = RUNS if folder is None else Path(folder)
        if (reason := refusal_of(path)) is not None:
            raise UsageError(f"'{path}' cannot be used for a run: {reason}", "Choose another --run.")
        if folder is None:
            return
        try:
            holds_run = is_run(path)
            taken = path.exists() and (not path.is_dir() or any(path.iterdir()))
        except OSError as error:
            raise UsageError(f"'{path}' cannot be used for a run: {error.strerror}", "Choose another --run.") from None
        if holds_run:
            raise UsageError(f"'{path}' already contains a run", "Choose another --run; a run is never overwritten.")
        if taken:
            raise UsageError(f"'{path}' exists and is not a run folder", "Choose a --run that does not exist yet.")

    def __fspath__(self) -> str:
        return str(self.path)

    def __repr__(self) -> str:
        return f"RunFolder('{self.path}')"

    def _repr_html_(self) -> str:
        pictures = [path for path in (self.curve, self.before_after) if path.is_file()]
        return html_text(repr(self)) + "".join(html_picture(p.read_bytes(), p.stem, _SHOWN_WIDTH) for p in pictures)

    def exists(self) -> bool:
        return is_run(self.path)

    @property
    def recipe(self) -> Path:
        return self.path / RECIPE

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def samples(self) -> Path:
        return self.path / "samples"

    def sample(self, iteration: int, *, averaged: bool = False) -> Path:
        """The sample grid of an evaluation, by the raw weights or their moving average."""
        return self.samples / f"iteration-{iteration:04d}{'-ema' * averaged}.png"

    def sampled(self) -> list[Path]:
        """The sample grids of the raw weights, by iteration."""
        found = ((_SAMPLE.fullmatch(path.name), path) for path in self.samples.glob("iteration-*.png"))
        return [path for _, path in sorted((int(match[1]), path) for match, path in found if match)]

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def curve(self) -> Path:
        return self.path / "curve.png"

    @property
    def before_after(self) -> Path:
        return self.path / "before_after.png"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    def state(self) -> RunState:
        """The contents of `run.json`.

        Raises:
            CheckpointError: the file is missing, damaged or has an unsupported schema.
        """
        file = _state_file(self.path)
        fix = "Name a folder that `fmg train` made; `fmg runs` lists them."
        try:
            state = RunState(**cast(Any, unsealed(read_object(file))))
            state.began  # noqa: B018
            if not isinstance(state.model, str) or len(state.model) > LONGEST_VALUE:
                raise TypeError("the model is not a name")
        except FileNotFoundError:
            missing = no_run(self.path)
            raise CheckpointError(missing.what, missing.fix) from None
        except (OSError, ValueError, TypeError, OverflowError) as error:
            raise CheckpointError(f"'{file}' is damaged ({reason(error)})", fix) from None
        if state.schema != SCHEMA or state.state not in STATES:
            raise CheckpointError(
                f"'{file}' has schema {state.schema} and state '{state.state}', which this version does not support",
                "Use the version of fmg that made the run, or a newer one.",
            )
        return state

    def values(self) -> dict[str, Plain]:
        """The values of `recipe.yaml` as written, components unresolved; empty without a recipe.

        Raises:
            CheckpointError: the file is damaged.
        """
        from fmg.recipe.document import read_document

        if not self.recipe.is_file():
            return {}
        try:
            found = read_document(self.recipe, "file", self.recipe.name).plain()
        except UsageError as error:
            raise CheckpointError(f"'{self.recipe}' is damaged ({error.what})", "Restore it from a copy.") from None
        if not isinstance(found, dict):
            raise CheckpointError(f"'{self.recipe}' is damaged (not a mapping)", "Restore it from a copy.")
        return found

    def lock(self) -> AbstractContextManager[None]:
        """Locks the run for this process, which trains it.

        A killed process leaves a run with the state `running`; the lock distinguishes it from one that still runs.

        Raises:
            UsageError: another process has locked it.
        """
        return lock(self.path, f"The run '{self.path}' is being trained by another process")

    def set_state(self, state: State) -> None:
        _write_state(self.path, replace(self.state(), state=state))

    def append_metrics(self, line: Mapping[str, object]) -> None:
        """Appends one line to `metrics.jsonl`; floats that are not finite become null, since JSON has no NaN.

        An unfinished last line, left by a crash, is removed first, so that the file stays readable.
        """
        plain = {key: _finite(value) for key, value in line.items()}
        with self.metrics.open("a+b") as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(max(end - 1, 0))
            if end and file.read() != b"\n":
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)
            file.write(json.dumps(plain, allow_nan=False).encode() + b"\n")


def is_run(path: Path) -> bool:
    """Whether `path` is a run folder, in any state."""
    return _state_file(path).is_file()


def run_names(root: Path = RUNS) -> list[str]:
    """The paths of the runs directly under `root`."""
    return [str(path) for path in sorted(root.iterdir()) if is_run(path)] if root.is_dir() else []


def no_run(path: Path) -> UsageError:
    """The error for a folder that is not a run; it suggests the run that may have been meant."""
    known = run_names()
    fix = f"Name one that `fmg train` made. {suggestion(str(path), known)}" if known else "Train one with `fmg train`."
    return UsageError(f"'{path}' is not a run folder", fix)


def list_runs(root: Path = RUNS) -> list[RunFolder]:
    """The run folders directly under `root`, oldest first; damaged ones are left out."""
    return sorted_runs(root)[0]


def sorted_runs(root: Path) -> tuple[list[RunFolder], list[tuple[RunFolder, CheckpointError]]]:
    """The run folders directly under `root`, oldest first, and those whose state cannot be read, by name, and why."""
    readable: list[tuple[float, str, RunFolder]] = []
    damaged: list[tuple[RunFolder, CheckpointError]] = []
    for path in sorted(root.iterdir()) if root.is_dir() else ():
        if not is_run(path):
            continue
        run = RunFolder(path)
        try:
            readable.append((run.state().began, path.name, run))
        except CheckpointError as error:
            damaged.append((run, error))
    return [run for _, _, run in sorted(readable, key=lambda entry: entry[:2])], damaged


def newest_run(root: Path = RUNS) -> Path | None:
    """The run under `root` that started last, or None."""
    runs = list_runs(root)
    return runs[-1].path if runs else None


def _finite(value: object) -> object:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _state_file(path: Path) -> Path:
    return path / "run.json"


def _write_state(path: Path, state: RunState) -> None:
    write_json(_state_file(path), sealed(asdict(state)))


def _claim(base: Path) -> Path:
    """A new folder called `base`, or `base-2`, `base-3`, ...; two processes never get the same one."""
    base.parent.mkdir(parents=True, exist_ok=True)
    number, path = 1, base
    while True:
        try:
            path.mkdir()
        except FileExistsError:
            number += 1
            path = base.with_name(f"{base.name}-{number}")
        else:
            return path
