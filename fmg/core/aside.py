"""Where code of a user's own prints to: stdout carries what a command answers, so it goes to stderr."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

_lock = threading.Lock()
_inside = 0
_stdout: TextIO | None = None


@contextmanager
def prints_aside() -> Iterator[None]:
    """While the body runs, `print` writes to stderr, in every thread; bodies may overlap and be nested."""
    global _inside, _stdout
    with _lock:
        if _inside == 0:
            _stdout, sys.stdout = sys.stdout, sys.stderr
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if _inside == 0 and _stdout is not None:
                sys.stdout, _stdout = _stdout, None
