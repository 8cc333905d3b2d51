"""The backends `tensorrt` and `tensorrt-rtx` as the registry builds them."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

from fmg.core.backends import Backend, Subject
from fmg.core.errors import FmgError, FmgWarning
from fmg.inference.artifact.backend import ArtifactBackend
from fmg.inference.artifact.layout import Artifact
from fmg.inference.configs import TensorRtConfig
from fmg.inference.tensorrt.flavours import RTX, TENSORRT, Flavour, current_gpu, lists_gpu, load_module
from fmg.inference.tensorrt.matching import Machine, fitting_engines
from fmg.inference.tensorrt.origin import built_here
from fmg.registry import backends

_GIB = 1 << 30


@dataclass(frozen=True)
class EngineSource:
    """The engines of an artifact, in one flavour of TensorRT."""

    config: TensorRtConfig
    flavour: Flavour
    preference: int
    opens: Subject = "artifact"

    def check(self) -> None:
        """Whether the package is there.

        Raises:
            MissingDependencyError: it is not.
        """
        load_module(self.flavour)

    def suits(self, subject: Artifact, device: str) -> bool:
        """Whether package, GPU and an engine of every graph are there, and nothing of it needs a decision of the user.

        A GPU that the package does not list, an engine with code inside, or one that was not built on this computer
        (which is warned of) has to be asked for by name.
        """
        if device.partition(":")[0] not in ("auto", "cuda") or not any(subject.engines.glob("*.json")):
            return False
        try:
            machine = self._machine()
            records = fitting_engines(subject, machine, self.config.resolution)
        except FmgError:
            return False
        if not self.config.allow_code and any(record.carries_code for record in records.values()):
            return False
        if machine.gpu is None or not lists_gpu(load_module(self.flavour), machine.gpu):
            return False
        foreign = [record.plan for record in records.values() if not built_here(record.sha256)]
        if foreign:
            warnings.warn(
                f"The engine {foreign[0]} was not built on this computer and is left alone, for a plan is as good as"
                f" a program; --backend {self.flavour.backend} takes it, if you trust who made it.",
                FmgWarning,
                stacklevel=2,
            )
        return not foreign

    def open(self, subject: Artifact, device: str) -> Backend:
        """Opens the artifact; each engine is loaded when it is first run.

        Raises:
            MissingDependencyError: the package is not installed.
            UsageError: there is no GPU, or no engine that fits.
        """
        machine = self._machine()
        records = fitting_engines(subject, machine, self.config.resolution)
        from fmg.inference.tensorrt.device import open_device
        from fmg.inference.tensorrt.engine import RunOptions
        from fmg.inference.tensorrt.runtime import EngineRuntime

        budget = self.config.streaming_budget_gib
        options = RunOptions(
            cuda_graphs=self.config.cuda_graphs,
            streaming_budget=None if budget is None else int(budget * _GIB),
            allow_code=self.config.allow_code,
        )
        runtime = EngineRuntime(subject, records, self.flavour, load_module(self.flavour), open_device(device), options)
        return ArtifactBackend(subject, runtime, resolution=self.config.resolution)

    def _machine(self) -> Machine:
        module = load_module(self.flavour)
        return Machine(self.flavour, str(module.__version__), current_gpu())


@backends.register("tensorrt", TensorRtConfig)
def tensorrt(config: TensorRtConfig) -> EngineSource:
    """TensorRT engines of an exported artifact, built on this kind of GPU."""
    return EngineSource(config, TENSORRT, preference=20)


@backends.register("tensorrt-rtx", TensorRtConfig)
def tensorrt_rtx(config: TensorRtConfig) -> EngineSource:
    """TensorRT-RTX engines of an exported artifact, built ahead of time for GeForce and RTX GPUs."""
    return EngineSource(config, RTX, preference=10)
