"""What `fmg bench` compares: targets on backends, each opened from the side that its backend draws.

A run and its exported artifact are two sides of one thing: torch draws the run, the other backends its artifact.
Imports no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fmg.core.errors import UsageError, suggestion
from fmg.inference.artifact.layout import Artifact, is_artifact, open_artifact
from fmg.inference.generator import Generator
from fmg.inference.loading import AUTO, find, load, made_from
from fmg.registry import backends

if TYPE_CHECKING:
    from fmg.inference.target import Target

_INT8 = "int8"
ARTIFACT_FOLDER = "artifact"
"""Name of the artifact inside its run; those of models lie in a folder `artifacts`."""


@dataclass(frozen=True)
class Runtime:
    """A backend by name, with the 8-bit transformer or with the exact one."""

    backend: str
    int8: bool = False

    @property
    def label(self) -> str:
        """As it was typed."""
        return f"{self.backend}:{_INT8}" if self.int8 else self.backend


@dataclass(frozen=True)
class Entrant:
    """One thing to measure.

    Attributes:
        label: what it is called beside the others.
        subject: what is drawn.
        runtime: what draws it.
        adapter: whether the adapter of a run is in it.
    """

    label: str
    subject: Target | Artifact
    runtime: Runtime
    adapter: bool = True


@dataclass(frozen=True)
class Conditions:
    """How every entrant is opened; without a batch size, in the default batches."""

    batch_size: int | None = None
    device: str = AUTO
    dtype: str | None = None
    threads: int | None = None


def parse_runtimes(text: str) -> tuple[Runtime, ...]:
    """Backends from a list such as `torch,onnxruntime,onnxruntime:int8`.

    Raises:
        UsageError: one is unknown, or is named twice.
    """
    runtimes = []
    for part in text.split(","):
        name, _, option = part.strip().partition(":")
        if name not in backends.names():
            raise UsageError(f"--compare: there is no backend '{name}'", suggestion(name, backends.names()))
        if option not in ("", _INT8):
            raise UsageError(f"--compare: '{option}' is no option of a backend", f"Write {name}, or {name}:{_INT8}.")
        if option and backends.build(name).opens != "artifact":
            raise UsageError(f"--compare: the backend '{name}' has no int8", f"Write onnxruntime:{_INT8}.")
        runtimes.append(Runtime(name, bool(option)))
    if len(set(runtimes)) < len(runtimes):
        raise UsageError(f"--compare {text} names a backend twice", "Give each backend once.")
    return tuple(runtimes)


def entrants(targets: Sequence[str], runtimes: Sequence[Runtime]) -> list[Entrant]:
    """Every target on every backend; no target is the newest run, no backend the preferred one of each target.

    Raises:
        UsageError: a target is unknown or named twice, or has no side that a backend draws.
        MissingDependencyError: a backend is not installed.
    """
    if len(set(targets)) < len(targets):
        raise UsageError("A target is named twice", "Give each target once.")
    found = []
    for target in targets or (None,):
        subject = find(target)
        name = target if target is not None else _label(subject)
        if not runtimes:
            found.append(Entrant(name, subject, Runtime(AUTO)))
        for runtime in runtimes:
            label = runtime.label if len(targets) < 2 else f"{name} {runtime.label}"
            found.append(Entrant(label, side_for(subject, runtime), runtime))
    return found


def side_for(subject: Target | Artifact, runtime: Runtime) -> Target | Artifact:
    """The run or model of an artifact, or the artifact of a run or model, whichever a backend draws.

    Raises:
        UsageError: there is no such side here.
        MissingDependencyError: the backend is not installed.
    """
    source = backends.build(runtime.backend)
    source.check()
    if source.opens == "artifact":
        return subject if isinstance(subject, Artifact) else exported_from(subject)
    return made_from(subject) if isinstance(subject, Artifact) else subject


def exported_from(target: Target) -> Artifact:
    """The artifact that `fmg export` made of a run or model, where it puts it when nothing is said.

    Raises:
        UsageError: there is none.
    """
    run = Path(target.label)
    folder = run / ARTIFACT_FOLDER if target.adapter is not None else Path(f"{ARTIFACT_FOLDER}s") / run
    if not is_artifact(folder):
        raise UsageError(
            f"'{target.label}' has no artifact in {folder}", f"Make it: fmg export {target.label}; or name an artifact."
        )
    return open_artifact(folder)


def open_entrants(entered: Sequence[Entrant], conditions: Conditions, stack: ExitStack) -> dict[str, Generator]:
    """The generator of each entrant by its label; `stack` closes them.

    Raises:
        UsageError: an entrant does not have what the conditions ask for.
    """
    return {entrant.label: stack.enter_context(_open(entrant, conditions)) for entrant in entered}


def _open(entrant: Entrant, conditions: Conditions) -> Generator:
    artifact = isinstance(entrant.subject, Artifact)
    return load(
        entrant.subject,
        backend=entrant.runtime.backend,
        device=conditions.device,
        # the precision of an artifact is its own; only torch is asked for one
        dtype=None if artifact else conditions.dtype,
        batch_size=conditions.batch_size,
        adapter=True if artifact else entrant.adapter,
        threads=conditions.threads,
        int8=entrant.runtime.int8,
    )


def _label(subject: Target | Artifact) -> str:
    return str(subject.folder) if isinstance(subject, Artifact) else subject.label
