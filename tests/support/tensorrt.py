"""Makes `import tensorrt` find the stand-in for TensorRT 11, in this process and its children."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest

from fmg.core.events import Event
from fmg.export.tensorrt.build import BuiltEngine, EngineOptions, build_engines
from fmg.inference.artifact import Artifact, open_artifact
from fmg.inference.tensorrt.flavours import TENSORRT, Gpu, load_module
from tests.support.fake_cuda import FakeCuda
from tests.support.fake_device import DEVICE
from tests.support.tiny_artifact import SCALE

GPU = Gpu("NVIDIA H100 80GB HBM3", "9.0", "580")
_STAND_IN = Path(__file__).parent / "fake_tensorrt"


@contextmanager
def stand_in(gpu: Gpu | None = GPU, cache: Path | None = None) -> Iterator[ModuleType]:
    """The stand-in as `tensorrt`, on a machine with this GPU and fmg's cache; forgotten at the end."""
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as empty:
        _forget()
        patch.setenv("FMG_CACHE", str(cache or empty))
        patch.syspath_prepend(str(_STAND_IN))
        for place in ("fmg.export.tensorrt.build", "fmg.inference.openers"):
            patch.setattr(f"{place}.current_gpu", lambda: gpu)
        for place in ("fmg.export.tensorrt.build", "fmg.inference.tensorrt.engine"):
            patch.setattr(f"{place}.open_device", lambda name: FakeCuda())
        DEVICE.reset()
        DEVICE.pixels = SCALE
        try:
            yield load_module(TENSORRT)
        finally:
            _forget()
            DEVICE.reset()


def build(
    folder: Path, *, options: EngineOptions | None = None, resolutions: Sequence[int] | None = None
) -> tuple[list[BuiltEngine], list[Event]]:
    """The engines of an artifact by the stand-in, and what was reported."""
    events: list[Event] = []
    artifact: Artifact = open_artifact(folder)
    engines = build_engines(
        artifact, flavour="tensorrt", options=options, resolutions=resolutions, observer=events.append
    )
    return engines, events


def _forget() -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "tensorrt"]:
        del sys.modules[name]
