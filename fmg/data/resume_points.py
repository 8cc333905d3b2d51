"""The saved states of a run folder: which there is, whether the run can go on from it, and how. Imports no torch."""

from __future__ import annotations

import contextlib
import shlex
import shutil
from collections.abc import Mapping
from pathlib import Path

from fmg.core.errors import FmgError, UsageError
from fmg.core.files import remove_leftovers
from fmg.data.prompt_sets import load_prompts, prompt_references, prompts_digest, untied
from fmg.data.run_folder import RunFolder, is_run, no_run
from fmg.recipe import Recipe

FOLDER = "state"
_PREFIX = "iteration-"


def state_folder(run: Path, iteration: int) -> Path:
    """Where the state after `iteration` iterations is."""
    return run / FOLDER / f"{_PREFIX}{iteration:08d}"


def saved_states(run: Path) -> list[Path]:
    """The folders of all states, oldest first. There is one, or two where a run was killed between them."""
    return sorted(path for path in (run / FOLDER).glob(f"{_PREFIX}*") if path.name[len(_PREFIX) :].isdecimal())


def newest_state(run: Path) -> Path | None:
    """The folder of the newest state, or None."""
    return next(reversed(saved_states(run)), None)


def drop_states(run: Path, keep: Path | None = None) -> None:
    """Removes what only an unfinished run needs, apart from the state to keep, and what killed processes left."""
    for path in saved_states(run):
        if path != keep:
            shutil.rmtree(path, ignore_errors=True)
    remove_leftovers(run / FOLDER)
    if keep is None:
        # of anything else that is in there nothing is known
        with contextlib.suppress(OSError):
            (run / FOLDER).rmdir()


def consent_flag(recipe: Recipe) -> str:
    """The flag, after a space, of commands that read this recipe from a file and score; empty where it needs none.

    It is that of rewards which are the user's own code, or ask a server.
    """
    return " --allow-code" if any(ref.config.needs_consent for ref in recipe.measured_rewards) else ""


def resume_command(run: Path, recipe: Recipe) -> str:
    """What a person types to go on with a run of this recipe."""
    return f"fmg train --resume {shlex.quote(str(run))}{consent_flag(recipe)}"


def repeat_command(file: Path, recipe: Recipe) -> str:
    """What a person types to start a new run of the recipe in a file."""
    return f"fmg train --config {shlex.quote(str(file))}{consent_flag(recipe)}"


def ended_short(run: Path) -> bool:
    """Whether a run finished and was killed before its report was written and its states were removed."""
    if not is_run(run) or RunFolder(run).state().state != "finished":
        return False
    return not RunFolder(run).report.is_file() or (run / FOLDER).is_dir()


def check_resumable(run: Path) -> None:
    """Whether a run can be gone on with, by its folder alone.

    Raises:
        UsageError: it is not a run, has ended, or has no state yet.
    """
    if not is_run(run):
        raise no_run(run)
    if RunFolder(run).state().state == "finished":
        raise UsageError(f"The run '{run}' is finished", _start_anew(run))
    if newest_state(run) is None:
        raise UsageError(f"The run '{run}' has no saved state to go on from", _start_anew(run))


def check_prompts(run: Path, recipe: Recipe, digests: Mapping[str, str]) -> None:
    """Whether the prompts of a run are those that it was begun with.

    Args:
        run: its folder.
        recipe: its own.
        digests: of its prompt sets, by their path in the recipe.

    Raises:
        UsageError: a prompt set has others, or its file is not there.
    """
    for place, ref in prompt_references(untied(recipe)).items():
        if place in digests and prompts_digest(load_prompts(ref)) != digests[place]:
            path = getattr(ref.config, "path", None)
            which = f"The prompt set '{ref.name}'" if path is None else f"The prompt file '{path}'"
            raise UsageError(
                f"{which} ({place}) has other prompts than when the run was begun",
                f"Restore it, or accept them: `{resume_command(run, recipe)} --accept-changed-prompts`.",
            )


def _start_anew(run: Path) -> str:
    file = RunFolder(run).recipe
    try:
        # which reads what the recipe names, and runs none of it
        recipe = Recipe.from_yaml(file, allow_code=True)
    except FmgError:
        return "Start a new one."
    return f"Start a new one, for example with `{repeat_command(file, recipe)}`."
