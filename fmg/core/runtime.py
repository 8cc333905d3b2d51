"""The error for what needs the full distribution when only the runtime is installed."""

from __future__ import annotations

from fmg.core.errors import MissingDependencyError
from fmg.core.machine import installed_version
from fmg.version import DISTRIBUTION, RUNTIME, install_line


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
