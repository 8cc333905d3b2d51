"""Progress for people, shared by Python calls and the command line. Importing this package does not import rich."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from fmg.core.events import Event, Notice, Observer

if TYPE_CHECKING:
    from fmg.progress.reporters import Reporter


@contextmanager
def watching(observer: Observer | None, progress: bool | None) -> Iterator[Observer]:
    """The observer of a public function: the caller's, a progress display, or both.

    Args:
        observer: what the caller passed.
        progress: True shows progress on stderr; False does not; None shows it if there is no observer and stderr is a
            terminal or the program runs in a notebook. If nothing is shown and there is no observer, warnings go to the
            logger `fmg`.
    """
    reporter = _reporter(observer, progress)
    if reporter is None:
        yield log_notices if observer is None else observer
        return
    with reporter:

        def tell(event: Event) -> None:
            reporter(event)
            if observer is not None:
                observer(event)

        yield tell


def log_notices(event: Event) -> None:
    """Sends warnings and errors to the logger `fmg`, which prints them unless a program configures it otherwise."""
    if isinstance(event, Notice) and event.level != "info":
        logging.getLogger("fmg").log(logging.ERROR if event.level == "error" else logging.WARNING, event.text)


def _reporter(observer: Observer | None, progress: bool | None) -> Reporter | None:
    if progress is False or (progress is None and observer is not None):
        return None
    try:
        from fmg.progress.reporters import SafeConsole, is_interactive, reporter_for
    except ImportError:
        # without rich: an artifact generates images where there is little more than NumPy
        return None
    console = SafeConsole(stderr=True, markup=False, emoji=False, highlight=False)
    return reporter_for(console) if progress or is_interactive(console) else None
