"""Runs third-party code safely: its prints go to stderr, and the settings of the process are restored.

Stdout carries the result of a command. A script written for inference may disable gradients permanently, which would
break the run that calls it. Imports no torch.
"""

from __future__ import annotations

import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from fmg.core.errors import FmgWarning

_DEVICES = ("cpu", "cuda")
_lock = threading.Lock()
_inside = 0
_stdout: TextIO | None = None


@contextmanager
def prints_aside() -> Iterator[None]:
    """`print` writes to stderr while the body runs, in every thread; bodies may overlap and nest."""
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


class _Setting(NamedTuple):
    """A process-wide setting: its name, how to read and write it, and its value in a new process."""

    name: str
    read: Callable[[Any], Any]
    write: Callable[[Any, Any], object]
    at_first: Callable[[Any], Any] | None = None


def _autocast(torch: Any) -> tuple[tuple[bool, Any], ...]:
    return tuple((torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in _DEVICES)


def _set_autocast(torch: Any, value: Sequence[tuple[bool, Any]]) -> None:
    for kind, (enabled, dtype) in zip(_DEVICES, value, strict=True):
        torch.set_autocast_enabled(kind, enabled)
        torch.set_autocast_dtype(kind, dtype)


def _set_device(torch: Any, device: Any) -> None:
    # a default device, even the CPU, slows down every factory function
    torch.set_default_device(None if device.type == "cpu" else device)


def _deterministic(torch: Any) -> tuple[bool, bool]:
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )


# what fmg itself depends on
_OWN = (
    _Setting(
        "gradients",
        lambda torch: torch.is_grad_enabled(),
        lambda torch, value: torch.set_grad_enabled(value),
        lambda _: True,
    ),
    _Setting(
        "the default dtype",
        lambda torch: torch.get_default_dtype(),
        lambda torch, value: torch.set_default_dtype(value),
        lambda torch: torch.float32,
    ),
    _Setting(
        "the default device",
        lambda torch: torch.get_default_device(),
        _set_device,
        lambda torch: torch.device("cpu"),
    ),
    _Setting(
        "autocast",
        _autocast,
        _set_autocast,
        lambda torch: tuple((False, torch.get_autocast_dtype(kind)) for kind in _DEVICES),
    ),
)
_SETTINGS = (
    *_OWN,
    _Setting(
        "the number of threads",
        lambda torch: torch.get_num_threads(),
        lambda torch, value: torch.set_num_threads(value),
    ),
    _Setting(
        "deterministic algorithms",
        _deterministic,
        lambda torch, value: torch.use_deterministic_algorithms(value[0], warn_only=value[1]),
        lambda _: (False, False),
    ),
    _Setting(
        "anomaly detection",
        lambda torch: torch.is_anomaly_enabled(),
        lambda torch, value: torch.autograd.set_detect_anomaly(value),
        lambda _: False,
    ),
    _Setting(
        "cuDNN's benchmark",
        lambda torch: torch.backends.cudnn.benchmark,
        lambda torch, value: setattr(torch.backends.cudnn, "benchmark", value),
        lambda _: False,
    ),
)
_told: set[tuple[str, str]] = set()


@contextmanager
def fenced(who: str) -> Iterator[None]:
    """Runs third-party code in the body: it prints to stderr, and its changes to the process are undone.

    Restored are the working directory and torch's global settings: gradients, default dtype and device, autocast,
    threads, deterministic algorithms, anomaly detection and cuDNN's benchmark. A warning names what was changed. The
    state of torch's generator is restored silently where the code seeded it. Sampling from it is allowed: a run keys
    all of its noise except the masks of `lora.dropout`.

    Args:
        who: the subject of the warning, such as `The reward 'my.module:fn'`.
    """
    torch = _loaded_torch()
    before = _read(torch, _SETTINGS)
    seeded = None if torch is None else (torch.initial_seed(), torch.get_rng_state())
    folder = _folder()
    changed: list[str] = []
    try:
        with prints_aside():
            yield
    finally:
        torch = _loaded_torch()
        if torch is not None:
            if not before:
                before = {s.name: s.at_first(torch) for s in _SETTINGS if s.at_first is not None}
            after = _read(torch, _SETTINGS)
            wrong = [s for s in _SETTINGS if s.name in before and after[s.name] != before[s.name]]
            _write(torch, {s.name: before[s.name] for s in wrong})
            changed = [s.name for s in wrong]
            if seeded is not None and torch.initial_seed() != seeded[0]:
                torch.set_rng_state(seeded[1])
        if folder is not None and _folder() != folder:
            os.chdir(folder)
            changed.append("the working directory")
    new = [what for what in changed if (who, what) not in _told]
    _told.update((who, what) for what in new)
    if new:
        text = f"{who} changed {', '.join(new)} for the whole process; it was restored"
        warnings.warn(f"{text}. Change it in a `with` block, or restore it.", FmgWarning, stacklevel=3)


@contextmanager
def torch_as_new() -> Iterator[None]:
    """Gives the body the gradients, default dtype, default device and autocast of a new process, whatever the user's
    program has set; restores them afterwards."""
    import torch

    with torch.inference_mode(False):
        before = _read(torch, _OWN)
        _write(torch, {s.name: s.at_first(torch) for s in _OWN if s.at_first is not None})
        try:
            yield
        finally:
            _write(torch, before)


def _loaded_torch() -> Any:
    """Torch, if it has been imported completely."""
    torch = sys.modules.get("torch")
    return torch if hasattr(torch, "get_default_device") else None


def _read(torch: Any, settings: Sequence[_Setting]) -> dict[str, Any]:
    return {} if torch is None else {setting.name: setting.read(torch) for setting in settings}


def _write(torch: Any, values: Mapping[str, Any]) -> None:
    for setting in _SETTINGS:
        if setting.name in values:
            setting.write(torch, values[setting.name])


def _folder() -> Path | None:
    try:
        return Path.cwd()
    except OSError:
        # the folder was removed
        return None


@contextmanager
def quiet(*libraries: Any) -> Iterator[None]:
    """Suppresses progress bars and advice of Hugging Face libraries in the body; their settings are restored.

    Args:
        libraries: their modules `utils.logging`.
    """
    before = [(library, library.get_verbosity(), library.is_progress_bar_enabled()) for library in libraries]
    for library in libraries:
        library.set_verbosity_error()
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library, verbosity, bar in before:
            library.set_verbosity(verbosity)
            if bar:
                library.enable_progress_bar()
