"""Merges a saved adapter into a pipeline folder, without a run."""

from __future__ import annotations

from pathlib import Path

import torch

from fmg.core.events import ignore
from fmg.export.diffusers import Merged, PipelineFolder, write_folder
from fmg.export.source import check_base, read_delta
from fmg.models.common.weights import stored_digest
from fmg.models.conventions import read_conventions
from fmg.models.flux.loading import transformer_source


def merge_folder(base: Path, adapter: Path, out: Path, dtype: torch.dtype | None = None) -> Merged:
    conventions = read_conventions(base)
    folder = PipelineFolder(base, conventions, transformer_source(base, conventions))
    delta = read_delta(adapter, {name: shape for name, (_, shape) in folder.stored().items()}, str(adapter))
    check_base(delta, stored_digest(folder.transformer.weights), str(base))
    return write_folder(folder, delta, adapter, out, dtype, ignore)
