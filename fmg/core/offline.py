"""Whether the user forbids the network: `--offline`, and the variable that the libraries of the hub read."""

from __future__ import annotations

import os

from fmg.core.errors import UsageError

OFFLINE = "HF_HUB_OFFLINE"
_TRUE = {"1", "ON", "YES", "TRUE"}


def is_offline() -> bool:
    """Whether nothing may be downloaded."""
    return os.environ.get(OFFLINE, "").upper() in _TRUE


def refuse_offline(command: str, lacking: str) -> None:
    """Stops a download when the user forbids the network.

    Args:
        command: the command that fetches when there is a network.
        lacking: what is missing here, for people.

    Raises:
        UsageError: offline.
    """
    if is_offline():
        raise UsageError(
            f"{lacking} has not been fetched, and --offline or {OFFLINE} forbids the network",
            f"Run `{command}` without it, or copy the files here.",
        )
