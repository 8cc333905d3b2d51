"""Where a run can be resumed: its saved states, whether they can be used, and the command. Imports no torch."""

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
    """The folders of all states, oldest first: one, or two where the run was killed in between."""
    return sorted(path for path in (run / FOLDER).glob(f"{_PREFIX}*") if path.name[len(_PREFIX) :].isdecimal())


def newest_state(run: Path) -> Path | None:
    """The folder of the newest state, or None."""
    return next(reversed(saved_states(run)), None)


def drop_states(run: Path, keep: Path | None = None) -> None:
    """Removes all states but `keep`, and leftovers of killed processes."""
    for path in saved_states(run):
        if path != keep:
            shutil.rmtree(path, ignore_errors=True)
    remove_leftovers(run / FOLDER)
    if keep is None:
        # anything else in there is not ours to remove
        with contextlib.suppress(OSError):
            (run / FOLDER).rmdir()


def consent_flag(recipe: Recipe) -> str:
    """` --allow-code` where the rewards of a recipe run the user's code or call a server; otherwise empty."""
    return " --allow-code" if any(ref.config.needs_consent for ref in recipe.measured_rewards) else ""


def resume_command(run: Path, recipe: Recipe) -> str:
    """The command that resumes a run of this recipe."""
    return f"fmg train --resume {shlex.quote(str(run))}{consent_flag(recipe)}"


def repeat_command(file: Path, recipe: Recipe) -> str:
    """The command that starts a new run of the recipe in a file."""
    return f"fmg train --config {shlex.quote(str(file))}{consent_flag(recipe)}"


def ended_short(run: Path) -> bool:
    """Whether a run finished but was killed before its report was written and its states were removed."""
    if not is_run(run) or RunFolder(run).state().state != "finished":
        return False
    return not RunFolder(run).report.is_file() or (run / FOLDER).is_dir()


def check_resumable(run: Path) -> None:
    """Checks that a run can be resumed, from its folder alone.

    Raises:
        UsageError: it is not a run, has finished, or has no state yet.
    """
    if not is_run(run):
        raise no_run(run)
    if RunFolder(run).state().state == "finished":
        raise UsageError(f"The run '{run}' is finished", _start_anew(run))
    if newest_state(run) is None:
        raise UsageError(f"The run '{run}' has no saved state to resume from", _start_anew(run))


def check_prompts(run: Path, recipe: Recipe, digests: Mapping[str, str]) -> None:
    """Checks that a run's prompts are those that it started with.

    Args:
        run: its folder.
        recipe: its recipe.
        digests: digests of its prompt sets, by their path in the recipe.

    Raises:
        UsageError: a prompt set has changed, or its file is missing.
    """
    for place, ref in prompt_references(untied(recipe)).items():
        if place in digests and prompts_digest(load_prompts(ref)) != digests[place]:
            path = getattr(ref.config, "path", None)
            which = f"The prompt set '{ref.name}'" if path is None else f"The prompt file '{path}'"
            raise UsageError(
                f"{which} ({place}) has different prompts than at the start of the run",
                f"Restore it, or accept them: `{resume_command(run, recipe)} --accept-changed-prompts`.",
            )


def _start_anew(run: Path) -> str:
    file = RunFolder(run).recipe
    try:
        # reading a recipe runs none of the code that it names
        recipe = Recipe.from_yaml(file, allow_code=True)
    except FmgError:
        return "Start a new one."
    return f"Start a new one, for example with `{repeat_command(file, recipe)}`."
