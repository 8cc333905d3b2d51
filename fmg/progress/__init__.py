"""Events as text for a person: plain lines, the live view of a terminal, and that of a notebook.

Python calls and the command line share them. Importing this package does not import rich.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from fmg.core.events import Event, Observer

if TYPE_CHECKING:
    from fmg.progress.reporters import Reporter


@contextmanager
def watching(observer: Observer | None, progress: bool | None) -> Iterator[Observer]:
    """What a public function reports to while it works: the caller's observer, a person, or both.

    Args:
        observer: what the caller passed.
        progress: True shows progress on stderr; False does not; None shows it where there is no observer and stderr is
            a terminal or the program runs in a notebook. Where neither hears anything, warnings are logged (`fmg`).
    """
    with _reporter(observer, progress) as reporter:

        def tell(event: Event) -> None:
            reporter(event)
            if observer is not None:
                observer(event)

        # an observer of the caller alone is handed on as it is
        yield tell if progress or observer is None else observer


def _reporter(observer: Observer | None, progress: bool | None) -> Reporter:
    from fmg.progress.reporters import LogReporter, is_interactive, reporter_for

    if progress or (progress is None and observer is None):
        from fmg.progress.console import SafeConsole

        console = SafeConsole(stderr=True, markup=False, emoji=False, highlight=False)
        if progress or is_interactive(console):
            return reporter_for(console)
    return LogReporter()
