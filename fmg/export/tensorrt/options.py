"""What can be asked of the builder, checked against the flavour and the machine before anything is started."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal, get_args

from fmg.core.errors import MissingDependencyError, UsageError, suggestion
from fmg.inference.tensorrt.flavours import FLAVOURS, RTX, TENSORRT, Flavour, Gpu, importable, load_module

Hardware = Literal["none", "same-capability", "ampere-plus"]
AUTO = "auto"
_MAX_LEVEL = 5


@dataclass(frozen=True)
class EngineOptions:
    """Options of the builder. There is no precision among them: an engine computes in the types of its graph.

    Attributes:
        level: effort of the search for kernels, 0 to 5.
        workspace_gib: bound on the scratch memory of one layer on the GPU, in GiB; None leaves it to the builder.
        timing_cache: keep measured kernel times beside the engines, so that the next build measures less.
        hardware: other GPUs that the engine shall run on as well.
        version_compatible: make an engine that other versions of TensorRT run. It carries a runtime of its own, which
            is code: running it takes the user's consent.
        weight_streaming: keep weights on the host where the GPU's memory is short.
        refittable: weights can be replaced later without a build. Off by default; see `fmg.inference.tensorrt.refit`.
    """

    level: int = 3
    workspace_gib: float | None = None
    timing_cache: bool = True
    hardware: Hardware = "none"
    version_compatible: bool = False
    weight_streaming: bool = False
    refittable: bool = False

    def check(self, flavour: Flavour, gpu: Gpu | None) -> None:
        """Whether `flavour` can do this on this machine.

        Raises:
            UsageError: naming the first option that it cannot honour, and why.
        """
        self._check_values()
        if flavour == TENSORRT and gpu is None:
            raise UsageError(
                "TensorRT builds engines on a GPU, and torch sees none here",
                "Run this where the engine will run, or use --flavour rtx, which builds ahead of time without a GPU.",
            )
        if flavour != RTX:
            return
        if self.version_compatible:
            raise UsageError(
                "TensorRT-RTX has no lean runtime, which --version-compatible would pack into the engine",
                "Leave it out, or use --flavour tensorrt.",
            )
        if self.hardware != "none":
            raise UsageError(
                "TensorRT-RTX engines run on every GPU that it supports; it has no hardware compatibility level",
                "Leave --hardware out.",
            )
        if self.refittable and gpu is None:
            raise UsageError(
                "TensorRT-RTX cannot build a refittable engine without a GPU: its compiler asks the driver",
                "Leave --refittable out, or run this on a machine with a GPU.",
            )

    def _check_values(self) -> None:
        if not 0 <= self.level <= _MAX_LEVEL:
            raise UsageError(f"The builder level {self.level} is not from 0 to {_MAX_LEVEL}", "Use 3 unless in doubt.")
        if self.workspace_gib is not None and not self.workspace_gib > 0:
            raise UsageError(f"A workspace of {self.workspace_gib} GiB holds nothing", "Give a positive number.")
        if self.hardware not in get_args(Hardware):
            raise UsageError(
                f"'{self.hardware}' is not a hardware compatibility", suggestion(self.hardware, get_args(Hardware))
            )

    def ingredients(self) -> dict[str, object]:
        """What of the options decides the engine, as plain JSON values. A timing cache only saves time."""
        return {name: value for name, value in asdict(self).items() if name != "timing_cache"}


def pick_flavour(name: str, gpu: Gpu | None) -> Flavour:
    """The flavour called `name`; `auto` is `tensorrt` where it imports and a GPU is there, else `rtx`.

    Raises:
        UsageError: for another name.
        MissingDependencyError: the package, or Polygraphy, is not installed.
    """
    if name == AUTO:
        found = TENSORRT if gpu is not None and importable(TENSORRT) else RTX if importable(RTX) else None
        if found is None:
            raise MissingDependencyError(
                "No TensorRT is installed that could build an engine here; the ONNX artifact is complete without one",
                f"Get TensorRT-RTX, which builds without a GPU ({RTX.install}), or TensorRT ({TENSORRT.install}).",
            )
    elif name in FLAVOURS:
        found = FLAVOURS[name]
        load_module(found)
    else:
        raise UsageError(f"--flavour: '{name}' is not a flavour", suggestion(name, [AUTO, *FLAVOURS]))
    return found


def polygraphy_version(flavour: Flavour) -> str:
    """Version of Polygraphy, which drives the builder.

    Raises:
        MissingDependencyError: it is not installed.
    """
    try:
        import polygraphy
    except ImportError:
        raise MissingDependencyError("Polygraphy is not installed", f"Install it: {flavour.install}") from None
    return str(polygraphy.__version__)
