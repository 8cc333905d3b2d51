"""One process a run: a lock that ends with the process that holds it, however it ends. Imports no torch."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fmg.core.errors import UsageError


@contextmanager
def run_lock(run: Path) -> Iterator[None]:
    """Holds a run folder for the length of the body.

    A killed process leaves a run in state `running`; this lock tells it from one that still runs. Where the system or
    the file system has no such locks, nothing is held.

    Raises:
        UsageError: another process holds it.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    handle = os.open(run, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(
                f"The run '{run}' is being trained by another process", "Wait until that one ends, or stop it."
            ) from None
        except OSError:
            pass
        yield
    finally:
        os.close(handle)
