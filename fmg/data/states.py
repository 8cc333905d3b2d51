"""The saved states of a run folder: which there is, and whether the run can go on from it. Imports no torch."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path

from fmg.core.errors import UsageError
from fmg.data.run_folder import RunFolder, is_run

FOLDER = "state"
_PREFIX = "iteration-"


def state_folder(run: Path, iteration: int) -> Path:
    """Where the state after `iteration` iterations is."""
    return run / FOLDER / f"{_PREFIX}{iteration:08d}"


def newest_state(run: Path) -> Path | None:
    """The folder of the newest state, or None."""
    folders = sorted(path for path in (run / FOLDER).glob(f"{_PREFIX}*") if path.name[len(_PREFIX) :].isdecimal())
    return folders[-1] if folders else None


def drop_states(run: Path) -> None:
    """Removes what only an unfinished run needs."""
    shutil.rmtree(run / FOLDER, ignore_errors=True)


def resume_command(run: Path) -> str:
    """What a person types to go on with a run."""
    return f"fmg train --resume {shlex.quote(str(run))}"


def check_resumable(run: Path) -> None:
    """Whether a run can be gone on with, by its folder alone.

    Raises:
        UsageError: it is not a run, has ended, or has no state yet.
    """
    if not is_run(run):
        raise UsageError(f"'{run}' is not a run folder", "Name one that `fmg train` made; `fmg runs` lists them.")
    again = f"Start a new one, for example with `fmg train --config {shlex.quote(str(run / 'recipe.yaml'))}`."
    if RunFolder(run).state().state == "finished":
        raise UsageError(f"The run '{run}' is finished", again)
    if newest_state(run) is None:
        raise UsageError(f"The run '{run}' has no saved state to go on from", again)
