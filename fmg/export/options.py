"""What to export, and what every artifact records about its origin. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from fmg.core.errors import UsageError
from fmg.core.machine import installed_versions
from fmg.version import __version__

ExportPrecision = Literal["fp32", "bf16", "fp16", "fp8"]

SMALL_BATCH, LARGE_BATCH = (1, 16, 64), (1, 1, 4)
"""Default rows per call (minimum, optimum, maximum), for a model that runs on a CPU and for a full-size model."""

_LIBRARIES = ("torch", "diffusers", "transformers", "onnx", "onnx-ir", "onnxscript", "onnxruntime")


@dataclass(frozen=True)
class ExportOptions:
    """What to export.

    Attributes:
        precision: of transformer and text encoders; the decoder is always fp32, and so are text encoders beside an
            fp16 transformer. fp8 is that of the large products of the transformer; what is beside them is bf16.
        int8: also write a transformer with 8-bit weights for a CPU.
        resolutions: sides of square images; None: the model's own.
        batch: minimum, optimum and maximum of rows per call; None: by the size of the model.
        fused: also write the whole sampler as one graph.
    """

    precision: ExportPrecision = "fp32"
    int8: bool = False
    resolutions: tuple[int, ...] | None = None
    batch: tuple[int, int, int] | None = None
    fused: bool = False

    def check(self) -> None:
        """Checks that the options go together.

        Raises:
            UsageError: naming two that do not.
        """
        if self.int8 and self.precision != "fp32":
            raise UsageError(
                f"8-bit weights are for a CPU and require fp32, not {self.precision}",
                "Leave out --int8, or use --precision fp32.",
            )
        if self.fused and self.precision == "fp8":
            raise UsageError("The fused sampler is for ONNX Runtime, which does not compute fp8", "Leave --fused out.")


def plain_config(config: Mapping[str, Any]) -> dict[str, object]:
    """A config as plain JSON values, without paths of this machine."""
    kept = {key: value for key, value in config.items() if key != "_name_or_path"}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in kept.items()}


def library_versions() -> dict[str, str]:
    """Versions of the installed packages that an export depends on."""
    return {"fmg": __version__, **installed_versions(_LIBRARIES)}
