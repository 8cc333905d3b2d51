"""Merges a saved adapter into a pipeline folder, without a run."""

from __future__ import annotations

from pathlib import Path

import torch

from fmg.core.events import ignore
from fmg.export.diffusers import Merged, write_folder
from fmg.export.source import ExportSource
from fmg.models.conventions import read_conventions
from fmg.models.flux.loading import transformer_source
from fmg.recipe import Recipe


def merge_folder(base: Path, adapter: Path, out: Path, dtype: torch.dtype | None = None) -> Merged:
    conventions, recipe = read_conventions(base), Recipe.default("meanflow-shapes")
    transformer = transformer_source(base, conventions)
    source = ExportSource(str(adapter), "tiny", recipe, base, conventions, transformer, adapter)
    return write_folder(source, out, dtype, ignore)
