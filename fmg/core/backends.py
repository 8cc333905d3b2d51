"""What draws images: a backend on one runtime, and the description of one that the registry builds.

Imports no torch: an artifact is drawn from where there is none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

from fmg.core.events import Notice, Observer
from fmg.core.profiling import StageClock

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

NoiseSource = Callable[[int], "NDArray[np.float32]"]
"""Standard normal noise (b, c, h, w) of a step: 0 for where an image begins, k + 1 for interval k of the grid."""

Subject = Literal["model", "artifact"]


@dataclass(frozen=True)
class Drawn:
    """Images (b, 3, height, width) in [0, 1] and the latents (b, c, h, w) they were decoded from, both fp32."""

    images: NDArray[np.float32]
    latents: NDArray[np.float32]


@runtime_checkable
class CutsPrompts(Protocol):
    """A model or a backend that can tell which prompts it does not read to their end."""

    def cut_prompts(self, prompts: Sequence[str]) -> str:
        """One or two sentences for people (`fmg.core.prompt.cut_prompts`); empty when it reads them all."""


def tell_of_cuts(reader: object, prompts: Sequence[str], observer: Observer) -> None:
    """Tells an observer which of the prompts a model or a backend cuts, where it knows."""
    if isinstance(reader, CutsPrompts) and (said := reader.cut_prompts(prompts)):
        observer(Notice("warning", said))


class Backend(Protocol):
    """Text encoders, few-step sampler and decoder of one model on one runtime.

    A context manager: leaving it frees the runtime. The stages of `encode` and `draw` have the names of
    `fmg.core.profiling`.
    """

    @property
    def name(self) -> str:
        """Registered name, such as `torch`."""

    @property
    def detail(self) -> str:
        """How it runs, for people: execution provider, engine, threads."""

    @property
    def device(self) -> str:
        """Where it computes: `cpu`, `cuda:0`."""

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(c, h, w) of one latent."""

    def encode(self, prompts: Sequence[str]) -> Any:
        """What `draw` takes for these prompts. Recent prompts are remembered."""

    def draw(self, cond: Any, noise: NoiseSource, times: Sequence[float]) -> Drawn:
        """One image for each prompt of `cond`, along strictly falling `times` from 1 to 0."""

    def uncached(self) -> AbstractContextManager[None]:
        """Inside, `encode` encodes every prompt it gets, so that its time can be measured."""

    def release_text(self) -> None:
        """Frees the memory of the text encoders; they are loaded again when a new prompt comes."""

    def clock(self) -> StageClock[Any]:
        """A clock that reads this runtime's time, on a GPU from events in its queue."""

    def reset_peak_memory(self) -> None:
        """Begins a new measurement of `peak_memory`."""

    def peak_memory(self) -> int:
        """Most bytes held at once since the last reset: of the device, or of the process on a CPU."""

    def __enter__(self) -> Backend: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class BackendSource(Protocol):
    """What the backend registry builds: a backend that can be opened.

    `subject` is a `fmg.inference.target.Target` where `opens` says `model`, and a `fmg.inference.artifact.Artifact`
    where it says `artifact`.
    """

    @property
    def opens(self) -> Subject:
        """What it draws from."""

    @property
    def preference(self) -> int:
        """Of several that suit, `auto` takes the one with the highest."""

    def check(self) -> None:
        """Whether the packages it needs are there.

        Raises:
            MissingDependencyError: they are not; says how to install them.
        """

    def suits(self, subject: Any, device: str) -> bool:
        """Whether `auto` may take it: packages, device and (for engines) a matching engine are there. Never raises."""

    def open(self, subject: Any, device: str) -> Backend:
        """Loads the weights.

        Args:
            subject: what to draw from.
            device: `auto`, `cpu`, `cuda` or `cuda:N`.

        Raises:
            FmgError: a package, a device or a file is missing or unusable.
        """
