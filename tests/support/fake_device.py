"""The device of the stand-in for TensorRT, also visible to tests: its memory is the host's, and a capture is a list."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

STREAM = 0x5EED


@dataclass
class FakeDevice:
    """State of the device that the stand-in and the tests share.

    Attributes:
        calls: names and arguments of the calls that reached TensorRT, in order.
        recording: what is captured, while something is.
        broken: reason why no engine can be deserialised.
        failing: reason why no execution succeeds.
        dropped: weights that a refit does not reach, as the known defect of TensorRT 11.3.
        pixels: image pixels along the side of a latent pixel.
        invalid: bits of `EngineInvalidityDiagnostics` that TensorRT-RTX finds in a plan's header.
    """

    calls: list[tuple[Any, ...]] = field(default_factory=list)
    recording: list[Callable[[], None]] | None = None
    broken: str = ""
    failing: str = ""
    dropped: frozenset[str] = frozenset()
    pixels: int = 4
    invalid: int = 0
    kept: list[Callable[[], None]] = field(default_factory=list)

    def record(self, *call: Any) -> None:
        self.calls.append(call)

    def names(self) -> list[str]:
        return [call[0] for call in self.calls]

    def is_stream(self, handle: int) -> bool:
        return handle == STREAM

    def recorded(self, context: object) -> bool:
        """Whether a captured execution is of this context."""
        return any(work.__self__ is context for work in self.kept)  # type: ignore[attr-defined]

    def reset(self) -> None:
        self.__init__()  # type: ignore[misc]


DEVICE = FakeDevice()
