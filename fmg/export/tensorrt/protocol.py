"""What passes between the process that asks for an engine and the one that builds it: one JSON object a line."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from fmg.core.json_io import parse
from fmg.inference.artifact.decode import decode
from fmg.inference.tensorrt.records import Profile


@dataclass(frozen=True)
class Job:
    """One engine to build.

    Attributes:
        onnx: the graph, its weights beside it.
        plan: where the engine goes; the builder writes nowhere else but into the timing cache.
        flavour: `tensorrt` or `rtx`.
        profiles: in the order of their index.
        options: `EngineOptions.ingredients()`.
        timing_cache: file of measured kernel times to read and add to, or None.
    """

    onnx: str
    plan: str
    flavour: str
    profiles: tuple[Profile, ...]
    options: Mapping[str, object]
    timing_cache: str | None


@dataclass(frozen=True)
class Step:
    """Progress of one phase of the builder."""

    phase: str
    done: int
    total: int


@dataclass(frozen=True)
class Built:
    """The plan is written. `layers` counts the layers of the parsed network by kind and dtype of their result."""

    layers: Mapping[str, Mapping[str, int]]
    seconds: float


@dataclass(frozen=True)
class Failed:
    """No plan: the reason in the words of parser or builder, and the node that it names, if any."""

    reason: str
    node: str


Message = Step | Built | Failed
_KINDS: Mapping[str, type[Message]] = {"step": Step, "built": Built, "failed": Failed}


def to_line(message: Message) -> str:
    """The line of a message, with its end."""
    kind = next(name for name, cls in _KINDS.items() if isinstance(message, cls))
    return json.dumps({"kind": kind, **asdict(message)}) + "\n"


def from_line(line: str) -> Message:
    """The message of a line.

    Raises:
        ValueError: it is none.
    """
    content = parse(line)
    if not isinstance(content, dict) or content.get("kind") not in _KINDS:
        raise ValueError(f"{line!r:.80} is no message of the engine builder")
    return decode(_KINDS[content.pop("kind")], content)


def job_to_json(job: Job) -> str:
    """The text that the builder reads."""
    return json.dumps(asdict(job))


def job_from_json(text: str) -> Job:
    """The job of that text."""
    return decode(Job, parse(text))
