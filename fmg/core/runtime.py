"""Errors for what is not installed: a package, or all but the runtime."""

from __future__ import annotations

from importlib.util import find_spec

from fmg.core.errors import MissingDependencyError
from fmg.core.machine import installed_version
from fmg.version import DISTRIBUTION, RUNTIME, install_line


def require(user: str, *packages: str, extra: str = "", instead: str = "") -> None:
    """Refuses what needs packages that are not installed; imports none of them.

    Args:
        user: the subject of the sentence.
        packages: modules.
        extra: the extra that installs them.
        instead: the end of the advice.

    Raises:
        MissingDependencyError: naming the first that is absent, and the command that installs it.
    """
    for package in packages:
        if find_spec(package) is None:
            what = f"{user} needs the package '{package.replace('_', '-')}'"
            raise MissingDependencyError(what, f"Run: {install_line(extra)}{instead}")


def beyond_runtime(what: str) -> MissingDependencyError:
    """The error for what the runtime does not include; `what` is the subject of the sentence.

    A checkout that is installed in place is hidden by an installed runtime, because its folder comes later in the
    search path.
    """
    if installed_version(DISTRIBUTION) is not None:
        hidden = f"{what} needs {DISTRIBUTION}, whose files are hidden by those of {RUNTIME}"
        return MissingDependencyError(hidden, f"Run: pip uninstall -y {RUNTIME}")
    return MissingDependencyError(
        f"{what} needs {DISTRIBUTION}, of which only the runtime is installed", f"Run: {install_line()}"
    )
